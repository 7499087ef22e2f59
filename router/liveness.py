"""What a worker's heartbeats, or their absence, say about it: pure steps over lifecycle.WORKER.

Every function takes a record and returns the next one; the registry owns the current ones. Times
are seconds of one monotonic clock.

A worker is *silent* when nothing was heard for ``dead_after_s`` or its connection broke, and
*stuck* when it says that work is pending while its step counter stood still for ``stuck_after_s``.
Both make it suspect; a heartbeat that shows progress makes it ready again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pdserve.config import TimersConfig
from pdserve.lifecycle import WORKER, WorkerEvent
from pdserve.types import Duty, Load, WorkerFacts, WorkerState


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One incarnation of one worker, as last heard of."""

    facts: WorkerFacts
    state: WorkerState
    heard_at: float
    # When the step counter last moved or nothing was pending.
    progress_at: float
    load: Load = Load()
    died_at: float = 0.0
    duty: Duty = Duty.SERVE

    @property
    def drains(self) -> bool:
        """Whether its owner or the worker itself wants no new work there."""
        return self.duty is not Duty.SERVE or self.load.draining


def new_record(facts: WorkerFacts, now: float, duty: Duty = Duty.SERVE) -> WorkerRecord:
    return WorkerRecord(facts, WorkerState.STARTING, heard_at=now, progress_at=now, duty=duty)


def told(record: WorkerRecord, duty: Duty) -> WorkerRecord:
    """Its owner says what it wants of it; one that is not heard now follows when it is."""
    if record.duty is duty:
        return record
    return _drained(replace(record, duty=duty))


def _drained(record: WorkerRecord) -> WorkerRecord:
    if record.drains and record.state is WorkerState.READY:
        return _step(record, WorkerEvent.DRAIN)
    if not record.drains and record.state is WorkerState.DRAINING:
        return _step(record, WorkerEvent.UNDRAIN)
    return record


def _step(record: WorkerRecord, event: WorkerEvent) -> WorkerRecord:
    state = WORKER.next(record.state, event)
    return record if state is record.state else replace(record, state=state)


def heard(record: WorkerRecord, load: Load, now: float, timers: TimersConfig) -> WorkerRecord:
    """A heartbeat of this incarnation arrived. Not for dead workers."""
    # Compared by inequality: a counter that starts again is progress as well.
    moved = not load.work_pending or load.engine_steps != record.load.engine_steps
    progress_at = now if moved else record.progress_at
    record = replace(record, load=load, heard_at=now, progress_at=progress_at)
    if now - progress_at > timers.stuck_after_s:
        return _step(record, WorkerEvent.NO_PROGRESS)
    return _drained(_step(record, WorkerEvent.HEARTBEAT))


def checked(record: WorkerRecord, now: float, timers: TimersConfig) -> WorkerRecord:
    """Time passed; a worker that said nothing for too long becomes suspect."""
    if record.state is WorkerState.DEAD or now - record.heard_at <= timers.dead_after_s:
        return record
    return _step(record, WorkerEvent.SILENT)


def forgiven(record: WorkerRecord, stall: float) -> WorkerRecord:
    """The router itself stood still for ``stall`` seconds and could hear nobody."""
    return replace(record, heard_at=record.heard_at + stall, progress_at=record.progress_at + stall)


def unreachable(record: WorkerRecord) -> WorkerRecord:
    """Its connection broke or was refused."""
    if record.state is WorkerState.DEAD:
        return record
    return _step(record, WorkerEvent.SILENT)


def gone(record: WorkerRecord, now: float) -> WorkerRecord:
    """Its owner says that the process is no more."""
    if record.state is WorkerState.DEAD:
        return record
    return replace(_step(record, WorkerEvent.GONE), died_at=now)
