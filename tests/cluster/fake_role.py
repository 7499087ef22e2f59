"""A role without an engine: all that the owner of a worker can see of one."""

from __future__ import annotations

import os
import secrets

from pdserve.errors import DoesNotFit
from pdserve.types import Fingerprint, Incarnation, ModelFacts, Numerics, WorkerFacts
from pdserve.worker.boot import WorkerBoot


class FakeWorker:
    def __init__(self, boot: WorkerBoot) -> None:
        model = ModelFacts(
            boot.model_path, 512, 128, 16, "float32", Numerics.EXACT, Fingerprint(bytes(32))
        )
        self.boot = boot
        self.facts = WorkerFacts(
            id=boot.worker_id,
            incarnation=Incarnation(secrets.token_bytes(16)),
            role=boot.role,
            pid=os.getpid(),
            node=boot.node,
            address=f"{boot.host}:1",
            model=model,
            blocks_total=7,
        )
        print("started", boot.worker_id, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
        print("memory", boot.memory, flush=True)
        print("devices", os.environ.get("CUDA_VISIBLE_DEVICES", ""), flush=True)

    def stop(self, drain_s: float) -> None:
        print("stopped", self.boot.worker_id, drain_s, flush=True)


def start_worker(boot: WorkerBoot) -> FakeWorker:
    trouble = boot.model_path
    if os.path.exists(f"{trouble}.refuse"):
        raise DoesNotFit("3 GiB wanted, 2 GiB there")
    if os.path.exists(f"{trouble}.crash"):
        print("about to crash", flush=True)
        os._exit(3)
    if os.path.exists(f"{trouble}.bug"):
        raise KeyError("not there")
    return FakeWorker(boot)
