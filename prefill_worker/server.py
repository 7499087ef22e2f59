"""A prefill worker: reads prompts in chunks and offers their blocks to decode workers.

start_worker(boot) -> running worker; running.stop(drain_s)
"""

from __future__ import annotations

import grpc

from cache_tiers.attach import WorkerCaches
from cache_tiers.keys import KeyMaker
from kv_transfer.exporter import PoolExporter
from pdserve.types import Transport, WorkerFacts
from pdserve.v1 import kv_pb2_grpc
from pdserve.worker.boot import WorkerBoot
from pdserve.worker.core import WorkerCore
from prefill_worker.service import PrefillService


class PrefillWorker:
    """Owns the worker's parts; they are closed against the order in which they feed each other."""

    def __init__(self, boot: WorkerBoot) -> None:
        config = boot.config
        tier_bytes = WorkerCaches.memory_bytes(config.cache, boot.redis_url)
        self._core = WorkerCore(boot, KeyMaker(boot.hash_key).child, tier_bytes)
        built = self._core.built
        self._caches = WorkerCaches(boot, built)
        self._exporter = PoolExporter(
            built.memory,
            built.facts.fingerprint,
            bind_host=boot.host,
            cluster_token=boot.identity.transfer_token,
            transports=tuple(Transport(name) for name in config.transfer.transports),
        )
        self._service: PrefillService | None = None
        self.facts: WorkerFacts = self._core.open(
            self._caches.ports(),
            self._add_services,
            lambda: self._exporter.stats().stale_reads,
        )

    def stop(self, drain_s: float) -> None:
        service = self._service
        self._core.drain(drain_s, lambda: service is not None and service.attempts > 0)
        self._core.close_shell()
        if service is not None:
            service.close()
        self._core.close_engine()
        self._caches.close()
        self._exporter.close()
        self._core.close_memory()

    def _add_services(self, server: grpc.aio.Server, facts: WorkerFacts) -> None:
        self._service = PrefillService(
            self._core.bridge,
            self._exporter,
            lambda: facts,
            self._core.boot.config.transfer.lease_s,
            lambda: self._core.draining,
        )
        kv_pb2_grpc.add_PrefillServicer_to_server(self._service, server)


def start_worker(boot: WorkerBoot) -> PrefillWorker:
    return PrefillWorker(boot)
