"""The ``Worker`` service: what every role tells about itself, and the switches it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import grpc

from pdserve import faults
from pdserve.engine import api
from pdserve.errors import InvalidRequest, PermissionDenied
from pdserve.rpc import convert
from pdserve.types import Load, Tier, WorkerFacts
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from pdserve.worker.bridge import EngineBridge

# Clears slower tiers, and says how many blocks each lost; given by the role, which knows them.
ClearTiers = Callable[[Sequence[Tier]], Mapping[Tier, int]]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Owns the draining flag. Heartbeats read counters only, so a busy engine cannot delay them."""

    def __init__(
        self,
        bridge: EngineBridge,
        facts: WorkerFacts,
        load: Callable[[], Load],
        clear_tiers: ClearTiers,
        heartbeat_s: float,
        accept_faults: bool,
    ) -> None:
        self._bridge = bridge
        self._facts = facts
        self._load = load
        self._clear_tiers = clear_tiers
        self._heartbeat_s = heartbeat_s
        self._faults = accept_faults
        self.draining = False

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerInfo:
        return convert.worker_facts_to_proto(self._facts)

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.Heartbeat]:
        while True:
            yield convert.heartbeat_to_proto(self._facts.incarnation, self._load())
            await asyncio.sleep(self._heartbeat_s)

    async def CheckIdle(
        self, request: worker_pb2.CheckIdleRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.CheckIdleResponse:
        snapshot = await self._bridge.inspect()
        return worker_pb2.CheckIdleResponse(
            idle=snapshot.idle and not self._bridge.listening,
            violations=snapshot.violations,
            blocks_free=snapshot.blocks_free,
            blocks_cached=snapshot.blocks_cached,
            blocks_total=snapshot.blocks_total,
        )

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        self.draining = not request.undo
        return worker_pb2.DrainResponse()

    async def ArmFault(
        self, request: worker_pb2.ArmFaultRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ArmFaultResponse:
        """Without a step: tells how many faults struck."""
        if not self._faults:
            raise PermissionDenied("faults are armed only where testing.faults is set")
        if request.step:
            faults.board.arm(fault_from_wire(request))
        return worker_pb2.ArmFaultResponse(fired=faults.board.fired)

    async def Flush(
        self, request: worker_pb2.FlushRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.FlushResponse:
        tiers = flush_tiers(request.tiers)
        blocks: dict[Tier, int] = {}
        if Tier.DEVICE in tiers:
            self._bridge.post(api.FlushDevice(lambda freed: blocks.update({Tier.DEVICE: freed})))
        # The engine has taken the flush in once it answers what was posted after it.
        await self._bridge.inspect()
        slower = [tier for tier in tiers if tier is not Tier.DEVICE]
        if slower:
            blocks.update(await asyncio.to_thread(self._clear_tiers, slower))
        return worker_pb2.FlushResponse(
            tiers=[
                worker_pb2.FlushedTier(tier=tier.value, blocks=count)
                for tier, count in blocks.items()
            ]
        )


def flush_tiers(names: Sequence[str]) -> list[Tier]:
    if not names:
        return [Tier.DEVICE, Tier.HOST]
    allowed = {tier.value: tier for tier in Tier}
    for name in names:
        if name not in allowed:
            raise InvalidRequest(
                f"tiers: {name!r}; allowed are {', '.join(allowed)}", param="tiers"
            )
    return [allowed[name] for name in names]


def fault_from_wire(request: worker_pb2.ArmFaultRequest) -> faults.Fault:
    try:
        step, action = faults.Step(request.step), faults.Action(request.action)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return faults.Fault(step, action, max(1, request.nth), request.seconds)
