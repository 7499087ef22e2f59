"""Where a request's time went: phases, each recorded once, wherever it was spent.

    recorder.add(phase) ...     bounded, whatever the length of the stream
    recorder.take()             all that was recorded since the last take

This is the one source of timing for a request's page in the router and for its trace. Phases are
recorded in workers and router alike, at moments of time.monotonic(); what leaves a process is the
wall clock's, by one offset (pdserve/telemetry/wall_clock.py), so that phases of a process do not
contradict each other unless the clock is set meanwhile. Phases of different hosts are as far apart
as their clocks.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pdserve.telemetry.wall_clock import WallClock
from pdserve.types import Tier, Transport

_CLOCK = WallClock()
# Of one name in one recorder; later ones are merged into the last.
PHASES_PER_NAME = 32


class PhaseName(enum.Enum):
    # The router's; one after the other.
    PREPARE = "prepare"  # validation and tokens
    PLACE = "place"  # until workers were found
    ATTEMPT = "attempt"  # on one choice of workers
    RECOVER = "recover"  # after an attempt that failed, until the next may begin
    # The workers', within an attempt.
    PREFILL = "prefill"  # the prompt's way through the worker that reads it
    QUEUE = "queue"  # until the engine had blocks for the sequence
    TIER_READ = "tier_read"
    CHUNK = "chunk"  # one step's computing of prompt tokens
    GRANT = "grant"  # from the prefill worker's start to the decode worker's grant
    TRANSFER = "transfer"
    DECODE = "decode"  # from the first token here to the end
    PREEMPTED = "preempted"  # from losing its blocks to getting blocks again


def unix_ns(moment: float) -> int:
    """``moment`` of this process's time.monotonic(), as nanoseconds since 1970."""
    return _CLOCK.unix_ns(moment)


@dataclass(frozen=True, slots=True)
class Phase:
    """Zero and empty say nothing; which attributes a name has is in docs/observability.md."""

    name: PhaseName
    start_ns: int  # since 1970
    duration_ns: int
    who: str = ""  # worker id, or "router"
    attempt: int = 0  # counted from 1, by the router
    tokens: int = 0
    bytes: int = 0
    blocks: int = 0
    tier: Tier | None = None
    transport: Transport | None = None
    reason: str = ""
    prefill_worker: str = ""
    decode_worker: str = ""
    merged: int = 0  # further phases of this name that it stands for

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.duration_ns

    def attributes(self) -> dict[str, str | int]:
        """Those that say something, by name."""
        named: dict[str, str | int] = {name: getattr(self, name) for name in _PLAIN}
        named["tier"] = "" if self.tier is None else self.tier.value
        named["transport"] = "" if self.transport is None else self.transport.value
        return {name: value for name, value in named.items() if value}


_PLAIN = (
    *("attempt", "tokens", "bytes", "blocks", "reason"),
    *("prefill_worker", "decode_worker", "merged"),
)


def between(
    name: PhaseName, start: float, end: float, **what: int | str | Tier | Transport | None
) -> Phase:
    """A phase between two moments of time.monotonic()."""
    took = max(0, round((end - start) * 1e9))
    return replace(Phase(name, unix_ns(start), took), **what)  # type: ignore[arg-type]


class Recorder:
    """Phases in the order in which they ended. Whoever made it owns it; one thread."""

    __slots__ = ("_counts", "_last", "phases")

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._counts: dict[PhaseName, int] = {}
        self._last: dict[PhaseName, int] = {}  # where in ``phases``

    def add(self, phase: Phase) -> None:
        count = self._counts[phase.name] = self._counts.get(phase.name, 0) + 1
        last = self._last.get(phase.name)
        if count > PHASES_PER_NAME and last is not None:
            self.phases[last] = _merge(self.phases[last], phase)
            return
        self._last[phase.name] = len(self.phases)
        self.phases.append(phase)

    def extend(self, phases: Iterable[Phase]) -> None:
        for phase in phases:
            self.add(phase)

    def take(self) -> tuple[Phase, ...]:
        """Forgets what it gives; the bound goes on counting."""
        taken = tuple(self.phases)
        self.phases.clear()
        self._last.clear()
        return taken


def _merge(into: Phase, phase: Phase) -> Phase:
    start = min(into.start_ns, phase.start_ns)
    return replace(
        into,
        start_ns=start,
        duration_ns=max(into.end_ns, phase.end_ns) - start,
        tokens=into.tokens + phase.tokens,
        bytes=into.bytes + phase.bytes,
        blocks=into.blocks + phase.blocks,
        merged=into.merged + phase.merged + 1,
    )
