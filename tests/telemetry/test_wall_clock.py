"""Moments get the wall's time, also after it was set and after the machine slept."""

from __future__ import annotations

from pdserve.telemetry.wall_clock import LOOK_EVERY_S, STEP_NS, WallClock

SECOND = 1_000_000_000


class Clocks:
    """Two clocks that a test moves. ``slow``: nanoseconds that pass at each reading."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000 * SECOND
        self.monotonic = 50 * SECOND
        self.slow = 0
        self.read = 0

    def read_wall(self) -> int:
        self.read += 1
        self.pass_ns(self.slow)
        return self.wall

    def read_monotonic(self) -> int:
        self.pass_ns(self.slow)
        return self.monotonic

    def pass_ns(self, time_ns: int) -> None:
        self.wall += time_ns
        self.monotonic += time_ns

    def clock(self) -> WallClock:
        return WallClock(self.read_wall, self.read_monotonic)


def test_a_moment_is_what_the_wall_showed_then() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    assert clock.unix_ns(50.0) == 1_700_000_000 * SECOND
    clocks.pass_ns(3600 * SECOND)
    assert clock.unix_ns(53.0) == 1_700_000_003 * SECOND


def test_a_clock_that_was_set_is_followed() -> None:
    for step in (-3600 * SECOND, 3600 * SECOND, 2 * STEP_NS):
        clocks = Clocks()
        clock = clocks.clock()
        clocks.wall += step
        clocks.pass_ns(int(LOOK_EVERY_S * SECOND))
        assert clock.unix_ns(clocks.monotonic / SECOND) == clocks.wall


def test_what_may_be_the_error_of_looking_changes_nothing() -> None:
    """Else phases of one request would contradict each other for nothing."""
    clocks = Clocks()
    clock = clocks.clock()
    clocks.wall += STEP_NS
    clocks.pass_ns(2 * SECOND)
    assert clock.unix_ns(50.0) == 1_700_000_000 * SECOND
    # On a machine that stands still between two readings more is an error, too.
    clocks.wall += STEP_NS
    clocks.slow = 100 * STEP_NS
    clocks.pass_ns(2 * SECOND)
    assert clock.unix_ns(50.0) == 1_700_000_000 * SECOND


def test_the_wall_is_looked_at_once_in_a_while() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.pass_ns(2 * SECOND)
    clock.unix_ns(50.0)
    read = clocks.read
    for _ in range(100):
        clock.unix_ns(50.0)
    assert clocks.read == read
