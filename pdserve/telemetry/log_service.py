"""The ``Logging`` service: changes how much a running process says; registered by router and
workers alike. The level lasts until the process ends."""

from __future__ import annotations

import logging

import grpc.aio

from pdserve.config_load import keys
from pdserve.errors import InvalidRequest
from pdserve.telemetry.logs import set_level
from pdserve.v1 import admin_pb2, admin_pb2_grpc

log = logging.getLogger(__name__)


def check_level(level: str) -> str:
    """InvalidRequest names what is allowed."""
    allowed = keys()["log.level"].choices
    if level not in allowed:
        raise InvalidRequest(f"level: {level!r}; allowed are {', '.join(allowed)}", param="level")
    return level


class LoggingService(admin_pb2_grpc.LoggingServicer):
    async def SetLevel(
        self, request: admin_pb2.SetLevelRequest, _context: grpc.aio.ServicerContext
    ) -> admin_pb2.SetLevelResponse:
        before = set_level(check_level(request.level))
        log.warning("log level: %s, was %s", request.level, before)
        return admin_pb2.SetLevelResponse(before=before)
