"""The Admin service: checks what is asked, lets the fleet do it, and says what was done.

A change runs as a task of its own: a caller that leaves ends its call, not the change.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc.aio

from pdserve.cluster import sizes
from pdserve.cluster.fleet import Drained, Fleet, Resized
from pdserve.cluster.membership import Membership
from pdserve.cluster.owner_calls import OwnerCalls
from pdserve.errors import InvalidRequest, PdserveError
from pdserve.rpc import convert
from pdserve.telemetry.log_service import check_level
from pdserve.types import Duty, Role, Tier, WorkerFacts, WorkerId
from pdserve.v1 import admin_pb2, admin_pb2_grpc, worker_pb2

T = TypeVar("T")

ROUTER = "router"
MAX_DRAIN_S = 86_400.0
_ROLES = {convert.role_to_proto(role): role for role in Role}


class AdminService(admin_pb2_grpc.AdminServicer):
    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        calls: OwnerCalls,
        note: Callable[[str], None],
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._calls = calls
        self._note = note
        self._running: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Ends the changes that run; what they began is the owner's to end."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    # ---- the pools -------------------------------------------------------------------------------

    async def GetPools(
        self, request: admin_pb2.GetPoolsRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.GetPoolsResponse:
        return admin_pb2.GetPoolsResponse(pools=self._pools(), under_way=self._fleet.under_way)

    async def DrainWorker(
        self, request: admin_pb2.DrainWorkerRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.DrainWorkerResponse:
        worker = self._fleet.known(request.worker)
        done = await self._change(self._fleet.drain(worker, _drain_s(request)))
        return admin_pb2.DrainWorkerResponse(drained=_drained(done))

    async def UndrainWorker(
        self, request: admin_pb2.UndrainWorkerRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.UndrainWorkerResponse:
        worker = self._fleet.known(request.worker)
        was_drained = await self._change(self._fleet.undrain(worker))
        return admin_pb2.UndrainWorkerResponse(was_drained=was_drained)

    async def RemoveWorker(
        self, request: admin_pb2.RemoveWorkerRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.ResizeResponse:
        worker = self._fleet.known(request.worker)
        return self._resized(await self._change(self._fleet.remove(worker, _drain_s(request))))

    async def AddWorkers(
        self, request: admin_pb2.AddWorkersRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.ResizeResponse:
        role = _role(request.role)
        if request.count < 1:
            raise InvalidRequest("count: 0; expected at least 1", param="count")
        return self._resized(await self._change(self._fleet.add(role, request.count)))

    async def Resize(
        self, request: admin_pb2.ResizeRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.ResizeResponse:
        wanted = {_role(pool.role): pool.size for pool in request.pools}
        if not wanted or len(wanted) != len(request.pools):
            raise InvalidRequest("pools: expected one or more, each role once", param="pools")
        return self._resized(await self._change(self._fleet.resize(wanted, _drain_s(request))))

    # ---- caches and logs -------------------------------------------------------------------------

    async def FlushTiers(
        self, request: admin_pb2.FlushTiersRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.FlushTiersResponse:
        tiers = _tiers(request.tiers)
        workers = self._membership.workers()
        answers = {facts.id: admin_pb2.FlushedWorker(worker=facts.id) for facts in workers}
        # Tier by tier: what one worker still wrote back is gone with the next tier of them all.
        for tier in tiers:
            await asyncio.gather(*(self._flush(facts, tier, answers) for facts in workers))
        self._note(f"{', '.join(tier.value for tier in tiers)}: flushed, as asked")
        return admin_pb2.FlushTiersResponse(workers=answers.values())

    async def _flush(
        self, facts: WorkerFacts, tier: Tier, answers: dict[WorkerId, admin_pb2.FlushedWorker]
    ) -> None:
        answer = answers[facts.id]
        try:
            for flushed, blocks in (await self._calls.flush(facts, [tier])).items():
                answer.tiers.add(tier=flushed.value, blocks=blocks)
        except PdserveError as error:
            answer.error = f"{error.code}: {error}"

    async def SetLogLevel(
        self, request: admin_pb2.SetLogLevelRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.SetLogLevelResponse:
        level = check_level(request.level)
        targets: dict[str, WorkerFacts | None] = {ROUTER: None}
        targets.update((facts.id, facts) for facts in self._membership.workers())
        if request.target:
            if request.target not in targets:
                raise InvalidRequest(
                    f"target: {request.target!r}; allowed are {', '.join(targets)}", param="target"
                )
            targets = {request.target: targets[request.target]}
        answers = await asyncio.gather(
            *(self._set_level(target, facts, level) for target, facts in targets.items())
        )
        return admin_pb2.SetLogLevelResponse(targets=answers)

    async def _set_level(
        self, target: str, facts: WorkerFacts | None, level: str
    ) -> admin_pb2.LevelSet:
        try:
            before = await self._calls.set_log_level(facts, level)
        except PdserveError as error:
            return admin_pb2.LevelSet(target=target, error=f"{error.code}: {error}")
        return admin_pb2.LevelSet(target=target, before=before)

    # ---- inside ----------------------------------------------------------------------------------

    async def _change(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(change)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Whoever asked may be gone; the error is then ours alone to tell.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._note(f"a change of the pools failed: {error}")

    def _resized(self, done: Resized) -> admin_pb2.ResizeResponse:
        return admin_pb2.ResizeResponse(
            added=done.added,
            removed=[_drained(one) for one in done.removed],
            pools=self._pools(),
        )

    def _pools(self) -> list[admin_pb2.PoolState]:
        members, seen = self._fleet.members(), self._membership.seen
        have = sizes.sizes(members)
        return [
            admin_pb2.PoolState(
                role=convert.role_to_proto(role),
                size=have[role],
                min=bounds.low,
                max=bounds.high,
                workers=[
                    admin_pb2.MemberState(
                        id=worker,
                        present=worker in seen and seen[worker].facts is not None,
                        drained=member.duty is not Duty.SERVE,
                    )
                    for worker, member in members.items()
                    if member.role is role
                ],
            )
            for role, bounds in self._fleet.rules.bounds.items()
        ]


def _drained(one: Drained) -> admin_pb2.Drained:
    return admin_pb2.Drained(
        worker=one.worker,
        finished=one.finished,
        handed_over=one.handed_over,
        seconds=one.seconds,
    )


def _drain_s(
    request: admin_pb2.DrainWorkerRequest | admin_pb2.RemoveWorkerRequest | admin_pb2.ResizeRequest,
) -> float | None:
    if not request.HasField("drain_s"):
        return None
    if not math.isfinite(request.drain_s) or not 0 <= request.drain_s <= MAX_DRAIN_S:
        raise InvalidRequest(
            f"drain_s: {request.drain_s:g}; expected 0 to {MAX_DRAIN_S:g} seconds", param="drain_s"
        )
    return float(request.drain_s)


def _role(number: worker_pb2.WorkerRole) -> Role:
    role = _ROLES.get(number)
    if role is None:
        names = ", ".join(role.value for role in Role)
        raise InvalidRequest(f"role: {number}; allowed are {names}", param="role")
    return role


def _tiers(names: Sequence[str]) -> list[Tier]:
    """In the order in which blocks come down to them."""
    allowed = [tier.value for tier in Tier]
    for name in names:
        if name not in allowed:
            raise InvalidRequest(
                f"tiers: {name!r}; allowed are {', '.join(allowed)}", param="tiers"
            )
    if not names:
        raise InvalidRequest(f"tiers: name one or more of {', '.join(allowed)}", param="tiers")
    return [tier for tier in Tier if tier.value in names]
