"""A circuit breaker: keeps a failing server from costing every caller a time-out.

    CLOSED --(too many failures in the window)--> OPEN --(cooled down, one caller asks)--> HALF_OPEN
    HALF_OPEN --(the probe worked)--> CLOSED,  --(the probe failed)--> OPEN

Every ``ask`` that is not refused is answered by exactly one ``report`` with the permit that it
gave; only the probe's report counts while the breaker is not closed, so a slow call from before
cannot close or prolong it. The clock is the caller's; not thread-safe (the owner locks).
"""

from __future__ import annotations

import enum
from collections import deque

from pdserve.lifecycle import Table

WINDOW_S = 10.0


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerEvent(enum.Enum):
    TRIP = "trip"
    PROBE = "probe"
    PROBE_WORKED = "probe_worked"
    PROBE_FAILED = "probe_failed"


class Permit(enum.Enum):
    NORMAL = "normal"
    PROBE = "probe"
    REFUSED = "refused"


_S, _E = BreakerState, BreakerEvent
BREAKER: Table[BreakerState, BreakerEvent] = Table(
    "breaker",
    {
        (_S.CLOSED, _E.TRIP): _S.OPEN,
        (_S.OPEN, _E.PROBE): _S.HALF_OPEN,
        (_S.HALF_OPEN, _E.PROBE_WORKED): _S.CLOSED,
        (_S.HALF_OPEN, _E.PROBE_FAILED): _S.OPEN,
    },
)


class Breaker:
    def __init__(self, failures: int, open_s: float, window_s: float = WINDOW_S) -> None:
        self._limit = failures
        self._open_s = open_s
        self._window_s = window_s
        self._state = BreakerState.CLOSED
        self._opened_at = 0.0
        self._failures: deque[float] = deque()

    @property
    def state(self) -> BreakerState:
        return self._state

    def would_refuse(self, now: float) -> bool:
        """Whether ``ask`` would refuse; changes nothing."""
        if self._state is BreakerState.OPEN:
            return now - self._opened_at < self._open_s
        return self._state is BreakerState.HALF_OPEN

    def ask(self, now: float) -> Permit:
        if self.would_refuse(now):
            return Permit.REFUSED
        if self._state is BreakerState.OPEN:
            self._move(BreakerEvent.PROBE)
            return Permit.PROBE
        return Permit.NORMAL

    def report(self, permit: Permit, worked: bool, now: float) -> None:
        if permit is Permit.PROBE:
            if worked:
                self._move(BreakerEvent.PROBE_WORKED)
                self._failures.clear()
            else:
                self._move(BreakerEvent.PROBE_FAILED)
                self._opened_at = now
        elif self._state is BreakerState.CLOSED and not worked:
            self._failures.append(now)
            while now - self._failures[0] > self._window_s:
                self._failures.popleft()
            if len(self._failures) >= self._limit:
                self._move(BreakerEvent.TRIP)
                self._opened_at = now

    def _move(self, event: BreakerEvent) -> None:
        self._state = BREAKER.next(self._state, event)
