"""The Membership service: whoever owns the workers' lives tells the router who exists."""

from __future__ import annotations

import grpc.aio

from pdserve.errors import ProtocolError
from pdserve.rpc import convert
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from router.readiness import Readiness
from router.registry import Registry

MAX_WORKERS = 4096


class MembershipService(worker_pb2_grpc.MembershipServicer):
    """Checks the whole list before the registry sees any of it."""

    def __init__(self, registry: Registry, readiness: Readiness) -> None:
        self._registry = registry
        self._readiness = readiness

    async def SetWorkers(
        self, request: worker_pb2.SetWorkersRequest, _context: grpc.aio.ServicerContext
    ) -> worker_pb2.SetWorkersResponse:
        for name in ("workers", "plan"):
            if (count := len(getattr(request, name))) > MAX_WORKERS:
                raise ProtocolError(f"{name}: {count}, more than {MAX_WORKERS}")
        workers = [convert.worker_facts_from_proto(worker) for worker in request.workers]
        ids = {worker.id for worker in workers}
        if len(ids) != len(workers):
            raise ProtocolError("workers: an id occurs twice")
        plan = convert.plan_from_proto(request.plan)
        self._registry.set_workers(workers, plan)
        self._readiness.control_plane(away=request.control_plane_away)
        return worker_pb2.SetWorkersResponse()

    async def InFlight(
        self, request: worker_pb2.InFlightRequest, _context: grpc.aio.ServicerContext
    ) -> worker_pb2.InFlightResponse:
        return worker_pb2.InFlightResponse(
            workers=[
                worker_pb2.WorkerAttempts(id=worker, attempts=count)
                for worker, count in self._registry.in_flight().items()
            ]
        )
