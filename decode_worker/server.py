"""A decode worker: takes attempts from the router, receives their KV, writes their answers.

Started as a mixed worker it is the same process: it reads prompts itself when the router names no
prefill peer.

    start_worker(boot) -> running worker; running.stop(drain_s)
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc

from cache_tiers.attach import WorkerCaches
from cache_tiers.keys import KeyMaker
from decode_worker.attempt import AttemptServices
from decode_worker.peer import PeerStubs
from decode_worker.session import DecodeService
from kv_transfer.base import BlockOffer, BlockReader, Endpoint, ReadReport
from kv_transfer.readers import ReaderPool
from pdserve.types import Incarnation, WorkerFacts
from pdserve.v1 import worker_pb2_grpc
from pdserve.worker.boot import WorkerBoot
from pdserve.worker.core import WorkerCore

# A lease is renewed this many times within its length.
KEEP_ALIVES_PER_LEASE = 4
READ_THREADS = 4
LOST_PEERS_EVERY_S = 2.0


class DecodeWorker:
    """Owns the worker's parts; they are closed against the order in which they feed each other."""

    def __init__(self, boot: WorkerBoot) -> None:
        config = boot.config
        has_tiers = WorkerCaches.wanted(config.cache, boot.redis_url)
        self._core = WorkerCore(boot, KeyMaker(boot.hash_key).child, has_tiers)
        built = self._core.built
        self._caches = WorkerCaches(boot, built.memory, built.facts.fingerprint)
        self._readers = ReaderPool(
            built.memory,
            built.facts.fingerprint,
            config.transfer,
            boot.identity.transfer_token,
            relay=config.testing.transfer_relay,
        )
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="kv-read")
        self._stubs = PeerStubs(boot.identity, config.transfer.max_message_bytes)
        self._service: DecodeService | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.facts: WorkerFacts = self._core.open(self._caches.ports(), self._add_services)

    def stop(self, drain_s: float) -> None:
        service = self._service
        self._core.drain(drain_s, lambda: service is not None and service.attempts > 0)
        self._core.shell.run(self._close_peers())
        self._core.close_shell()
        self._threads.shutdown(wait=True)
        self._core.close_engine()
        self._readers.close()
        self._caches.close()
        self._core.close_memory()

    def _add_services(self, server: grpc.aio.Server, facts: WorkerFacts) -> None:
        config = self._core.boot.config
        services = AttemptServices(
            bridge=self._core.bridge,
            facts=facts,
            stubs=self._stubs,
            open_reader=self._open_reader,
            read=self._read,
            keep_alive_s=config.transfer.lease_s / KEEP_ALIVES_PER_LEASE,
            peer_lost=self._peer_lost,
        )
        self._service = DecodeService(
            services, config.timers.dead_after_s, lambda: self._core.draining
        )
        worker_pb2_grpc.add_DecodeServicer_to_server(self._service, server)
        self._sweeper = asyncio.get_running_loop().create_task(self._let_go_of_ended_peers())

    async def _open_reader(self, endpoint: Endpoint) -> BlockReader:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._readers.reader_for, endpoint)

    async def _close_peers(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._stubs.close()

    async def _let_go_of_ended_peers(self) -> None:
        """The router tells of lost peers, but may be gone itself: their memory must not stay."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOST_PEERS_EVERY_S)
            await loop.run_in_executor(self._threads, self._readers.close_lost)

    def _peer_lost(self, incarnation: Incarnation, gone: bool) -> None:
        """On a thread: closing waits for a read that is under way."""
        if gone:
            self._threads.submit(self._readers.revoke, incarnation)
        else:
            self._threads.submit(self._readers.close_lost)

    async def _read(
        self,
        reader: BlockReader,
        offers: tuple[BlockOffer, ...],
        into: tuple[int, ...],
        deadline: float,
    ) -> ReadReport:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, reader.read, offers, into, deadline)


def start_worker(boot: WorkerBoot) -> DecodeWorker:
    return DecodeWorker(boot)
