"""What became of requests, and when: the running ones, and the last of those that ended.

    timeline = timelines.open(job)
    timeline.enter(PREPARE) .. enter(PLACE) .. enter(ATTEMPT) .. leave .. enter(RECOVER) ..
    timeline.finish | fail | cancel      the first one counts
    timelines.close(timeline)

The router's own phases follow each other, so each begins where another ends. No timeline holds any
text or token of its request.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

from pdserve.telemetry.timeline import Phase, PhaseName, Recorder, unix_ns
from pdserve.telemetry.trace_context import new_trace
from pdserve.types import FinishReason, Usage
from router.api import Job, Principal

ROUTER = "router"
# Attempts whose workers' phases are kept; a request that takes more keeps the first ones.
MAX_ATTEMPTS = 16


class State(enum.Enum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Timeline:
    """One request. Event loop only; frozen once ``state`` has left RUNNING."""

    def __init__(self, job: Job) -> None:
        begun = job.begun or time.monotonic()
        self.request_id = job.request_id
        self.principal = job.principal
        self.trace = job.trace or new_trace()
        self.started_ns = unix_ns(begun)
        self.ended_ns = 0
        self.state = State.RUNNING
        self.finish_reason: FinishReason | None = None
        self.error = ""  # code of a PdserveError
        self.attempts = 0
        self._usage: Callable[[], Usage] | Usage = Usage(len(job.prompt), len(job.generated))
        self._recorder = Recorder()
        self._of_workers: list[Phase] = []
        self._now: Phase | None = Phase(PhaseName.PREPARE, self.started_ns, 0, ROUTER)

    # ---- what happens ---------------------------------------------------------------------------

    def watch(self, usage: Callable[[], Usage]) -> None:
        """Whoever counts its tokens, asked when somebody looks."""
        if self.state is State.RUNNING:
            self._usage = usage

    def enter(
        self,
        name: PhaseName,
        *,
        prefill_worker: str = "",
        decode_worker: str = "",
    ) -> None:
        self.leave()
        if self.state is not State.RUNNING:
            return
        self.attempts += name is PhaseName.ATTEMPT
        self._now = Phase(
            name,
            unix_ns(time.monotonic()),
            0,
            ROUTER,
            attempt=self.attempts,
            prefill_worker=prefill_worker,
            decode_worker=decode_worker,
        )

    def leave(self, reason: str = "", tokens: int = 0) -> None:
        """Ends the phase that runs; without one, nothing."""
        now, self._now = self._now, None
        if now is not None:
            self._recorder.add(_until(now, unix_ns(time.monotonic()), reason, tokens))

    def add(self, phases: Iterable[Phase]) -> None:
        """What the workers of the attempt that runs have told; bounded by whoever received it."""
        if self.state is State.RUNNING and self.attempts <= MAX_ATTEMPTS:
            self._of_workers.extend(replace(each, attempt=self.attempts) for each in phases)

    def finish(self, reason: FinishReason, usage: Usage) -> None:
        if self.state is State.RUNNING:
            self.finish_reason = reason
            self._usage = usage
            self._end(State.FINISHED)

    def fail(self, code: str) -> None:
        if self.state is State.RUNNING:
            self.error = code
            self._end(State.FAILED)

    def cancel(self) -> None:
        if self.state is State.RUNNING:
            self._end(State.CANCELLED)

    def _end(self, state: State) -> None:
        self.leave(self.error or state.value)
        self._usage = self.usage()  # lets go of the request's log
        self.ended_ns = unix_ns(time.monotonic())
        self.state = state

    # ---- what it looks like ---------------------------------------------------------------------

    def usage(self) -> Usage:
        return self._usage if isinstance(self._usage, Usage) else self._usage()

    def duration_ns(self) -> int:
        """0 where the clock was set back meanwhile."""
        return max(0, (self.ended_ns or unix_ns(time.monotonic())) - self.started_ns)

    def current(self) -> Phase | None:
        """The router's phase that has not ended."""
        if self._now is None:
            return None
        return _until(self._now, unix_ns(time.monotonic()), "", 0)

    def phases(self) -> list[Phase]:
        """All so far, by their beginning; one that runs is as long as it has run."""
        running = self.current()
        found = [*self._recorder.phases, *self._of_workers, *([running] if running else [])]
        return sorted(found, key=lambda phase: phase.start_ns)


def _until(phase: Phase, end_ns: int, reason: str, tokens: int) -> Phase:
    return replace(
        phase,
        duration_ns=max(0, end_ns - phase.start_ns),
        reason=reason or phase.reason,
        tokens=tokens or phase.tokens,
    )


class Timelines:
    """Owner of every timeline that can be looked at. Event loop only."""

    def __init__(self, keep: int, ended: Callable[[Timeline], None] | None = None) -> None:
        """``keep`` ended ones stay; ``ended`` is told of each, and must not block."""
        self._running: dict[Timeline, None] = {}
        self._ended: deque[Timeline] = deque(maxlen=keep)
        self._tell = ended

    def open(self, job: Job) -> Timeline:
        timeline = Timeline(job)
        self._running[timeline] = None
        return timeline

    def close(self, timeline: Timeline) -> None:
        """It has ended. Idempotent."""
        if timeline not in self._running:
            return
        del self._running[timeline]
        self._ended.append(timeline)
        if self._tell is not None:
            self._tell(timeline)

    def newest(self, principal: Principal) -> Iterator[Timeline]:
        """Of this principal: those that run, then those that ended, the latest first."""
        for timeline in chain(reversed(self._running), reversed(self._ended)):
            if timeline.principal == principal:
                yield timeline

    def find(self, request_id: str, principal: Principal) -> Timeline | None:
        """A client may use an id again: the running request of this id, or the latest."""
        same = (each for each in self.newest(principal) if each.request_id == request_id)
        return next(same, None)
