"""Start and stop of a worker, in the order that every role shares.

core = WorkerCore(boot, hasher, tier_bytes)  model loaded, pool sized, engine not started
... the role opens its tiers, exporter or readers over core.built.memory ...
core.open(ports, add_services)               event loop, gRPC server, then the engine
core.close(drain_s, ...)                     no new work, running work ends, all is freed
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from pdserve.engine import api
from pdserve.engine.build import build_engine
from pdserve.engine.host_memory import HostShare
from pdserve.errors import PdserveError
from pdserve.telemetry.log_service import LoggingService
from pdserve.types import ID_BYTES, Incarnation, Load, TierBlocks, TierReach, WorkerFacts
from pdserve.v1 import admin_pb2_grpc, worker_pb2_grpc
from pdserve.worker.boot import WorkerBoot
from pdserve.worker.bridge import EngineBridge, KvEventPort, TierPort
from pdserve.worker.service import ClearTiers, WorkerService
from pdserve.worker.shell import WorkerShell

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.05
BROKEN_EXIT_CODE = 70


@dataclass(frozen=True, slots=True)
class Ports:
    """What the role plugs into the engine's seams."""

    tiers: TierPort | None
    kv_events: KvEventPort | None
    degraded: Callable[[], str]
    tier_blocks: Callable[[], TierBlocks]
    tier_reach: Callable[[], TierReach]
    clear_tiers: ClearTiers
    kv_events_address: str = ""
    kv_replay_address: str = ""


def end_process(failure: PdserveError) -> None:
    """A broken engine serves nobody again, and would look ready: its owner starts another worker.

    At once, so that its requests are lost with it and go on elsewhere, instead of failing here.
    """
    logger.critical("the worker ends: %s", failure)
    logging.shutdown()
    os._exit(BROKEN_EXIT_CODE)


class WorkerCore:
    """Owns the engine, the bridge and the shell of one worker."""

    def __init__(self, boot: WorkerBoot, hasher: api.BlockHasher, tier_bytes: int) -> None:
        """``tier_bytes``: memory of the tiers that the role opens; 0 for none."""
        self.boot = boot
        self.incarnation = Incarnation(secrets.token_bytes(ID_BYTES))
        self.bridge = EngineBridge()
        self.built = build_engine(
            config=boot.config,
            model_path=boot.model_path,
            pool_blocks=boot.pool_blocks,
            device=boot.device,
            threads=boot.threads,
            incarnation=self.incarnation,
            hasher=hasher,
            has_tiers=tier_bytes > 0,
            sink=self.bridge.sink,
            on_broken=end_process,
            share=HostShare(boot.workers_on_host, boot.memory, tier_bytes, boot.weights_holders),
        )
        for note in self.built.notes:
            logger.info("%s: %s", boot.worker_id, note)
        limits = boot.config.transfer
        self.shell = WorkerShell(boot.worker_id, boot.identity, limits.max_message_bytes)
        self._service: WorkerService | None = None
        self._ports: Ports | None = None
        self._late_kv_reads: Callable[[], int] = int

    @property
    def draining(self) -> bool:
        return self._service is not None and self._service.draining

    def open(
        self,
        ports: Ports,
        add_services: Callable[[grpc.aio.Server, WorkerFacts], None],
        late_kv_reads: Callable[[], int],
    ) -> WorkerFacts:
        """Serves; returns what the cluster needs to know of this worker."""
        self._ports = ports
        self._late_kv_reads = late_kv_reads
        self.bridge.attach(self.shell.loop, self.built.engine.post, ports.tiers, ports.kv_events)
        found: list[WorkerFacts] = []

        def add_all(server: grpc.aio.Server, address: str) -> None:
            facts = self._facts(address, ports)
            found.append(facts)
            self._service = WorkerService(
                self.bridge,
                facts,
                self.load,
                ports.clear_tiers,
                self.boot.config.timers.heartbeat_s,
                self.boot.config.testing.faults,
            )
            worker_pb2_grpc.add_WorkerServicer_to_server(self._service, server)
            admin_pb2_grpc.add_LoggingServicer_to_server(LoggingService(), server)
            add_services(server, facts)

        self.built.engine.start()
        self.shell.serve(self.boot.host, add_all)
        return found[0]

    def load(self) -> Load:
        counters = self.built.engine.snapshot()
        assert self._ports is not None
        turn = self.built.turn
        return Load(
            running=counters.running,
            waiting=counters.waiting,
            waiting_tokens=counters.waiting_tokens,
            blocks_used=counters.blocks_used,
            blocks_cached=counters.blocks_cached,
            blocks_total=counters.blocks_total,
            engine_steps=counters.steps,
            work_pending=counters.running > 0,
            draining=self.draining,
            degraded=self._ports.degraded(),
            tiers=self._ports.tier_blocks(),
            reach=self._ports.tier_reach(),
            late_events=self.bridge.late_events,
            late_kv_reads=self._late_kv_reads(),
            turn_wait_s=turn.waited_s if turn is not None else 0.0,
            turns_forced=turn.forced if turn is not None else 0,
        )

    def drain(self, drain_s: float, busy: Callable[[], bool]) -> None:
        """Refuses new attempts and waits until none is left, ``drain_s`` seconds at most."""
        if self._service is not None:
            self._service.draining = True
        deadline = time.monotonic() + drain_s
        while busy() and time.monotonic() < deadline:
            time.sleep(IDLE_POLL_S)

    def close_shell(self) -> None:
        self.shell.close(grace=0.5)

    def close_engine(self) -> None:
        self.built.engine.stop()

    def close_memory(self) -> None:
        self.built.close()

    def _facts(self, address: str, ports: Ports) -> WorkerFacts:
        return WorkerFacts(
            id=self.boot.worker_id,
            incarnation=self.incarnation,
            role=self.boot.role,
            pid=os.getpid(),
            node=self.boot.node,
            address=address,
            model=self.built.facts,
            blocks_total=self.built.memory.num_blocks,
            kv_events_address=ports.kv_events_address,
            kv_replay_address=ports.kv_replay_address,
        )
