"""Clusters for the end-to-end tests: one Ray for all, one cluster at a time, real processes.

A variant names what differs between clusters; asking for another one stops the one before.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import redis

from pdserve.cluster.ray_node import RayNode
from pdserve.cluster.supervisor import Cluster, start_cluster
from pdserve.config import Config
from pdserve.config_load import load_config
from pdserve.engine.resolve import default_cache, prepare_model
from pdserve.faults import Action, Step
from pdserve.rpc import identity
from pdserve.types import WorkerFacts
from pdserve.v1 import worker_pb2 as pb
from pdserve.v1 import worker_pb2_grpc as pb_grpc
from tests.e2e.ask import Caller
from tests.e2e.oracle import Oracle, oracle
from tests.models import CONTEXT, tiny_model
from tests.standstill import watched

BLOCK = 16
CHUNK = 48
SMOLLM2 = "smollm2"
MODEL_SEED = 3
ROOMY_BLOCKS = 400
# One longest sequence and a few blocks more: a batch has to be preempted.
TIGHT_BLOCKS = 40
SETTLE_S = 20.0
# So many looks, 20 ms apart, without a new value in Redis: nothing is written back any more.
QUIET_LOOKS = 20
TOKEN = secrets.token_hex(16)


@dataclass(frozen=True)
class Variant:
    """One cluster: ``chunk`` tokens per prefill step, further settings as ``key=value``."""

    family: str
    transport: str
    pool: str
    chunk: int = CHUNK
    prefill: int = 1
    decode: int = 1
    settings: tuple[str, ...] = ()


@dataclass
class Running:
    """A variant's live cluster and how its tests look into it."""

    cluster: Cluster
    context: int
    api_key: str = ""  # for what is asked over HTTP
    caller: Caller = field(init=False)

    def __post_init__(self) -> None:
        self.caller = Caller(self.cluster.addresses.grpc)

    @property
    def http(self) -> str:
        return self.cluster.http.url

    def get(self, path: str) -> Any:
        asked = urllib.request.Request(self.http + path)
        if self.api_key:
            asked.add_header("Authorization", f"Bearer {self.api_key}")
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return json.load(answer)

    def workers(self) -> list[dict[str, Any]]:
        return list(self.get("/workers")["workers"])

    def each_worker(
        self, call: Callable[[pb_grpc.WorkerStub], Any], ignoring: str = ""
    ) -> list[Any]:
        return [self.on_worker(f, call) for f in self.cluster.workers() if f.id != ignoring]

    def on_worker(self, facts: WorkerFacts, call: Callable[[pb_grpc.WorkerStub], Any]) -> Any:
        with grpc.insecure_channel(facts.address) as channel:
            return call(_AsOperator(pb_grpc.WorkerStub(channel)))

    def flush(self, *tiers: str) -> None:
        self.each_worker(lambda stub: stub.Flush(pb.FlushRequest(tiers=tiers)))

    def arm(
        self, role: str, step: Step, action: Action, nth: int, seconds: float = 0.0
    ) -> WorkerFacts:
        """Arms a fault in the first worker of a role; returns that worker as it is now."""
        victim = next(f for f in self.cluster.workers() if f.role.value == role)
        request = pb.ArmFaultRequest(step=step.value, action=action.value, nth=nth, seconds=seconds)
        self.on_worker(victim, lambda stub: stub.ArmFault(request))
        return victim

    def fired(self, worker: WorkerFacts) -> int:
        return int(self.on_worker(worker, lambda s: s.ArmFault(pb.ArmFaultRequest())).fired)

    def was_struck(self, victim: WorkerFacts) -> bool:
        """Gone, replaced, stopped, or it says so itself."""
        same = [f for f in self.cluster.workers() if f.incarnation == victim.incarnation]
        if not same or not Path(f"/proc/{victim.pid}").exists() or is_stopped(victim.pid):
            return True
        return self.fired(victim) > 0

    def resume_stopped(self) -> None:
        for facts in self.cluster.workers():
            if is_stopped(facts.pid):
                os.kill(facts.pid, signal.SIGCONT)

    def wait_whole(self) -> None:
        """Every worker is there and ready."""
        planned = self.cluster.config.pools.prefill + self.cluster.config.pools.decode

        def whole() -> bool:
            states = [worker["state"] for worker in self.workers()]
            return states == ["ready"] * planned and not any(
                is_stopped(facts.pid) for facts in self.cluster.workers()
            )

        self.wait(whole, 90.0)

    def check_idle(self, ignoring: str = "") -> None:
        """Every block is free or cached, and no invariant is broken, within the time to settle."""
        end = time.monotonic() + SETTLE_S
        while True:
            checks = self.each_worker(lambda stub: stub.CheckIdle(pb.CheckIdleRequest()), ignoring)
            sound = all(
                c.idle and not c.violations and c.blocks_free + c.blocks_cached == c.blocks_total
                for c in checks
            )
            if sound:
                return
            assert time.monotonic() < end, checks
            time.sleep(0.02)

    def settle(self) -> None:
        """Waits until nothing runs and the write-backs have arrived."""
        self.check_idle()
        if not self.cluster.redis_url:
            return
        client = redis.Redis.from_url(self.cluster.redis_url)
        count, quiet = client.dbsize(), 0
        while quiet < QUIET_LOOKS:
            time.sleep(0.02)
            now = client.dbsize()
            quiet = quiet + 1 if now == count else 0
            count = now
        client.close()

    @contextmanager
    def writes_held(self) -> Iterator[None]:
        """Redis answers reads, and takes what was written back when this is over."""
        client = redis.Redis.from_url(self.cluster.redis_url)
        client.client_pause(int(SETTLE_S * 1000), all=False)
        try:
            yield
        finally:
            client.client_unpause()
            client.close()

    def restart_workers(self) -> None:
        """Kills every worker; Ray starts them anew."""
        before = {facts.incarnation for facts in self.cluster.workers()}
        for facts in self.cluster.workers():
            self.cluster.kill_worker(facts.id)
        self.wait(
            lambda: (
                len(self.cluster.workers()) == len(before)
                and before.isdisjoint(f.incarnation for f in self.cluster.workers())
            )
        )
        self.wait_ready()

    def wait_ready(self) -> None:
        def all_ready() -> bool:
            workers = self.workers()
            return len(workers) == len(self.cluster.workers()) and all(
                worker["state"] == "ready" for worker in workers
            )

        self.wait(all_ready)

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Looks once more after the time; what this machine stands still is not counted."""
        with watched() as still:
            end = time.monotonic() + seconds
            while not condition():
                if time.monotonic() >= end + still.seconds:
                    assert condition(), f"still not so after {seconds} s"
                    return
                time.sleep(0.05)

    def stop(self) -> None:
        self.caller.close()
        self.cluster.stop(drain_s=0.5)


def is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] == "T"


class _AsOperator:
    """Calls as whoever holds the cluster's token."""

    def __init__(self, stub: pb_grpc.WorkerStub) -> None:
        self._stub = stub
        header = identity.mint(TOKEN, identity.Caller.OPERATOR).header("/pdserve.v1.Worker/")
        self._metadata = (("authorization", header),)

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        method = getattr(self._stub, name)
        return lambda request: method(request, timeout=30, metadata=self._metadata)


class Clusters:
    """Owns the folder of test models, the one Ray and the cluster that runs now."""

    def __init__(self, folder: Path, ray: RayNode) -> None:
        self._folder = folder
        self.ray = ray
        self._variant: Variant | None = None
        self._running: Running | None = None
        self._count = 0

    def get(self, variant: Variant) -> Running:
        if self._running is None or self._variant != variant:
            self.stop()
            self._running = self._start(variant)
            self._variant = variant
        return self._running

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._running = self._variant = None

    def model(self, family: str) -> Path:
        if family == SMOLLM2:
            return prepare_model(Config().model, default_cache(), lambda step: None).path
        path = self._folder / family
        if not path.exists():
            tiny_model(family, path, MODEL_SEED)
        return path

    def oracle(self, family: str) -> Oracle:
        return oracle(self.model(family), dtype_of(family))

    def _start(self, variant: Variant) -> Running:
        context = 1024 if variant.family == SMOLLM2 else CONTEXT
        self._count += 1
        token = self._folder / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        config = load_config(
            None,
            [
                *settings(variant, context, self.model(variant.family)),
                f"security.cluster_token_file={token}",
                *variant.settings,
            ],
            {"name": f"t{self._count}", "state_dir": str(self._folder / f"state-{self._count}")},
        )
        cluster = start_cluster(config, ray=self.ray)
        running = Running(cluster, context)
        try:
            running.wait_ready()
        except BaseException:
            running.stop()
            raise
        return running


def dtype_of(family: str) -> str:
    return "float32" if family == SMOLLM2 else "float64"


def settings(variant: Variant, context: int, model: Path) -> list[str]:
    blocks = ROOMY_BLOCKS if variant.pool == "roomy" else TIGHT_BLOCKS * context // CONTEXT
    values = {
        "model.path": model,
        "model.numerics": "exact",
        "model.dtype": dtype_of(variant.family),
        "model.max_model_len": context,
        "pools.prefill": variant.prefill,
        "pools.decode": variant.decode,
        "engine.block_size": BLOCK,
        "engine.pool_blocks": blocks,
        "engine.prefill_chunk": variant.chunk,
        "transfer.transports": variant.transport,
        "router.http_port": 0,
        "router.grpc_port": 0,
        "router.skip_handoff_tokens": 0,
        "cache.host.bytes_max": 512 * 2**20,
        # What Redis holds is found, however busy the machine is.
        "cache.redis.timeout_s": SETTLE_S,
    }
    return [f"{key}={value}" for key, value in values.items()]
