"""Who is added and who leaves when the pools change, and which changes are refused."""

from __future__ import annotations

import random
import re

import pytest

from pdserve.cluster.sizes import (
    Bounds,
    Change,
    Member,
    PoolRules,
    check_idle,
    check_remove,
    plan_resize,
    sizes,
)
from pdserve.config_load import load_config
from pdserve.errors import NotAllowed
from pdserve.types import Duty, Role, WorkerId

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
RULES = PoolRules({role: Bounds(0, 4) for role in Role}, strict=False)
STRICT = PoolRules(RULES.bounds, strict=True)


def members(text: str) -> dict[WorkerId, Member]:
    """``prefill-0 decode-1!`` : the second one is drained."""
    found = {}
    for word in text.split():
        name, drained = word.rstrip("!"), word.endswith("!")
        role = Role(name.rpartition("-")[0])
        found[WorkerId(name)] = Member(role, Duty.DRAIN if drained else Duty.SERVE)
    return found


def test_growth_takes_the_lowest_free_numbers() -> None:
    change = plan_resize(members("prefill-1 decode-0"), {P: 3, D: 2}, RULES)
    assert change == Change(add=(("prefill-0", P), ("prefill-2", P), ("decode-1", D)))


def test_a_pool_shrinks_by_its_drained_workers_and_then_by_its_highest_numbers() -> None:
    have = members("prefill-0 decode-0! decode-2 decode-10 decode-3")
    assert plan_resize(have, {D: 3}, RULES) == Change(remove=(WorkerId("decode-0"),))
    gone = plan_resize(have, {D: 1}, RULES).remove
    assert gone == ("decode-0", "decode-10", "decode-3")


def test_the_same_size_again_is_no_change() -> None:
    have = members("prefill-0 decode-0 decode-1!")
    assert plan_resize(have, {P: 1, D: 2}, RULES) == Change()
    assert plan_resize(have, {}, RULES) == Change()


@pytest.mark.parametrize(
    ("have", "wanted", "rules", "text"),
    [
        ("decode-0", {D: 5}, RULES, "decode = 5: allowed are 0 to 4 (pools.decode_min"),
        ("prefill-0 decode-0", {D: 0}, RULES, "somebody must write the answers"),
        ("prefill-0 decode-0", {P: 0}, STRICT, "router.strict refuses every request"),
        ("decode-0 decode-1!", {D: 1, P: 0}, STRICT, "router.strict"),
        ("mixed-0", {M: 0}, RULES, "somebody must write the answers"),
    ],
)
def test_what_is_refused_says_what_is_allowed(
    have: str, wanted: dict[Role, int], rules: PoolRules, text: str
) -> None:
    with pytest.raises(NotAllowed, match=re.escape(text)):
        plan_resize(members(have), wanted, rules)


def test_nobody_leaves_whose_work_nobody_could_take_over() -> None:
    have = members("prefill-0 decode-0 decode-1!")
    with pytest.raises(NotAllowed, match="decode-0: no other decode or mixed worker takes work"):
        check_idle(have, [WorkerId("decode-0")], RULES)
    check_idle(have, [WorkerId("decode-1")], RULES)
    check_idle(have, [WorkerId("prefill-0")], RULES)
    with pytest.raises(NotAllowed, match=r"router\.strict needs a prefill worker"):
        check_idle(have, [WorkerId("prefill-0")], STRICT)
    check_idle(members("mixed-0 prefill-0 decode-0"), [WorkerId("prefill-0")], STRICT)
    with pytest.raises(NotAllowed, match="no other decode"):
        check_remove(have, WorkerId("decode-0"), RULES)
    check_remove(have, WorkerId("decode-1"), RULES)
    floor = PoolRules({**RULES.bounds, D: Bounds(2, 4)}, strict=False)
    with pytest.raises(NotAllowed, match="decode = 1: allowed are 2 to 4"):
        check_remove(have, WorkerId("decode-1"), floor)


def test_bounds_come_from_the_configuration() -> None:
    config = load_config(overrides=["pools.decode_min=1", "pools.prefill_max=3"])
    rules = PoolRules.of(config)
    assert (rules.bounds[P], rules.bounds[D]) == (Bounds(0, 3), Bounds(1, 1024))


def test_any_allowed_resize_gives_exactly_the_wanted_sizes() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    have = members("prefill-0 decode-0")
    changed = 0
    for _ in range(300):
        wanted = {role: draw.randrange(0, 6) for role in draw.sample(list(Role), 2)}
        before = sizes(have)
        try:
            change = plan_resize(have, wanted, RULES)
        except NotAllowed:
            continue
        changed += change != Change()
        for worker in change.remove:
            del have[worker]
        for worker, role in change.add:
            assert worker not in have
            have[worker] = Member(role)
        assert sizes(have) == {**before, **wanted}
        assert plan_resize(have, wanted, RULES) == Change()
    assert changed > 50
