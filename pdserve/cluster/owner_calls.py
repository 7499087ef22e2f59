"""What the owner of a cluster asks of its router and workers by gRPC, each call with a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import grpc.aio

from pdserve.rpc.channels import ONE_CALL_S, from_rpc_error, make_channel
from pdserve.rpc.identity import Identity
from pdserve.types import Tier, WorkerFacts, WorkerId
from pdserve.v1 import admin_pb2, admin_pb2_grpc, worker_pb2, worker_pb2_grpc

# A tier's own bound, and a little more.
FLUSH_S = 90.0


class OwnerCalls:
    """On the loop of whoever calls. Every method raises PdserveError."""

    def __init__(self, identity: Identity, router_address: Callable[[], str]) -> None:
        self._identity = identity
        self._router_address = router_address

    async def in_flight(self) -> Mapping[WorkerId, int]:
        """The router's attempts on each worker."""
        async with self._channel(self._router_address()) as channel:
            stub = worker_pb2_grpc.MembershipStub(channel)
            try:
                answer = await stub.InFlight(worker_pb2.InFlightRequest(), timeout=ONE_CALL_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
        return {WorkerId(worker.id): worker.attempts for worker in answer.workers}

    async def flush(self, facts: WorkerFacts, tiers: Sequence[Tier]) -> Mapping[Tier, int]:
        """How many blocks left each tier that this worker has."""
        request = worker_pb2.FlushRequest(tiers=[tier.value for tier in tiers])
        async with self._channel(facts.address) as channel:
            try:
                answer = await worker_pb2_grpc.WorkerStub(channel).Flush(request, timeout=FLUSH_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
        return {Tier(flushed.tier): flushed.blocks for flushed in answer.tiers}

    async def set_log_level(self, facts: WorkerFacts | None, level: str) -> str:
        """Of a worker, or of the router (None); returns what it was."""
        address = self._router_address() if facts is None else facts.address
        async with self._channel(address) as channel:
            stub = admin_pb2_grpc.LoggingStub(channel)
            try:
                request = admin_pb2.SetLevelRequest(level=level)
                answer = await stub.SetLevel(request, timeout=ONE_CALL_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
        return str(answer.before)

    def _channel(self, address: str) -> grpc.aio.Channel:
        return make_channel(address, self._identity, connect_s=ONE_CALL_S)
