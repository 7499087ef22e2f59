"""The router process: its parts in order of their dependence, and its end in reverse.

    boot -> membership service, fronts -> addresses -> serve ... signal -> drain -> closed

Nothing here imports torch, ray or the workers' rooms.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from cache_tiers.keys import KeyMaker
from pdserve.collector import starting_up
from pdserve.rpc.channels import bind, make_server
from pdserve.telemetry.log_service import LoggingService
from pdserve.v1 import admin_pb2_grpc, worker_pb2_grpc
from router.boot import RouterBoot
from router.counters import Counters
from router.dispatch import RequestDispatcher
from router.fronts import Fronts, start_fronts
from router.kv_view import KvView
from router.links import Links
from router.membership import MembershipService
from router.registry import Registry
from router.selftest import SelfTest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the router listens, host:port each."""

    http: str
    grpc: str
    internal: str


class RouterServer:
    """``start`` once, ``stop`` once, on one event loop."""

    def __init__(self, boot: RouterBoot) -> None:
        config = boot.config
        counters = Counters()
        self._boot = boot
        self._registry = Registry(config.timers)
        self._links = Links(self._registry, boot.identity, config.timers, counters)
        self._kv_view = KvView(self._registry, config.cache)
        self.dispatcher = RequestDispatcher(
            config,
            self._registry,
            self._links,
            self._kv_view,
            KeyMaker(boot.hash_key),
            counters,
        )
        self._internal: grpc.aio.Server | None = None
        self._fronts: Fronts | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._selftest: asyncio.Task[None] | None = None
        # Resolved, with its error, when a part that runs for the router's whole life broke.
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> Addresses:
        """Listens everywhere. ConfigError names the address that is taken."""
        self._internal = make_server(self._boot.identity)
        worker_pb2_grpc.add_MembershipServicer_to_server(
            MembershipService(self._registry, self.dispatcher.readiness), self._internal
        )
        admin_pb2_grpc.add_LoggingServicer_to_server(LoggingService(), self._internal)
        port = bind(self._internal, self._boot.internal_address, self._boot.identity.tls)
        await self._internal.start()
        self._fronts = await start_fronts(
            self._boot, self.dispatcher, counters=self.dispatcher.counters.read
        )
        selftest = SelfTest(self.dispatcher, self._registry)
        self._selftest = asyncio.create_task(selftest.run(), name="self-test")
        self._tasks = [
            self._selftest,
            asyncio.create_task(self._tick(), name="registry-tick"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        host = self._boot.internal_address.rpartition(":")[0]
        addresses = Addresses(
            self._fronts.http_address, self._fronts.grpc_address, f"{host}:{port}"
        )
        log.info("serving HTTP on %s and gRPC on %s", addresses.http, addresses.grpc)
        return addresses

    async def stop(self, drain_s: float) -> None:
        """Refuses new requests, waits for the running ones, closes everything."""
        self.dispatcher.stop_accepting()
        if self._fronts is not None:
            self._fronts.leave(drain_s)
        if self._selftest is not None:
            self._selftest.cancel()  # nobody waits for its answer
        if not await self.dispatcher.drained(drain_s):
            log.warning("some requests did not end within the drain")
        if self._fronts is not None:
            await self._fronts.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._kv_view.close()
        await self._links.close()
        if self._internal is not None:
            await self._internal.stop(0)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.broken.done():
            self.broken.set_exception(error)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._boot.config.timers.heartbeat_s)
            self._registry.tick()


async def serve(boot: RouterBoot, announce: Callable[[Addresses], None]) -> None:
    """Serves until SIGTERM or SIGINT; a second signal cuts the drain short.

    Raises what broke a part of the router that nothing works without.
    """
    server = RouterServer(boot)
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        with starting_up():
            addresses = await server.start()
        announce(addresses)
        asked = asyncio.create_task(first.wait())
        await asyncio.wait((asked, server.broken), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if server.broken.done():
            server.broken.result()  # raises: a router without its timers must not go on
        log.info("draining for at most %g s", boot.config.timers.drain_s)
    finally:
        stopping = asyncio.create_task(server.stop(boot.config.timers.drain_s))
        hurry = asyncio.create_task(second.wait())
        await asyncio.wait((stopping, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            await server.dispatcher.drained(0.0)
        await stopping
