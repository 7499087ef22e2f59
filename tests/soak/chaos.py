"""What goes wrong on purpose while a load runs, and the log of it.

Kills: SIGKILL of a prefill and a decode worker in turn, whenever every pool has two ready ones.
Hangs: SIGSTOP of a random worker or of Redis, SIGCONT later if it still exists.
Rolling: each worker drained, and replaced once it is empty.

Victims come from a seed; when each fault can strike depends on the machine, so its time is logged.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import redis

from pdserve.types import WorkerFacts
from pdserve.v1 import worker_pb2 as pb
from tests.e2e.clusters import Running, is_stopped

POLL_S = 0.1
ROLES = ("prefill", "decode")
DRAIN_S = 60.0


@dataclass(frozen=True)
class Fault:
    at: float  # monotonic seconds
    what: str


def strikes(faults: Sequence[Fault]) -> int:
    """Of what was done to workers; the rest says how it went on."""
    return sum(fault.what.startswith(("SIGKILL", "SIGSTOP", "drain")) for fault in faults)


@dataclass
class Chaos:
    """Owns the faults of one phase. ``over`` ends it after the fault that is under way."""

    running: Running
    seed: str
    faults: list[Fault] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._rng = random.Random(f"chaos-{self.seed}")

    def log(self, what: str) -> None:
        self.faults.append(Fault(time.monotonic(), what))

    async def pause(self, seconds: float) -> None:
        """Sleeps, but not beyond the end."""
        try:
            await asyncio.wait_for(self.over.wait(), seconds)
        except TimeoutError:
            return

    async def kills(self) -> None:
        turn = 0
        while not self.over.is_set():
            if not await asyncio.to_thread(self._two_ready):
                await self.pause(POLL_S)
                continue
            role = ROLES[turn % len(ROLES)]
            victim = self._rng.choice(self._of(role))
            os.kill(victim.pid, signal.SIGKILL)
            self.log(f"SIGKILL {victim.id} (pid {victim.pid})")
            turn += 1
            await self._replaced(victim)

    async def hangs(self, seconds: float, every: float) -> None:
        while not self.over.is_set():
            workers = list(self.running.cluster.workers())
            name, pid = self._rng.choice(
                [*((str(w.id), w.pid) for w in workers), ("redis", self.redis_pid())]
            )
            os.kill(pid, signal.SIGSTOP)
            self.log(f"SIGSTOP {name} (pid {pid}) for {seconds:g} s")
            await asyncio.sleep(seconds)
            woken = is_stopped(pid)
            if woken:
                os.kill(pid, signal.SIGCONT)
            self.log(f"SIGCONT {name}" if woken else f"{name} was replaced meanwhile")
            await self.pause(every - seconds)

    async def rolling(self) -> None:
        for worker in self.running.cluster.workers():
            await asyncio.to_thread(
                self.running.on_worker, worker, lambda stub: stub.Drain(pb.DrainRequest())
            )
            self.log(f"drain {worker.id}")
            await self._until(lambda: self._empty(worker), f"{worker.id} is empty")  # noqa: B023
            self.running.cluster.kill_worker(worker.id)
            self.log(f"replaced {worker.id}, which was empty")
            await self._replaced(worker)
            await self._until(self._two_ready, "all are ready")
        self.over.set()

    def redis_pid(self) -> int:
        with redis.Redis.from_url(self.running.cluster.redis_url) as client:
            return int(client.info("server")["process_id"])

    def _of(self, role: str) -> list[WorkerFacts]:
        return [w for w in self.running.cluster.workers() if w.role.value == role]

    def _two_ready(self) -> bool:
        ready = [w["role"] for w in self.running.workers() if w["state"] == "ready"]
        return all(ready.count(role) >= 2 for role in ROLES)

    def _empty(self, worker: WorkerFacts) -> bool:
        return any(
            view["state"] == "draining" and view["running"] + view["waiting"] == 0
            for view in self.running.workers()
            if view["id"] == worker.id
        )

    async def _replaced(self, worker: WorkerFacts) -> None:
        def gone() -> bool:
            now = {w.incarnation for w in self.running.cluster.workers()}
            return worker.incarnation not in now

        await self._until(gone, f"{worker.id} is gone")

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DRAIN_S
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < end, f"not within {DRAIN_S:g} s: {what}"
            await asyncio.sleep(POLL_S)


Script = Callable[[Chaos], Awaitable[None]]
