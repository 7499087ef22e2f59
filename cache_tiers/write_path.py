"""Copies finished blocks to the slower tiers, off the token path.

    writer thread:  pinned blocks -> host tier, and one copy aside for Redis -> Unpin
    sender thread:  copies aside -> what Redis lacks -> Redis     (cache_tiers/send_path.py)

Blocks that a peer computed and handed over go to the host tier alone: the peer writes them to
Redis. Should it fail to, a later reader misses them.
No block stays pinned while bytes travel. Both threads work strictly in order, so a forget or a
clear that comes after a write-back acts after it. What does not fit (too many blocks pinned, too
many bytes aside) is dropped, newest first, and counted: a tier is never worth a wait.
"""

from __future__ import annotations

import threading

from cache_tiers.fence import ForgetFence
from cache_tiers.host import HostTier
from cache_tiers.send_path import SendPath
from cache_tiers.spans import PoolSpans, Spans
from cache_tiers.workers import Workers
from cache_tiers.write_jobs import (
    Clearing,
    Deletion,
    Save,
    Send,
    UnpinSink,
    WriteCounts,
)
from pdserve.engine.api import Unpin, WriteBack
from pdserve.errors import TierError
from pdserve.types import BlockKey, Tier


class WritePath:
    """Thread-safe. Every ``save`` ends with one call of its ``done``."""

    def __init__(
        self,
        host: HostTier | None,
        sender: SendPath | None,
        fence: ForgetFence,
        pool: PoolSpans,
        pinned_blocks_max: int,
    ) -> None:
        """``sender``: to Redis, if there is one. It is stopped and joined with this path."""
        self._host = host
        self._sender = sender
        self._fence = fence
        self._pool = pool
        self._pinned_max = pinned_blocks_max
        self._lock = threading.Lock()
        self._jobs = 0
        self._dropped_jobs = 0
        self._uncopied = 0  # blocks that Redis was to get, and of which no copy was tried
        self._pinned = 0
        self._writer: Workers[Save | Deletion | Clearing] = Workers("tier-write", 1, self._write)

    def save(self, job: WriteBack, done: UnpinSink) -> None:
        """Does not block. ``done`` is called on a thread of this path, or here if it is dropped."""
        if job.from_peer and self._host is None:
            done(Unpin(job.ticket))
            return
        with self._lock:
            fits = self._pinned == 0 or self._pinned + len(job.blocks) <= self._pinned_max
            self._pinned += len(job.blocks) if fits else 0
            self._jobs += 1
        if fits and self._writer.post(Save(job, done)):
            return
        self._drop(job, done, was_pinned=fits)

    def forget(self, keys: tuple[BlockKey, ...]) -> None:
        """The keys are fenced already; the fence falls when no tier holds them."""
        self._writer.post(Deletion(keys))

    def clear(self, clearing: Clearing) -> None:
        if not self._writer.post(clearing):
            clearing.fail(TierError("the tiers are closed"))

    def wait_idle(self, deadline: float) -> bool:
        return self._writer.wait_idle(deadline) and (
            self._sender is None or self._sender.wait_idle(deadline)
        )

    def hurry(self) -> None:
        """From now on nothing is sent slowly."""
        if self._sender is not None:
            self._sender.hurry()

    def counts(self) -> WriteCounts:
        sender = self._sender
        with self._lock:
            return WriteCounts(
                jobs=self._jobs,
                dropped_jobs=self._dropped_jobs,
                unsent_blocks=self._uncopied + (sender.unsent_blocks if sender else 0),
                waiting_blocks=sender.waiting_blocks if sender else 0,
                undeleted_keys=sender.undeleted_keys if sender else 0,
            )

    @property
    def failures(self) -> int:
        return self._writer.failures + (self._sender.failures if self._sender else 0)

    def stop(self) -> None:
        """Takes nothing more; what was not begun is unpinned without a copy."""
        left_over: list[Save | Send | Deletion | Clearing] = [*self._writer.stop()]
        if self._sender is not None:
            left_over += self._sender.stop()
        for job in left_over:
            if isinstance(job, Save):
                self._drop(job.job, job.done, was_pinned=True)
            elif isinstance(job, Clearing):
                job.fail(TierError("the tiers were closed"))

    def join(self, deadline: float) -> None:
        self._writer.join(deadline)
        if self._sender is not None:
            self._sender.join(deadline)

    # ---- the writer's thread ---------------------------------------------------------------------

    def _write(self, job: Save | Deletion | Clearing) -> None:
        if isinstance(job, Save):
            self._write_back(job)
        elif isinstance(job, Deletion):
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

    def _write_back(self, save: Save) -> None:
        job = save.job
        aside: Send | None = None
        try:
            spans = self._keep(job)
            if self._sender is not None and not job.from_peer:
                aside = self._sender.set_aside(job.keys, spans)
        finally:
            # From here on no byte of the blocks is read.
            self._unpinned(job)
            save.done(Unpin(job.ticket))
        if self._sender is not None and aside is not None:
            self._sender.post(aside)

    def _keep(self, job: WriteBack) -> Spans:
        try:
            spans = self._pool.of(job.blocks)
            if self._host is not None:
                self._host.keep(job.keys, spans)
        except BaseException:
            self._count_uncopied(job)
            raise
        return spans

    # ---- counting --------------------------------------------------------------------------------

    def _drop(self, job: WriteBack, done: UnpinSink, was_pinned: bool) -> None:
        if was_pinned:
            self._unpinned(job)
        with self._lock:
            self._dropped_jobs += 1
        self._count_uncopied(job)
        done(Unpin(job.ticket))

    def _count_uncopied(self, job: WriteBack) -> None:
        if self._sender is not None and not job.from_peer:
            with self._lock:
                self._uncopied += len(job.blocks)

    def _unpinned(self, job: WriteBack) -> None:
        with self._lock:
            self._pinned -= len(job.blocks)
