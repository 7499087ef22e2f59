"""Opens what a worker caches with: its tier manager and its publisher of KV events.

caches = WorkerCaches(boot, built)    before the engine starts
caches.ports()                        plugs into the worker's core
caches.close()                        after the engine stopped
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cache_tiers.device_spans import DevicePool
from cache_tiers.kv_events import KvEventPublisher
from cache_tiers.manager import TierManager
from cache_tiers.spans import HostPool, PoolSpans
from cache_tiers.write_jobs import WriteLimits
from pdserve.config import CacheConfig
from pdserve.engine.build import BuiltEngine
from pdserve.engine.memory import MemoryKind, PoolMemory
from pdserve.types import Tier, TierBlocks, TierReach
from pdserve.worker.boot import WorkerBoot
from pdserve.worker.core import Ports

WRITE_LIMITS = WriteLimits()


class WorkerCaches:
    """Owns the tiers of one worker."""

    def __init__(self, boot: WorkerBoot, built: BuiltEngine) -> None:
        memory, turn = built.memory, built.turn
        cache = boot.config.cache
        self._manager: TierManager | None = None
        if self.memory_bytes(cache, boot.redis_url):
            self._manager = TierManager(
                cache,
                span_bytes=memory.span_bytes,
                fingerprint=built.facts.fingerprint,
                incarnation=memory.incarnation,
                redis_url=boot.redis_url,
                pool=_pool_of(memory),
                limits=_limits_of(memory),
                computing=lambda: turn is not None and turn.is_taken,
            )
        self._publisher = KvEventPublisher(boot.host) if cache.kv_events else None

    @staticmethod
    def memory_bytes(cache: CacheConfig, redis_url: str) -> int:
        """What the tiers take of the host at most: the host tier, and what waits for Redis.

        0 where no tier is wanted.
        """
        return cache.host.bytes_max + (WRITE_LIMITS.aside_bytes if redis_url else 0)

    def ports(self) -> Ports:
        publisher = self._publisher
        return Ports(
            tiers=self._manager,
            kv_events=publisher,
            degraded=self._degraded,
            tier_blocks=self._tier_blocks,
            tier_reach=self._tier_reach,
            clear_tiers=self._clear,
            kv_events_address=publisher.address if publisher else "",
            kv_replay_address=publisher.replay_address if publisher else "",
        )

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
        if self._publisher is not None:
            self._publisher.close()

    def _degraded(self) -> str:
        return self._manager.degraded() if self._manager is not None else ""

    def _tier_blocks(self) -> TierBlocks:
        return self._manager.blocks() if self._manager is not None else TierBlocks()

    def _tier_reach(self) -> TierReach:
        return self._manager.reach() if self._manager is not None else TierReach()

    def _clear(self, tiers: Sequence[Tier]) -> Mapping[Tier, int]:
        return self._manager.clear(tiers) if self._manager is not None else {}


def _limits_of(memory: PoolMemory) -> WriteLimits:
    """A device computes on while the host writes."""
    shares_cores = memory.kind is MemoryKind.SHARED
    return WRITE_LIMITS if shares_cores else replace(WRITE_LIMITS, pause_s=0.0)


def _pool_of(memory: PoolMemory) -> PoolSpans:
    if memory.kind is MemoryKind.SHARED:
        return HostPool(memory.block_bytes)
    return DevicePool(memory.blocks)
