"""The breaker opens after enough failures in the window, and lets exactly one probe through."""

from __future__ import annotations

import pytest

from cache_tiers.breaker import BREAKER, Breaker, BreakerEvent, BreakerState, Permit
from pdserve.errors import IllegalTransition


def fail(breaker: Breaker, now: float) -> None:
    permit = breaker.ask(now)
    assert permit is not Permit.REFUSED
    breaker.report(permit, False, now)


def opened() -> Breaker:
    breaker = Breaker(failures=3, open_s=5.0)
    for now in (0.0, 1.0, 2.0):
        fail(breaker, now)
    return breaker


def test_opens_after_the_limit_and_refuses() -> None:
    breaker = opened()
    assert breaker.state is BreakerState.OPEN
    assert breaker.ask(2.1) is Permit.REFUSED
    assert breaker.would_refuse(6.9)


def test_failures_that_are_far_apart_do_not_open_it() -> None:
    breaker = Breaker(failures=3, open_s=5.0)
    for now in (0.0, 6.0, 12.0, 18.0, 24.0):
        fail(breaker, now)
    assert breaker.state is BreakerState.CLOSED


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    breaker = opened()
    assert not breaker.would_refuse(7.1)
    assert breaker.ask(7.1) is Permit.PROBE
    assert breaker.ask(7.2) is Permit.REFUSED
    breaker.report(Permit.PROBE, True, 7.3)
    assert breaker.state is BreakerState.CLOSED
    # Its old failures are forgotten: it takes the full number to open it again.
    fail(breaker, 7.4)
    fail(breaker, 7.5)
    assert breaker.state is BreakerState.CLOSED


def test_a_failed_probe_opens_it_for_the_whole_time_again() -> None:
    breaker = opened()
    assert breaker.ask(7.0) is Permit.PROBE
    breaker.report(Permit.PROBE, False, 8.0)
    assert breaker.ask(12.9) is Permit.REFUSED
    assert breaker.ask(13.0) is Permit.PROBE


def test_a_late_call_from_before_changes_nothing() -> None:
    breaker = Breaker(failures=1, open_s=5.0)
    early = [breaker.ask(0.0) for _ in range(3)]
    breaker.report(early[0], False, 0.0)
    assert breaker.ask(6.0) is Permit.PROBE
    breaker.report(early[1], True, 6.1)
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.report(early[2], False, 6.2)
    assert breaker.state is BreakerState.HALF_OPEN


def test_the_table_has_no_other_moves() -> None:
    with pytest.raises(IllegalTransition):
        BREAKER.next(BreakerState.CLOSED, BreakerEvent.PROBE_WORKED)
