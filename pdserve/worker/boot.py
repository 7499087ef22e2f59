"""What a worker is told when it starts, and what it answers once it serves.

boot = WorkerBoot(...)                       (from the pool's owner: Ray actor or plain process)
running = start_worker(boot)                 (prefill_worker.server / decode_worker.server)
running.facts ... running.stop()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdserve.config import Config
from pdserve.engine.host_memory import Memory
from pdserve.rpc.identity import Identity
from pdserve.types import Role, WorkerFacts, WorkerId


@dataclass(frozen=True, slots=True)
class WorkerBoot:
    config: Config
    worker_id: WorkerId
    role: Role
    node: str
    host: str  # address to bind, and to be reached at
    model_path: str  # local folder, already converted
    pool_blocks: int  # 0: compute from memory
    identity: Identity
    hash_key: bytes
    redis_url: str  # empty: no Redis tier
    device: str = "cpu"  # or cuda:N
    threads: int = 0  # 0: all cores
    # CPU workers that share this host's memory, for sizing the pool.
    workers_on_host: int = 1
    # Of these, those that pay for one copy of the weights together where they map it.
    weights_holders: int = 1
    # Of this host when the cluster started, so that a worker that starts again is as large as it
    # was; None: a host that came later, measured when the worker starts.
    memory: Memory | None = None


class RunningWorker(Protocol):
    facts: WorkerFacts

    def stop(self, drain_s: float) -> None:
        """Refuses new work, waits up to ``drain_s`` for running work, frees everything."""
        ...


StartWorker = Callable[[WorkerBoot], RunningWorker]

# Where each role's start_worker lives; imported by name, since this package imports no role.
ENTRY_POINTS = {
    Role.PREFILL: "prefill_worker.server",
    Role.DECODE: "decode_worker.server",
    Role.MIXED: "decode_worker.server",
}
