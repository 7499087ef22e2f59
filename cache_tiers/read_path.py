"""Reads a prefix of blocks from the tiers, fastest first, into the pool.

The host tier gives what it has; Redis gives the run of blocks that the host lacks, up to the next
one that the host holds; and so on, until something is missing everywhere. What Redis gave is kept
in the host tier. A tier that fails is a tier that has nothing: it has counted its failure itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence

from cache_tiers.fence import ForgetFence
from cache_tiers.host import HostTier
from cache_tiers.read_times import ReadTimes
from cache_tiers.redis_tier import RedisTier
from cache_tiers.spans import HostSpans, Spans
from pdserve.errors import TierError
from pdserve.types import BlockKey, Incarnation, Tier


class ReadPath:
    """Thread-safe."""

    def __init__(self, host: HostTier | None, redis: RedisTier | None, fence: ForgetFence) -> None:
        self._host = host
        self._redis = redis
        self._fence = fence
        self._lock = threading.Lock()
        self._revoked: frozenset[Incarnation] = frozenset()
        self._wanted = 0
        self._hits: Counter[Tier] = Counter()

    def read(self, keys: Sequence[BlockKey], into: Spans, times: ReadTimes) -> list[Tier]:
        """Fills a prefix of ``into``; returns which tier filled each block of it.

        Touches no buffer after it returned. ``times`` hears how long each tier took.
        """
        read = self._fence.enter(keys)
        try:
            hits = self._read(keys[: read.usable], into, times)
        finally:
            forgotten = self._fence.leave(read)
            if forgotten and self._host is not None:
                self._host.delete(list(forgotten))
        for i, key in enumerate(keys[: len(hits)]):
            if key in forgotten:
                del hits[i:]
                break
        with self._lock:
            self._wanted += len(keys)
            self._hits.update(hits)
        return hits

    def revoke(self, incarnation: Incarnation) -> None:
        """What ``incarnation`` wrote reads as a miss from now on."""
        with self._lock:
            self._revoked |= {incarnation}
        if self._redis is not None:
            self._redis.revoke(incarnation)
        if self._host is not None:
            self._host.revoke(incarnation)

    def counts(self) -> tuple[int, dict[Tier, int]]:
        """Blocks wanted so far, and blocks filled by each tier."""
        with self._lock:
            return self._wanted, dict(self._hits)

    def _read(self, keys: Sequence[BlockKey], into: Spans, times: ReadTimes) -> list[Tier]:
        hits: list[Tier] = []
        while len(hits) < len(keys):
            at = len(hits)
            if self._host is not None:
                began = time.monotonic()
                held = self._host.fill(keys[at:], into.part(at, len(keys)))
                times.took(Tier.HOST, began, held)
                hits += [Tier.HOST] * held
                at = len(hits)
            run = self._run(keys[at:])
            began = time.monotonic()
            found = self._from_redis(keys[: at + run], at, into)
            if run:
                times.took(Tier.REDIS, began, found)
            hits += [Tier.REDIS] * found
            if found < run or run == 0:
                break
        return hits

    def _run(self, keys: Sequence[BlockKey]) -> int:
        """How many leading keys to ask Redis for: up to the next one that the host holds."""
        if self._redis is None or not keys:
            return 0
        if self._host is None:
            return len(keys)
        held = self._host.contains(keys)
        return max(1, held.index(True) if True in held else len(keys))

    def _from_redis(self, keys: Sequence[BlockKey], at: int, into: Spans) -> int:
        """Reads ``keys`` from the ``at``-th on, as many at a time as can be received."""
        if self._redis is None or at == len(keys):
            return 0
        deadline = time.monotonic() + self._redis.time_limit(len(keys) - at)
        found = at
        while found < len(keys):
            end = found + into.part(found, len(keys)).room
            before = found
            found += self._received(keys[:end], found, into.part(found, end), deadline)
            if found < end:
                break
            assert found > before, "there is always room for one"
        return found - at

    def _received(self, keys: Sequence[BlockKey], at: int, into: Spans, deadline: float) -> int:
        assert self._redis is not None
        wanted = keys[at:]
        limit = min(self._redis.time_limit(len(wanted)), deadline - time.monotonic())
        with into.received() as received:
            try:
                writers = self._redis.fetch(wanted, received.views, max(0.0, limit))
            except TierError:
                return 0
            received.found = len(writers)
            if self._host is not None and writers:
                values = HostSpans(received.views[: len(writers)])
                self._host.keep(wanted[: len(writers)], values, writers, before=keys[:at])
        return self._without_revoked(writers)

    def _without_revoked(self, writers: Sequence[Incarnation]) -> int:
        """The prefix whose writers are still good, now that the values are in the host tier.

        A revocation that came during the read did not find them there.
        """
        with self._lock:
            revoked = self._revoked
        if not revoked.isdisjoint(writers):
            for writer in revoked.intersection(writers):
                if self._host is not None:
                    self._host.revoke(writer)
            return next(i for i, writer in enumerate(writers) if writer in revoked)
        return len(writers)
