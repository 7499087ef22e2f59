"""What a cluster falls short of, by what was observed, and what strict mode makes of it."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from router_harness import Core, core, drive, settings, until
from scripted_worker import facts

from cache_tiers.kv_events import KvEventPublisher
from pdserve.config import CacheConfig, Config, TimersConfig
from pdserve.faults import Action, Fault, Step, board
from pdserve.types import Load, Reach, Role, Tier, TierReach, WorkerFacts, WorkerId
from router.separation import Cause, Observed, Shortfall, TierReport, shortfalls

P, D = WorkerId("prefill-0"), WorkerId("decode-0")


def causes(found: tuple[Shortfall, ...]) -> list[Cause]:
    return [one.cause for one in found]


def test_nothing_asked_for_is_nothing_lacking() -> None:
    assert shortfalls(Observed()) == ()
    off = [TierReport(worker, tier, Reach.OFF) for worker in (P, D) for tier in Tier]
    assert shortfalls(Observed(tiers=off)) == ()


def test_each_reason_names_what_is_wrong_and_where() -> None:
    seen = Observed(
        unmoved="prefill_failed",
        tiers=[
            TierReport(P, Tier.REDIS, Reach.NEVER, "redis unreachable"),
            TierReport(D, Tier.REDIS, Reach.UNTRIED),
            TierReport(D, Tier.HOST, Reach.NEVER, "host tier off: one block has 9 bytes"),
        ],
        unheard_s={P: 3.0, D: 11.0},
        unheard_limit_s=10.0,
    )
    found = shortfalls(seen)
    assert [one.text for one in found] == [
        "KV does not move between workers: prefill_failed",
        "the host tier never worked: decode-0 (host tier off: one block has 9 bytes)",
        "the redis tier never worked: prefill-0 (redis unreachable)",
        "the KV events of decode-0 do not come",
    ]
    assert causes(found) == [
        Cause.KV_NOT_MOVED,
        Cause.TIER_UNREACHED,
        Cause.TIER_UNREACHED,
        Cause.EVENTS_UNHEARD,
    ]


@pytest.mark.parametrize("untried_lacks", [False, True])
def test_a_tier_that_anybody_ever_reached_is_no_longer_lacking(untried_lacks: bool) -> None:
    for mine, other in itertools.product(Reach, repeat=2):
        tiers = [TierReport(P, Tier.REDIS, mine), TierReport(D, Tier.REDIS, other)]
        seen = Observed(tiers=tiers, untried_lacks=untried_lacks)
        never = Reach.NEVER in (mine, other) or (untried_lacks and Reach.UNTRIED in (mine, other))
        assert causes(shortfalls(seen)) == [Cause.TIER_UNREACHED] * never
        assert shortfalls(replace(seen, reached=frozenset({Tier.REDIS}))) == ()


@pytest.mark.parametrize(
    ("since", "lacking"), [(0.0, False), (10.0, False), (10.1, True), (math.inf, True)]
)
def test_events_are_missed_after_their_time(since: float, lacking: bool) -> None:
    seen = Observed(unheard_s={D: since}, unheard_limit_s=10.0)
    assert bool(shortfalls(seen)) is lacking


# ---- the same through the router's own parts ----------------------------------------------------


def proven(made: Core, *workers: WorkerFacts, load: Load | None = None) -> None:
    """These workers are ready, and a request went the whole way."""
    made.registry.set_workers(workers)
    for worker in workers:
        made.registry.heard(worker, load or Load())
    made.dispatcher.readiness.proved(True, "")


@pytest.mark.parametrize("strict", [True, False])
def test_only_strict_mode_is_unready_for_a_shortfall(strict: bool) -> None:
    async def story() -> None:
        async with core(settings(strict=strict)) as made:
            bad = Load(reach=TierReach(redis=Reach.NEVER), degraded="redis unreachable")
            workers = (facts("p0", Role.PREFILL), facts("d0"))
            proven(made, *workers, load=bad)
            text = "the redis tier never worked: d0 (redis unreachable), p0 (redis unreachable)"
            assert [one.text for one in made.dispatcher.shortfalls()] == [text]
            assert made.dispatcher.ready() == ((False, text) if strict else (True, ""))
            # It is reached at last, and lost again later: then it is only slower.
            good = Load(reach=TierReach(redis=Reach.REACHED))
            made.registry.heard(workers[0], good)
            assert made.dispatcher.ready() == (True, "")
            made.registry.heard(workers[0], bad)
            assert made.dispatcher.ready() == (True, "")

    drive(story)


@pytest.mark.parametrize("strict", [True, False])
def test_a_control_plane_that_is_away_is_told_and_keeps_nobody_unready(strict: bool) -> None:
    async def story() -> None:
        async with core(settings(strict=strict)) as made:
            proven(made, facts("p0", Role.PREFILL), facts("d0"))
            for away in (True, False):
                made.dispatcher.readiness.control_plane(away=away)
                told = causes(made.dispatcher.shortfalls())
                assert told == [Cause.CONTROL_PLANE_AWAY] * away
                assert made.dispatcher.ready() == (True, "")

    drive(story)


@contextmanager
def publishing(worker: WorkerFacts) -> Iterator[tuple[WorkerFacts, KvEventPublisher]]:
    """The same worker, with events that come."""
    publisher = KvEventPublisher("127.0.0.1")
    addresses = (publisher.address, publisher.replay_address)
    try:
        yield (
            replace(worker, kv_events_address=addresses[0], kv_replay_address=addresses[1]),
            publisher,
        )
    finally:
        board.clear()
        publisher.close()


def strict_with_events(**timers: float) -> Config:
    config = settings(strict=True, timers=TimersConfig(heartbeat_s=0.05, **timers))
    return replace(config, cache=CacheConfig(kv_events=True))


def beat(made: Core, *workers: WorkerFacts) -> tuple[bool, str]:
    """All are heard once more. Whether the router is ready then, or why not."""
    for one in workers:
        made.registry.heard(one, Load())
    return made.dispatcher.ready()


READY = (True, "")


def test_strict_mode_is_not_ready_before_all_events_came_once() -> None:
    async def story() -> None:
        silent = facts("p0", Role.PREFILL)
        with publishing(facts("d0")) as (d0, _), publishing(silent) as (p0, publisher):
            publisher.close()
            async with core(strict_with_events(dead_after_s=5.0)) as made:
                proven(made, d0, p0)
                limit = time.monotonic() + 1.5
                while time.monotonic() < limit:
                    assert beat(made, d0, p0) != READY
                    await asyncio.sleep(0.02)
                assert beat(made, d0, p0)[1] == "the KV events of p0 do not come"

    drive(story)


def test_who_joins_a_ready_cluster_gets_time_for_its_events_until_the_next_proof() -> None:
    async def story() -> None:
        with publishing(facts("d0")) as (d0, _), publishing(facts("p0", Role.PREFILL)) as (p0, _):
            async with core(strict_with_events(dead_after_s=5.0)) as made:
                proven(made, d0, p0)
                await until(lambda: beat(made, d0, p0) == READY)
                joined = replace(p0, id=WorkerId("p1"), incarnation=facts("p1").incarnation)
                board.arm(Fault(Step.KV_REPLAY, Action.HANG, seconds=3.0))
                proven(made, d0, p0, joined)
                assert beat(made, d0, p0, joined) == READY
                made.dispatcher.readiness.proved(False, "the workers that were tested are gone")
                proven(made, d0, p0, joined)
                assert beat(made, d0, p0, joined)[1] == "the KV events of p1 do not come"
                await until(lambda: beat(made, d0, p0, joined) == READY)

    drive(story)


@pytest.mark.parametrize("strict", [True, False])
def test_only_strict_mode_waits_for_a_tier_that_nobody_tried_yet(strict: bool) -> None:
    async def story() -> None:
        async with core(settings(strict=strict)) as made:
            workers = (facts("p0", Role.PREFILL), facts("d0"))
            proven(made, *workers, load=Load(reach=TierReach(redis=Reach.UNTRIED)))
            why = "the redis tier never worked: d0, p0"
            assert made.dispatcher.ready() == ((False, why) if strict else READY)
            made.registry.heard(workers[0], Load(reach=TierReach(redis=Reach.REACHED)))
            assert made.dispatcher.ready() == READY

    drive(story)


def test_quiet_workers_are_not_missed_however_short_the_timers() -> None:
    async def story() -> None:
        with publishing(facts("d0")) as (d0, _), publishing(facts("p0", Role.PREFILL)) as (p0, _):
            async with core(strict_with_events(dead_after_s=0.5)) as made:
                proven(made, d0, p0)
                await until(lambda: beat(made, d0, p0) == READY)
                limit = time.monotonic() + 2.5  # longer than it takes to ask a quiet one
                while time.monotonic() < limit:
                    assert beat(made, d0, p0) == READY
                    await asyncio.sleep(0.02)

    drive(story)


def test_events_that_are_withheld_are_missed_and_forgiven_when_they_come() -> None:
    async def story() -> None:
        with publishing(facts("d0")) as (d0, _):
            p0 = replace(d0, id=P, role=Role.PREFILL, incarnation=facts("p0").incarnation)
            async with core(strict_with_events(dead_after_s=2.6)) as made:
                proven(made, d0, p0)
                await until(lambda: beat(made, d0, p0) == READY)
                board.arm(Fault(Step.KV_REPLAY, Action.HANG, seconds=9.0))
                await until(lambda: beat(made, d0, p0) != READY)
                assert "do not come" in beat(made, d0, p0)[1]
                await until(lambda: beat(made, d0, p0) == READY)

    drive(story)


def test_a_worker_that_publishes_no_events_is_missed_at_once_where_they_are_on() -> None:
    async def story() -> None:
        config = replace(settings(strict=True), cache=CacheConfig(kv_events=True))
        async with core(config) as made:
            proven(made, facts("d0"), facts("p0", Role.PREFILL))
            assert made.dispatcher.ready() == (False, "the KV events of d0, p0 do not come")
        async with core(settings(strict=True)) as made:
            proven(made, facts("d0"), facts("p0", Role.PREFILL))
            assert made.dispatcher.ready() == (True, "")

    drive(story)
