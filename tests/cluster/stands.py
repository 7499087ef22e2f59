"""Pools and membership of one cluster over a given Ray, and a router that keeps what it hears.

pdserve.cluster.pools and membership import Ray, which must see the environment of its start.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster import orphans, ray_node
from pdserve.config import Config, PoolsConfig
from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Caller, mint
from pdserve.types import (
    Fingerprint,
    Incarnation,
    ModelFacts,
    Numerics,
    Role,
    WorkerFacts,
    WorkerId,
)
from pdserve.v1 import worker_pb2, worker_pb2_grpc

TOKEN = "cluster-token"
MODULES = dict.fromkeys(Role, "fake_role")


def eventually(true: Callable[[], object], within_s: float = 20.0) -> None:
    limit = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit, "it never became true"
        time.sleep(0.02)


class RecordingRouter(worker_pb2_grpc.MembershipServicer):
    """A real gRPC server that keeps what it is told; ``restart`` forgets it, as a router does."""

    def __init__(self) -> None:
        self.generation = 1
        self.pushes: list[list[worker_pb2.WorkerInfo]] = []
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._serving.wait(10)

    async def SetWorkers(self, request: Any, context: Any) -> Any:
        self.pushes.append(list(request.workers))
        return worker_pb2.SetWorkersResponse()

    def restart(self) -> None:
        self.pushes.clear()
        self.generation += 1

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    @property
    def told(self) -> dict[str, bytes]:
        """Incarnations by id, as last pushed."""
        return {w.id: w.incarnation for w in self.pushes[-1]} if self.pushes else {}

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._closing = asyncio.Event()
        server = make_server(mint(TOKEN, Caller.ROUTER))
        worker_pb2_grpc.add_MembershipServicer_to_server(self, server)
        self.address = f"127.0.0.1:{bind(server, '127.0.0.1:0')}"
        await server.start()
        self._serving.set()
        await self._closing.wait()
        await server.stop(0)


class Stand:
    """Pools and membership of one cluster over the shared Ray."""

    def __init__(
        self, node: ray_node.RayNode, folder: Path, pools: PoolsConfig, gpus: float = 0.0
    ) -> None:
        """``gpus`` of each worker, beyond what a configuration may ask for."""
        from pdserve.cluster.membership import Membership
        from pdserve.cluster.pools import Pools, PoolSpec, plan_pools

        self.node = node
        self.folder = folder
        self.notes: list[str] = []
        config = replace(Config(name=folder.name), pools=pools)
        spec = PoolSpec(
            config, "here", "127.0.0.1", str(folder / "m"), TOKEN, bytes(32), "", 3, folder, MODULES
        )
        plans = [replace(plan, gpus=gpus) for plan in plan_pools(config, gpus=0, nodes=1)]
        self.pools = Pools(spec, plans)
        self.router = RecordingRouter()
        self.pools.create()
        self.membership = Membership(
            self.pools.actors,
            self.router,
            lambda: self.router.address,
            mint(TOKEN, Caller.SUPERVISOR),
            config.timers,
            self.notes.append,
            self.pools.renew,
        )
        self.membership.start()

    def all_present(self) -> bool:
        return self.membership.wait(lambda s: all(one.facts for one in s.values()), 30)

    def pid(self, worker: str) -> int:
        facts = self.membership.seen[WorkerId(worker)].facts
        return facts.pid if facts is not None else 0

    def close(self) -> None:
        pids = [facts.pid for facts in self.membership.workers()]
        self.membership.stop()
        self.pools.stop([facts.id for facts in self.membership.workers()], 0.5, 5.0)
        self.router.close()
        for pid in pids:
            assert orphans.wait_gone(pid, 10)


def facts_of(worker: WorkerId, pid: int) -> WorkerFacts:
    model = ModelFacts("m", 512, 128, 16, "float32", Numerics.EXACT, Fingerprint(bytes(32)))
    incarnation = Incarnation(pid.to_bytes(16))
    return WorkerFacts(worker, incarnation, Role.DECODE, pid, "here", "127.0.0.1:1", model, 7)


class Scripted:
    """An actor as membership asks it: ``answer`` is what each question comes to, and ``process``
    the pid that the control plane tells."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.process = answer.pid
        self.asked = 0

    @property
    def describe(self) -> Scripted:
        return self

    def remote(self) -> Scripted:
        return self

    def future(self) -> Future[Any]:
        self.asked += 1
        future: Future[Any] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            future.set_result(self.answer)
        return future


class Renewals:
    """Membership of one scripted worker, whose control plane has come back."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import ray

        from pdserve.cluster import ray_tables
        from pdserve.cluster.membership import Membership

        self.worker = WorkerId("decode-0")
        self.actor = Scripted(facts_of(self.worker, 1))
        self.renew: Callable[[WorkerId, Any], Any | None] = lambda worker, actor: None
        self.renewals = 0
        self.notes: list[str] = []
        self.router = RecordingRouter()
        self.membership = Membership(
            {self.worker: self.actor},
            self.router,
            lambda: self.router.address,
            mint(TOKEN, Caller.SUPERVISOR),
            Config().timers,
            self.notes.append,
            self._renew,
        )
        self.head = "first"
        self.looks = 0
        patch.setattr(ray, "nodes", lambda: [self._node()])
        patch.setattr(ray_tables, "process_of", lambda actor: actor.process)
        self.membership.start()
        assert self.present()
        eventually(lambda: self.looks >= 2)  # so the first one has been taken down
        self.head = "second"
        eventually(lambda: self.membership._returns)

    def _node(self) -> dict[str, Any]:
        self.looks += 1
        return {"NodeID": self.head, "Alive": True, "Resources": {"node:__internal_head__": 1.0}}

    def _renew(self, worker: WorkerId, actor: Any) -> Any | None:
        self.renewals += 1
        return self.renew(worker, actor)

    def present(self) -> bool:
        return self.membership.wait(lambda seen: all(one.facts for one in seen.values()), 10)

    def pid(self) -> int:
        facts = self.membership.seen[self.worker].facts
        return facts.pid if facts is not None else 0

    def close(self) -> None:
        self.membership.stop()
        self.router.close()
