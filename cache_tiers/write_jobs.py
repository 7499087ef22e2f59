"""What the two threads of a write-back are given, what bounds them, and what they count."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.engine.api import Unpin, WriteBack
from pdserve.errors import TierError
from pdserve.types import BlockKey, Tier

UnpinSink = Callable[[Unpin], None]


@dataclass(frozen=True, slots=True)
class WriteLimits:
    pinned_blocks: int = 1024  # waiting for the writer thread
    aside_bytes: int = 128 << 20  # copied and waiting for Redis
    piece_bytes: int = 1 << 19  # sent at once, but at least a block
    pause_s: float = 0.01  # between two pieces; 0: no pieces
    patience_s: float = 1.0  # of a job, for moments in which nobody computes


@dataclass(frozen=True, slots=True)
class WriteCounts:
    """Since the worker started, but for what is there now."""

    jobs: int = 0
    dropped_jobs: int = 0  # unpinned without a copy
    # That Redis was to get: no room, a failure, or the end came first. At most: of a job that broke
    # Redis may hold some, and did not say so.
    unsent_blocks: int = 0
    waiting_blocks: int = 0  # copied for Redis and not sent, now
    undeleted_keys: int = 0  # forgotten, but still in a Redis that does not answer, now


@dataclass(frozen=True, slots=True)
class Save:
    job: WriteBack
    done: UnpinSink


@dataclass(frozen=True, slots=True)
class Deletion:
    """Of keys that were fenced; the fence falls with it."""

    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Clearing:
    """A clear under way; ``ended`` is set once it is done, with ``errors`` if it failed."""

    tiers: frozenset[Tier]
    ended: threading.Event = field(default_factory=threading.Event)
    errors: list[TierError] = field(default_factory=list)
    blocks: dict[Tier, int] = field(default_factory=dict)  # that each tier lost

    def fail(self, error: TierError) -> None:
        self.errors.append(error)
        self.ended.set()


@dataclass(frozen=True, slots=True)
class Send:
    keys: tuple[BlockKey, ...]
    rows: tuple[int, ...]  # of the copies, one for each key
    due: float  # time.monotonic() at which the job's patience is over
