"""Placement is a pure choice: each rule shown on a small cluster, and the laws on random ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_worker import BLOCK, MODEL, facts

from pdserve.config import RouterConfig
from pdserve.errors import ContextTooLong, NoWorker
from pdserve.types import Fingerprint, Load, Role, WorkerId, WorkerState
from router.api import WorkerView
from router.placement import Ask, Rules, Skip, hope, place

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def view(
    name: str, role: Role, state: WorkerState = WorkerState.READY, *, blocks: int = 100, **more
) -> WorkerView:
    return WorkerView(facts(name, role, blocks=blocks), state, **more)


def rules(**changes) -> Rules:
    return Rules.of(RouterConfig(**changes))


def ask(tokens: int = 200, **known: int) -> Ask:
    return Ask(MODEL.fingerprint, tokens, {WorkerId(name): held for name, held in known.items()})


def names(placement) -> tuple[str, str | None]:
    prefill = placement.prefill
    return placement.decode.facts.id, None if prefill is None else prefill.facts.id


def test_a_long_prompt_goes_to_a_pair() -> None:
    placement = place([view("d", D), view("p", P)], ask(), rules())
    assert names(placement) == ("d", "p")
    assert placement.skip is None
    assert placement.uncached == 200


@pytest.mark.parametrize("strict", [False, True])
def test_little_uncached_is_read_where_it_is_answered_also_in_strict_mode(strict: bool) -> None:
    cluster = [view("d", D), view("p", P)]
    chosen = rules(skip_handoff_tokens=64, strict=strict)
    assert place(cluster, ask(200, d=136), chosen).skip is Skip.LITTLE_UNCACHED
    assert place(cluster, ask(200, d=132), chosen).skip is None


def test_the_last_token_is_never_cached() -> None:
    whole = place([view("d", D), view("p", P)], ask(200, d=200), rules(skip_handoff_tokens=0))
    assert names(whole) == ("d", "p")


def test_without_a_prefill_worker_decode_reads_or_strict_refuses() -> None:
    for state in (WorkerState.SUSPECT, WorkerState.DEAD, WorkerState.DRAINING):
        cluster = [view("d", D), view("p", P, state)]
        assert place(cluster, ask(), rules()).skip is Skip.NO_PREFILL_WORKER
        with pytest.raises(NoWorker, match="strict"):
            place(cluster, ask(), rules(strict=True))


def test_mixed_workers_read_themselves_also_in_strict_mode() -> None:
    placement = place([view("m", M)], ask(), rules(strict=True))
    assert names(placement) == ("m", None)
    assert placement.skip is Skip.MIXED_WORKER


def test_a_busy_pair_yields_to_an_idle_mixed_worker_and_the_other_way_round() -> None:
    busy = Load(running=8, waiting_tokens=4000)
    for policy in ("least_loaded", "prefix"):
        chosen = rules(policy=policy)
        cluster = [view("d", D), view("m", M), view("p", P, load=busy)]
        assert names(place(cluster, ask(), chosen)) == ("m", None)
        cluster = [view("d", D), view("m", M, load=busy), view("p", P)]
        assert names(place(cluster, ask(), chosen)) == ("d", "p")


def test_round_robin_takes_turns() -> None:
    cluster = [view(f"d{i}", D) for i in range(3)] + [view(f"p{i}", P) for i in range(2)]
    seen = [
        names(place(cluster, replace(ask(), turn=turn), rules(policy="round_robin")))
        for turn in range(6)
    ]
    assert sorted(decode for decode, _ in seen) == ["d0", "d0", "d1", "d1", "d2", "d2"]
    assert {prefill for _, prefill in seen} == {"p0", "p1"}


def test_equals_take_turns_under_every_policy() -> None:
    cluster = [view("d0", D), view("d1", D), view("p0", P), view("p1", P)]
    for policy in ("round_robin", "least_loaded", "prefix"):
        seen = {
            names(place(cluster, replace(ask(), turn=turn), rules(policy=policy)))
            for turn in range(4)
        }
        assert {decode for decode, _ in seen} == {"d0", "d1"}, policy
        assert {prefill for _, prefill in seen} == {"p0", "p1"}, policy


def test_what_the_router_sent_counts_before_any_heartbeat_tells() -> None:
    cluster = [view("d0", D, in_flight=1), view("d1", D), view("p0", P, pending_tokens=500)]
    cluster.append(view("p1", P))
    for turn in range(4):
        placement = place(cluster, replace(ask(), turn=turn), rules(policy="least_loaded"))
        assert names(placement) == ("d1", "p1")


def test_prefix_weighs_cached_tokens_against_waiting_ones() -> None:
    chosen = rules(policy="prefix", prefix_load_weight=1.0)
    for waiting, expect in ((100, "d0"), (500, "d1")):
        cluster = [view("d0", D, load=Load(waiting_tokens=waiting)), view("d1", D), view("p", P)]
        assert place(cluster, ask(390, d0=380), chosen).decode.facts.id == expect
    heedless = rules(policy="prefix", prefix_load_weight=0.0)
    assert place(cluster, ask(390, d0=380), heedless).decode.facts.id == "d0"


def test_prefix_finds_the_prefill_worker_that_read_it_before() -> None:
    cluster = [view("d", D), view("p0", P), view("p1", P)]
    for turn in range(3):
        placement = place(cluster, replace(ask(300, p1=200), turn=turn), rules(policy="prefix"))
        assert names(placement) == ("d", "p1")
        assert placement.uncached == 100


def test_other_fingerprints_are_never_paired() -> None:
    stranger = view("p", P)
    model = replace(MODEL, fingerprint=Fingerprint(b"x" * 32))
    stranger = replace(stranger, facts=replace(stranger.facts, model=model))
    assert place([view("d", D), stranger], ask(), rules()).skip is Skip.NO_PREFILL_WORKER
    with pytest.raises(NoWorker):
        place([view("d", D)], replace(ask(), fingerprint=Fingerprint(b"x" * 32)), rules())


def test_failed_workers_come_last_but_do_come() -> None:
    d0, d1, p0, p1 = view("d0", D), view("d1", D), view("p0", P), view("p1", P)
    failed = frozenset({d0.facts.incarnation, p0.facts.incarnation})
    for turn in range(4):
        again = replace(ask(), failed=failed, turn=turn)
        assert names(place([d0, d1, p0, p1], again, rules())) == ("d1", "p1")
        assert names(place([d0, p0], again, rules())) == ("d0", "p0")


def test_prefill_given_up() -> None:
    given_up = replace(ask(), prefill_given_up=True)
    assert place([view("d", D), view("p", P)], given_up, rules()).skip is Skip.PREFILL_FAILED


def test_force_pair_hands_over_however_little_there_is() -> None:
    forced = replace(ask(2), force_pair=True)
    assert names(place([view("d", D), view("p", P), view("m", M)], forced, rules())) == ("d", "p")
    assert place([view("d", D)], forced, rules()).skip is Skip.NO_PREFILL_WORKER
    with pytest.raises(NoWorker):
        place([view("d", D)], forced, rules(strict=True))


def test_a_prompt_that_no_pool_could_hold_is_refused_for_good() -> None:
    cluster = [view("d0", D, blocks=10), view("d1", D, blocks=20), view("p", P)]
    assert place(cluster, ask(20 * BLOCK - 1), rules()).decode.facts.id == "d1"
    with pytest.raises(ContextTooLong) as caught:
        place(cluster, ask(20 * BLOCK), rules())
    assert caught.value.param == "prompt"
    # Also while the workers are busy coming up: it is as true then.
    starting = [replace(one, state=WorkerState.STARTING) for one in cluster]
    with pytest.raises(ContextTooLong):
        place(starting, ask(20 * BLOCK), rules())


def test_a_prefill_pool_that_is_too_small_is_said() -> None:
    cluster = [view("d", D), view("p", P, blocks=2)]
    assert place(cluster, ask(), rules()).skip is Skip.PREFILL_POOL_TOO_SMALL


def test_hope_is_for_the_role_that_is_missing() -> None:
    dead_p, dead_d = view("p", P, WorkerState.DEAD), view("d", D, WorkerState.DEAD)
    strict = rules(strict=True)
    assert hope([view("d", D), dead_p], ask(), strict, restarts=True)
    assert not hope([view("d", D), dead_p], ask(), strict, restarts=False)
    assert hope([dead_d, view("p", P)], ask(), rules(), restarts=True)
    assert not hope([view("p", P), dead_p], ask(), rules(), restarts=True)
    assert hope([view("d", D, WorkerState.SUSPECT)], ask(), rules(), restarts=False)
    assert not hope([], ask(), rules(), restarts=True)


workers = st.builds(
    lambda role, state, blocks, running, waiting, sent: view(
        "",
        role,
        state,
        blocks=blocks,
        load=Load(running=running, waiting_tokens=waiting),
        in_flight=sent,
    ),
    st.sampled_from(Role),
    st.sampled_from(WorkerState),
    st.integers(1, 200),
    st.integers(0, 50),
    st.integers(0, 5000),
    st.integers(0, 50),
)


@given(
    cluster=st.lists(workers, max_size=6),
    tokens=st.integers(1, 900),
    held=st.lists(st.integers(0, 1000), min_size=6, max_size=6),
    policy=st.sampled_from(["round_robin", "least_loaded", "prefix"]),
    strict=st.booleans(),
    force=st.booleans(),
    turn=st.integers(0, 10),
)
def test_laws(cluster, tokens, held, policy, strict, force, turn) -> None:
    """Whoever is chosen is ready, in a fitting role, large enough; and refusals are deserved."""
    cluster = [
        replace(one, facts=replace(one.facts, id=WorkerId(f"w{i}")))
        for i, one in enumerate(cluster)
    ]
    known = {one.facts.id: held[i] for i, one in enumerate(cluster)}
    question = Ask(MODEL.fingerprint, tokens, known, force_pair=force, turn=turn)
    chosen = rules(policy=policy, strict=strict)
    fit = [
        one
        for one in cluster
        if one.state is WorkerState.READY and tokens < one.facts.blocks_total * BLOCK
    ]
    roles = {one.facts.role for one in fit}
    try:
        placement = place(cluster, question, chosen)
    except ContextTooLong:
        assert not roles & {D, M}
        return
    except NoWorker:
        assert M not in roles
        assert D not in roles or (strict and P not in roles)
        return
    assert placement == place(cluster, question, chosen)
    assert placement.decode in fit
    assert placement.decode.facts.role is not P
    assert (placement.prefill is None) == (placement.skip is not None)
    if placement.prefill is not None:
        assert placement.prefill in fit
        assert placement.prefill.facts.role is P
        assert placement.decode.facts.role is D
    elif force and {P, D} <= roles:
        pytest.fail("a pair was possible and asked for")
    assert placement.uncached == max(1, tokens - known[placement.reader.facts.id])
