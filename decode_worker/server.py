"""A decode worker: takes attempts from the router, receives their KV, writes their answers.

Started as a mixed worker it is the same process: it reads prompts itself when the router names no
prefill peer.

    start_worker(boot) -> running worker; running.stop(drain_s)
"""

from __future__ import annotations

import asyncio

import grpc

from cache_tiers.attach import WorkerCaches
from cache_tiers.keys import KeyMaker
from decode_worker.attempt import AttemptServices
from decode_worker.peer import PeerStubs
from decode_worker.reads import PeerReads
from decode_worker.session import DecodeService
from kv_transfer.readers import ReaderPool
from pdserve.types import WorkerFacts
from pdserve.v1 import worker_pb2_grpc
from pdserve.worker.boot import WorkerBoot
from pdserve.worker.core import WorkerCore

# A lease is renewed this many times within its length.
KEEP_ALIVES_PER_LEASE = 4


class DecodeWorker:
    """Owns the worker's parts; they are closed against the order in which they feed each other."""

    def __init__(self, boot: WorkerBoot) -> None:
        config = boot.config
        tier_bytes = WorkerCaches.memory_bytes(config.cache, boot.redis_url)
        self._core = WorkerCore(boot, KeyMaker(boot.hash_key).child, tier_bytes)
        built = self._core.built
        self._caches = WorkerCaches(boot, built)
        readers = ReaderPool(
            built.memory,
            built.facts.fingerprint,
            config.transfer,
            boot.identity.transfer_token,
            relay=config.testing.transfer_relay,
        )
        self._reads = PeerReads(readers)
        self._stubs = PeerStubs(boot.identity, config.transfer.max_message_bytes)
        self._service: DecodeService | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.facts: WorkerFacts = self._core.open(
            self._caches.ports(), self._add_services, lambda: self._reads.late
        )

    def stop(self, drain_s: float) -> None:
        service = self._service
        self._core.drain(drain_s, lambda: service is not None and service.attempts > 0)
        self._core.shell.run(self._close_peers())
        self._core.close_shell()
        self._reads.end_reads()
        self._core.close_engine()
        self._reads.close()
        self._caches.close()
        self._core.close_memory()

    def _add_services(self, server: grpc.aio.Server, facts: WorkerFacts) -> None:
        config = self._core.boot.config
        services = AttemptServices(
            bridge=self._core.bridge,
            facts=facts,
            stubs=self._stubs,
            open_reader=self._reads.open,
            read=self._reads.read,
            keep_alive_s=config.transfer.lease_s / KEEP_ALIVES_PER_LEASE,
            peer_lost=self._reads.peer_lost,
            late_read=self._reads.came_late,
        )
        self._service = DecodeService(
            services, config.timers.dead_after_s, lambda: self._core.draining
        )
        worker_pb2_grpc.add_DecodeServicer_to_server(self._service, server)
        self._sweeper = asyncio.get_running_loop().create_task(self._reads.sweep())

    async def _close_peers(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._stubs.close()


def start_worker(boot: WorkerBoot) -> DecodeWorker:
    return DecodeWorker(boot)
