"""The recovery budget alone: a share of the load, a line, and nobody refused."""

from __future__ import annotations

import random

from router.budget import FLOOR, RecoveryBudget


def test_a_share_recovers_and_the_others_line_up() -> None:
    budget: RecoveryBudget[int] = RecoveryBudget(0.2)
    entered = [budget.enter(who, running=100) for who in range(50)]
    assert entered == [True] * 20 + [False] * 30
    assert budget.leave(3, running=100) == [20], "first come, first served"
    assert budget.holds(20)
    assert not budget.holds(21)


def test_few_requests_recover_together() -> None:
    budget: RecoveryBudget[int] = RecoveryBudget(0.2)
    assert [budget.enter(who, running=5) for who in range(5)] == [True] * FLOOR + [False]


def test_one_that_ends_in_the_line_leaves_it() -> None:
    budget: RecoveryBudget[int] = RecoveryBudget(0.2)
    for who in range(8):
        budget.enter(who, running=8)
    assert budget.leave(5, running=7) == []
    assert [budget.leave(who, running=7) for who in range(4)] == [[4], [6], [7], []]


def test_nobody_is_forgotten_and_the_share_is_never_passed() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    budget: RecoveryBudget[int] = RecoveryBudget(0.2)
    running, inside, waiting = 40, set[int](), set[int]()
    for turn in range(3000):
        if rng.random() < 0.5 and turn < 2500:
            who = turn
            (inside if budget.enter(who, running) else waiting).add(who)
            assert len(inside) <= budget.places(running)
        elif inside:
            who = rng.choice(sorted(inside))
            inside.discard(who)
            called = set(budget.leave(who, running))
            assert called <= waiting
            waiting -= called
            inside |= called
            assert len(inside) <= budget.places(running)
        if not inside:
            assert not waiting, "a line before free places"
    while inside:
        who = inside.pop()
        called = set(budget.leave(who, running))
        waiting -= called
        inside |= called
    assert not waiting
