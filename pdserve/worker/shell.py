"""The event loop and gRPC server of a worker, on a thread of their own.

    shell = WorkerShell(...)    the thread runs an event loop
    shell.run(coroutine)        anything that has to happen on that loop
    shell.serve(host, build)    binds a port; build(server, address) adds services
    shell.close(grace)          ends calls, then the loop, then the thread

The engine has its own thread; nothing here may block, so that heartbeats go out in time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc

from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Identity

T = TypeVar("T")


class WorkerShell:
    """Owns the loop, its thread and the server."""

    def __init__(self, name: str, identity: Identity, max_message_bytes: int) -> None:
        self.loop = asyncio.new_event_loop()
        self._identity = identity
        self._max_message_bytes = max_message_bytes
        self._server: grpc.aio.Server | None = None
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-rpc", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Runs on the loop and waits; from any other thread."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(timeout)

    def serve(self, host: str, add_services: Callable[[grpc.aio.Server, str], None]) -> None:
        """Starts the server on a free port of ``host``; services learn the address first."""
        self.run(self._serve(host, add_services))

    def close(self, grace: float) -> None:
        if self._server is not None:
            self.run(self._server.stop(grace))
            self._server = None
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _serve(self, host: str, add_services: Callable[[grpc.aio.Server, str], None]) -> None:
        server = make_server(self._identity, max_message_bytes=self._max_message_bytes)
        port = bind(server, f"{host}:0", self._identity.tls)
        add_services(server, f"{host}:{port}")
        await server.start()
        self._server = server

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
