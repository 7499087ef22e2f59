"""A worker's cache tiers below its device pool, as its engine sees them.

    TierRead  -> read        -> reader threads (cache_tiers/read_path.py)  -> TierReadDone
    WriteBack -> write_back  -> writer thread (cache_tiers/write_path.py)  -> Unpin
    suspect blocks -> forget;  a fenced incarnation -> revoke;  Flush -> clear

Every job ends with exactly one call of its ``done``, whatever fails: a tier that does not work
reads as a miss and costs a write-back, never a request. After a job's ``done`` was called, no byte
of its blocks is touched. ``done`` may be called on any thread, also within the call that gives the
job, and must not block. Reads and writes have threads of their own, so that a read never waits
behind a write.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cache_tiers.aside import Aside
from cache_tiers.base import TierStats
from cache_tiers.codec import HEADER_BYTES
from cache_tiers.fence import ForgetFence
from cache_tiers.host import HostTier
from cache_tiers.read_path import ReadPath
from cache_tiers.read_times import ReadTimes
from cache_tiers.redis_tier import RedisTier
from cache_tiers.send_path import SendPath
from cache_tiers.spans import PoolSpans
from cache_tiers.workers import Workers
from cache_tiers.write_jobs import Clearing, UnpinSink, WriteCounts, WriteLimits
from cache_tiers.write_path import WritePath
from pdserve.config import CacheConfig
from pdserve.engine.api import TierRead, TierReadDone, WriteBack
from pdserve.errors import TierError
from pdserve.telemetry.timeline import Phase
from pdserve.types import (
    BlockKey,
    Fingerprint,
    Incarnation,
    Reach,
    Tier,
    TierBlocks,
    TierReach,
)

logger = logging.getLogger(__name__)

READERS = 2
DRAIN_S = 2.0
JOIN_S = 5.0
CLEAR_S = 60.0

ReadSink = Callable[[TierReadDone], None]


@dataclass(frozen=True, slots=True)
class ManagerStats:
    host: TierStats | None  # None: off
    redis: TierStats | None
    wanted_blocks: int
    hit_blocks: dict[Tier, int]
    queued_reads: int
    writes: WriteCounts
    failures: int  # jobs that broke in a way that has no name; each is in the log


class TierManager:
    """Thread-safe. Opens what ``config`` and ``redis_url`` (empty: none) ask for.

    ``pool``: blocks of ``span_bytes`` each. ConfigError for a URL that can never work; everything
    else that does not work is told by ``degraded``.
    """

    def __init__(
        self,
        config: CacheConfig,
        span_bytes: int,
        fingerprint: Fingerprint,
        incarnation: Incarnation,
        redis_url: str,
        pool: PoolSpans,
        limits: WriteLimits,
        computing: Callable[[], bool],
    ) -> None:
        self._pool = pool
        self._span_bytes = span_bytes
        self._complaints: list[str] = []
        self._wanted_host = config.host.bytes_max > 0
        self._wanted_redis = bool(redis_url)
        self._host = self._open_host(config, span_bytes, incarnation)
        self._redis = self._open_redis(config, redis_url, span_bytes, fingerprint, incarnation)
        self._fence = ForgetFence()
        sender = self._open_sender(limits, computing)
        self._read_path = ReadPath(self._host, self._redis, self._fence)
        self._readers: Workers[tuple[TierRead, ReadSink]] = Workers(
            "tier-read", READERS, self._handle_read
        )
        self._write_path = WritePath(self._host, sender, self._fence, pool, limits.pinned_blocks)

    @property
    def enabled(self) -> bool:
        """Whether there is any tier at all."""
        return self._host is not None or self._redis is not None

    def read(self, job: TierRead, done: ReadSink) -> None:
        """Fills a prefix of the job's blocks. Does not block."""
        if not self.enabled or not self._readers.post((job, done)):
            done(_read_done(job, ()))

    def write_back(self, job: WriteBack, done: UnpinSink) -> None:
        """Copies the job's blocks to every tier. Does not block."""
        self._write_path.save(job, done)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Suspect blocks: no read gives them from now on; every tier deletes them. No blocking."""
        suspect = tuple(dict.fromkeys(keys))
        self._fence.begin(suspect)
        if self._host is not None:
            self._host.delete(suspect)
        self._write_path.forget(suspect)

    def revoke(self, incarnation: Incarnation) -> None:
        """What that process wrote reads as a miss from now on, everywhere."""
        self._read_path.revoke(incarnation)

    def clear(self, tiers: Iterable[Tier]) -> Mapping[Tier, int]:
        """Deletes everything in ``tiers`` that was given before this call. Blocks.

        Returns how many blocks each tier lost; one that is off is not named. Redis loses the values
        of this fingerprint alone. TierError when one cannot be cleared.
        """
        clearing = Clearing(frozenset(tiers))
        self._write_path.clear(clearing)
        if not clearing.ended.wait(CLEAR_S):
            raise TierError(f"the tiers were not cleared within {CLEAR_S:g} s")
        if clearing.errors:
            raise clearing.errors[0]
        return clearing.blocks

    def quiesce(self, timeout: float) -> bool:
        """Whether every job given so far ended, down to Redis, within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        return self._readers.wait_idle(deadline) and self._write_path.wait_idle(deadline)

    def degraded(self) -> str:
        """What does not work, for heartbeats; empty when all does."""
        health = self._redis.health() if self._redis is not None else ""
        return "; ".join([*self._complaints, *([health] if health else [])])

    def reach(self) -> TierReach:
        """Whether what the configuration asks for ever worked, for heartbeats."""
        host, redis = Reach.OFF, Reach.OFF
        if self._wanted_host:
            host = Reach.NEVER if self._host is None else Reach.REACHED
        if self._wanted_redis:
            redis = Reach.NEVER if self._redis is None else self._redis.reach()
        return TierReach(host, redis)

    def stats(self) -> ManagerStats:
        wanted, hits = self._read_path.counts()
        return ManagerStats(
            host=self._host.stats() if self._host is not None else None,
            redis=self._redis.stats() if self._redis is not None else None,
            wanted_blocks=wanted,
            hit_blocks=hits,
            queued_reads=self._readers.queued,
            writes=self._write_path.counts(),
            failures=self._readers.failures + self._write_path.failures,
        )

    def blocks(self) -> TierBlocks:
        """For heartbeats."""
        redis = self._redis.stats() if self._redis is not None else None
        return TierBlocks(
            host=self._host.count if self._host is not None else 0,
            host_total=self._host.capacity if self._host is not None else 0,
            redis_written=redis.stored if redis is not None else 0,
            redis_unsent=self._write_path.counts().unsent_blocks,
            redis_rejected=redis.rejected_values if redis is not None else 0,
        )

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Gives what was written ``drain_s`` seconds to arrive, then ends every job."""
        unsent = self._write_path.counts().unsent_blocks
        self._write_path.hurry()
        self.quiesce(drain_s)
        for job, done in self._readers.stop():
            done(_read_done(job, ()))
        self._write_path.stop()
        if self._redis is not None:
            self._redis.close()  # wakes whoever still waits for it
        deadline = time.monotonic() + JOIN_S
        self._readers.join(deadline)
        self._write_path.join(deadline)
        # No heartbeat tells of these any more.
        if lost := self._write_path.counts().unsent_blocks - unsent:
            logger.warning("closed before Redis got %d more blocks", lost)
        if self._host is not None:
            self._host.close()

    def _handle_read(self, work: tuple[TierRead, ReadSink]) -> None:
        job, done = work
        hits: Sequence[Tier] = ()
        times = ReadTimes(self._span_bytes)
        try:
            hits = self._read_path.read(job.keys, self._pool.of(job.blocks), times)
        finally:
            done(_read_done(job, hits, times.phases()))

    def _open_host(
        self, config: CacheConfig, span_bytes: int, incarnation: Incarnation
    ) -> HostTier | None:
        if config.host.bytes_max == 0:
            return None
        if config.host.bytes_max < span_bytes:
            self._complain(f"host tier off: one block has {span_bytes} bytes")
            return None
        try:
            return HostTier(config.host.bytes_max, span_bytes, incarnation, self._pool.adopt)
        except TierError as error:
            self._complain(f"host tier off: {error}")
            return None

    def _open_redis(
        self,
        config: CacheConfig,
        url: str,
        span_bytes: int,
        fingerprint: Fingerprint,
        incarnation: Incarnation,
    ) -> RedisTier | None:
        if not url:
            return None
        if span_bytes + HEADER_BYTES > config.redis.value_bytes_max:
            self._complain(
                f"redis tier off: one block has {span_bytes} bytes, "
                f"cache.redis.value_bytes_max is {config.redis.value_bytes_max}"
            )
            return None
        return RedisTier(url, config.redis, span_bytes, fingerprint, incarnation)

    def _open_sender(self, limits: WriteLimits, computing: Callable[[], bool]) -> SendPath | None:
        """Without memory for copies there is no Redis tier."""
        if self._redis is None:
            return None
        try:
            aside = Aside(limits.aside_bytes, self._span_bytes, self._pool.adopt)
        except TierError as error:
            self._complain(f"redis tier off: {error}")
            self._redis.close()
            self._redis = None
            return None
        return SendPath(self._redis, self._fence, aside, limits, computing)

    def _complain(self, text: str) -> None:
        logger.warning(text)
        self._complaints.append(text)


def _read_done(job: TierRead, hits: Sequence[Tier], phases: tuple[Phase, ...] = ()) -> TierReadDone:
    return TierReadDone(job.seq, (*hits, *[None] * (len(job.keys) - len(hits))), phases)
