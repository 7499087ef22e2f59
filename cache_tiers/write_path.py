"""Copies finished blocks to the slower tiers, off the token path.

    writer thread:  pinned blocks -> host tier, and one copy aside for Redis -> Unpin
    sender thread:  copies aside -> what Redis lacks -> Redis

Blocks that a peer computed and handed over go to the host tier alone: the peer writes them to
Redis. Should it fail to, a later reader misses them.
No block stays pinned while bytes travel. Both threads work strictly in order, so a forget or a
clear that comes after a write-back acts after it. What does not fit (too many blocks pinned, too
many bytes aside) is dropped, newest first, and counted: a tier is never worth a wait.
Where the engines compute on the cores that send to Redis, a job is sent piece by piece, each when
nobody computes, if there is such a moment soon: all at once, it would hold up the step that writes
the answer's second token. What is left of it goes at once when something else is to be sent, when
half the room for copies is taken, and at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cache_tiers.aside import Aside
from cache_tiers.fence import ForgetFence
from cache_tiers.host import HostTier
from cache_tiers.redis_tier import RedisTier
from cache_tiers.spans import PoolSpans, Spans
from cache_tiers.workers import Workers
from pdserve.engine.api import Unpin, WriteBack
from pdserve.errors import TierError
from pdserve.types import BlockKey, Tier

IDLE_S = 2.0
_UNDELETED_MAX = 65536

UnpinSink = Callable[[Unpin], None]


@dataclass(frozen=True, slots=True)
class WriteLimits:
    pinned_blocks: int = 1024  # waiting for the writer thread
    aside_bytes: int = 128 << 20  # copied and waiting for Redis
    piece_bytes: int = 1 << 19  # sent at once, but at least a block
    pause_s: float = 0.01  # between two pieces; 0: no pieces
    patience_s: float = 1.0  # for moments in which nobody computes, for a job


@dataclass(frozen=True, slots=True)
class WriteCounts:
    jobs: int = 0
    dropped_jobs: int = 0  # unpinned without a copy
    unsent_blocks: int = 0  # kept from Redis by a full queue or a failure
    undeleted_keys: int = 0  # forgotten, but still in a Redis that does not answer


@dataclass(frozen=True, slots=True)
class _Save:
    job: WriteBack
    done: UnpinSink


@dataclass(frozen=True, slots=True)
class _Forget:
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
class _Send:
    keys: tuple[BlockKey, ...]
    rows: tuple[int, ...]  # of the copies, one for each key
    due: float  # time.monotonic() from which on nobody's computing is waited for


class WritePath:
    """Thread-safe. Every ``save`` ends with one call of its ``done``."""

    def __init__(
        self,
        host: HostTier | None,
        redis: RedisTier | None,
        fence: ForgetFence,
        pool: PoolSpans,
        aside: Aside,
        limits: WriteLimits,
        computing: Callable[[], bool],
    ) -> None:
        """``computing``: whether an engine does now, on the cores that send to Redis."""
        self._computing = computing
        self._host = host
        self._redis = redis
        self._fence = fence
        self._pool = pool
        self._limits = limits
        self._aside = aside
        self._piece = max(1, limits.piece_bytes // aside.span_bytes)
        self._lock = threading.Lock()
        self._counts = WriteCounts()
        self._pinned = 0
        self._hurried = False
        self._undeleted: dict[BlockKey, None] = {}  # the sender thread's own, oldest first
        self._sender: Workers[_Send | _Forget | Clearing] | None = None
        if redis is not None:
            self._sender = Workers("tier-send", 1, self._send, idle=self._tend, idle_s=IDLE_S)
        self._writer: Workers[_Save | _Forget | Clearing] = Workers("tier-write", 1, self._write)

    def save(self, job: WriteBack, done: UnpinSink) -> None:
        """Does not block. ``done`` is called on a thread of this path, or here if it is dropped."""
        if job.from_peer and self._host is None:
            done(Unpin(job.ticket))
            return
        with self._lock:
            fits = self._pinned == 0 or (
                self._pinned + len(job.blocks) <= self._limits.pinned_blocks
            )
            if fits:
                self._pinned += len(job.blocks)
            self._count(jobs=1, dropped_jobs=0 if fits else 1)
        if fits and self._writer.post(_Save(job, done)):
            return
        if fits:
            self._unpinned(job)
        done(Unpin(job.ticket))

    def forget(self, keys: tuple[BlockKey, ...]) -> None:
        """The keys are fenced already; the fence falls when no tier holds them."""
        self._writer.post(_Forget(keys))

    def clear(self, clearing: Clearing) -> None:
        if not self._writer.post(clearing):
            clearing.fail(TierError("the tiers are closed"))

    def wait_idle(self, deadline: float) -> bool:
        return self._writer.wait_idle(deadline) and (
            self._sender is None or self._sender.wait_idle(deadline)
        )

    def hurry(self) -> None:
        """From now on nothing is sent slowly."""
        self._hurried = True
        if self._sender is not None:
            self._sender.hurry()

    def counts(self) -> WriteCounts:
        with self._lock:
            return self._counts

    @property
    def failures(self) -> int:
        return self._writer.failures + (self._sender.failures if self._sender else 0)

    def stop(self) -> None:
        """Takes nothing more; what was not begun is unpinned without a copy."""
        left_over: list[_Save | _Send | _Forget | Clearing] = [*self._writer.stop()]
        if self._sender is not None:
            left_over += self._sender.stop()
        for job in left_over:
            if isinstance(job, _Save):
                self._unpinned(job.job)
                job.done(Unpin(job.job.ticket))
            elif isinstance(job, Clearing):
                job.fail(TierError("the tiers were closed"))

    def join(self, deadline: float) -> None:
        self._writer.join(deadline)
        if self._sender is not None:
            self._sender.join(deadline)
        self._aside.close()

    # ---- the writer's thread ---------------------------------------------------------------------

    def _write(self, job: _Save | _Forget | Clearing) -> None:
        if isinstance(job, _Save):
            self._write_back(job)
        elif isinstance(job, _Forget):
            if self._host is not None:
                self._host.delete(job.keys)
            if self._sender is None or not self._sender.post(job):
                self._fence.end(job.keys)
        else:
            if self._host is not None and Tier.HOST in job.tiers:
                job.blocks[Tier.HOST] = self._host.clear()
            if self._sender is None or Tier.REDIS not in job.tiers:
                job.ended.set()
            elif not self._sender.post(job):
                job.fail(TierError("the tiers were closed"))

    def _write_back(self, save: _Save) -> None:
        job = save.job
        aside: _Send | None = None
        try:
            spans = self._pool.of(job.blocks)
            if self._host is not None:
                self._host.keep(job.keys, spans)
            if not job.from_peer:
                aside = self._set_aside(job.keys, spans)
        finally:
            # From here on no byte of the blocks is read.
            self._unpinned(job)
            save.done(Unpin(job.ticket))
        if aside is not None and (self._sender is None or not self._sender.post(aside)):
            self._drop_aside(aside)

    def _set_aside(self, keys: Sequence[BlockKey], spans: Spans) -> _Send | None:
        """One copy of as many leading blocks as there is room for."""
        if self._redis is None:
            return None
        refused = self._redis.refuses_writes()
        rows = [] if refused else self._aside.take(len(keys))
        if self._sender is not None and not refused and self._aside.scarce:
            self._sender.hurry()
        with self._lock:
            self._count(unsent_blocks=len(keys) - len(rows))
        try:
            spans.read({i: self._aside.row(row) for i, row in enumerate(rows)})
        except BaseException:
            self._aside.give_back(rows)
            raise
        due = time.monotonic() + self._limits.patience_s
        return _Send(tuple(keys[: len(rows)]), tuple(rows), due) if rows else None

    # ---- the sender's thread ---------------------------------------------------------------------

    def _send(self, job: _Send | _Forget | Clearing) -> None:
        assert self._redis is not None
        if isinstance(job, _Forget):
            self._delete(job.keys)
        elif isinstance(job, Clearing):
            try:
                job.blocks[Tier.REDIS] = self._redis.clear()
            except TierError as error:
                job.fail(error)
            else:
                job.ended.set()
        else:
            self._put(job)

    def _put(self, job: _Send) -> None:
        assert self._redis is not None
        waiting = dict(zip(job.rows, job.keys, strict=True))  # whose rows were not given back
        try:
            held = self._redis.contains(job.keys)
            needless = [
                row
                for (row, key), is_held in zip(waiting.items(), held, strict=True)
                if not self._wants(key, is_held)
            ]
            self._sent(waiting, needless)
            slowly = self._limits.pause_s > 0
            while waiting:
                slowly = slowly and self._has_moment(job.due)
                rows = list(waiting)[: self._piece if slowly else self._redis.batch_blocks]
                # Asked again: what was forgotten meanwhile need not wait for its deletion.
                piece = [row for row in rows if self._wants(waiting[row], False)]
                keys = [waiting[row] for row in piece]
                self._redis.put(keys, [self._aside.row(row).data for row in piece])
                self._deleted([key for key in keys if key in self._undeleted])
                self._sent(waiting, rows)
                slowly = slowly and bool(waiting) and self._pause()
        except TierError:
            with self._lock:
                self._count(unsent_blocks=len(waiting))
            return
        finally:
            self._sent(waiting, list(waiting))
        if self._undeleted:
            self._delete(())

    def _sent(self, waiting: dict[int, BlockKey], rows: Sequence[int]) -> None:
        for row in rows:
            del waiting[row]
        self._aside.give_back(rows)

    def _has_moment(self, due: float) -> bool:
        """Waits for one. False: there is no time for that."""
        while self._computing() and time.monotonic() < due:
            if not self._pause():
                return False
        return True

    def _pause(self) -> bool:
        """Whether there is still time to pause."""
        sender = self._sender
        return sender is not None and not self._hurried and sender.pause(self._limits.pause_s)

    def _wants(self, key: BlockKey, is_held: bool) -> bool:
        if key in self._undeleted:
            return True  # a new value replaces the suspect one
        return not is_held and not self._fence.is_fenced(key)

    def _delete(self, keys: Sequence[BlockKey]) -> None:
        """Deletes ``keys`` and all that could not be deleted before; keeps what fails again."""
        assert self._redis is not None
        repeated = [key for key in keys if key in self._undeleted]
        self._undeleted.update(dict.fromkeys(keys))
        self._fence.end(repeated)  # one entry of ours stands for one fence
        try:
            self._redis.delete(list(self._undeleted))
        except TierError:
            surplus = list(self._undeleted)[: max(0, len(self._undeleted) - _UNDELETED_MAX)]
            self._deleted(surplus)
        else:
            self._deleted(list(self._undeleted))

    def _deleted(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            del self._undeleted[key]
        self._fence.end(keys)
        with self._lock:
            self._counts = replace(self._counts, undeleted_keys=len(self._undeleted))

    def _tend(self) -> None:
        """With nothing to send: sees whether Redis lives and takes writes; repeats what failed."""
        assert self._redis is not None
        try:
            self._redis.ping()
            if self._redis.writes_in_doubt():
                self._redis.try_write()
        except TierError:
            return  # counted; degraded() tells
        if self._undeleted:
            self._delete(())

    # ---- counting --------------------------------------------------------------------------------

    def _count(self, jobs: int = 0, dropped_jobs: int = 0, unsent_blocks: int = 0) -> None:
        """The caller holds the lock."""
        now = self._counts
        self._counts = replace(
            now,
            jobs=now.jobs + jobs,
            dropped_jobs=now.dropped_jobs + dropped_jobs,
            unsent_blocks=now.unsent_blocks + unsent_blocks,
        )

    def _unpinned(self, job: WriteBack) -> None:
        with self._lock:
            self._pinned -= len(job.blocks)

    def _drop_aside(self, job: _Send) -> None:
        self._aside.give_back(job.rows)
        with self._lock:
            self._count(unsent_blocks=len(job.keys))
