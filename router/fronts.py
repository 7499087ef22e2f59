"""Both public fronts over one dispatcher: started together, closed together.

start_fronts -> listening on both addresses -> close
                (health follows the dispatcher's readiness)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from pdserve.config import Config
from pdserve.telemetry.metrics import RouterMetrics
from router.api import Dispatcher
from router.auth import load_keys, load_tls
from router.boot import RouterBoot
from router.grpc_front import GrpcFront, start_grpc
from router.http_front import HttpFront, start_http
from router.model_files import load_model
from router.separation import Cause
from router.service import Service
from router.timelines import Timelines
from router.tokens import TokenService
from router.tracing import Exporter, open_exporter

log = logging.getLogger(__name__)

# The dispatcher has drained before the fronts close; what is left are answers being written.
CLOSE_S = 2.0
READINESS_S = 0.25


class Fronts:
    """``http_address`` and ``grpc_address`` are host:port as they were bound."""

    def __init__(
        self,
        http: HttpFront,
        grpc: GrpcFront,
        tokens: TokenService,
        dispatcher: Dispatcher,
        exporter: Exporter | None,
    ) -> None:
        self.http_address = http.address
        self.grpc_address = grpc.address
        self._http = http
        self._grpc = grpc
        self._tokens = tokens
        self._dispatcher = dispatcher
        self._exporter = exporter
        self._leaving: asyncio.Task[None] | None = None
        self._watch = asyncio.create_task(self._follow_readiness(), name="front-readiness")

    def leave(self, within_s: float) -> None:
        """The drain begins: gRPC's connections end after their calls, ``within_s`` at most.

        So clients of an address with several routers behind it go to another one. HTTP's are told
        with each refusal.
        """
        self._watch.cancel()
        self._leaving = asyncio.create_task(self._grpc.close(within_s + CLOSE_S), name="grpc-leave")

    async def close(self) -> None:
        """Ends what still runs, after CLOSE_S at most for each front."""
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(self._http.close(), self._grpc.close(CLOSE_S))
        if self._leaving is not None:
            await self._leaving
        self._tokens.close()
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)

    async def _follow_readiness(self) -> None:
        known: bool | None = None
        while True:
            ready, reason = self._dispatcher.ready()
            if ready != known:
                known = ready
                log.info("ready" if ready else "not ready: %s", *(() if ready else (reason,)))
                await self._grpc.set_serving(ready)
            await asyncio.sleep(READINESS_S)


async def start_fronts(
    boot: RouterBoot,
    dispatcher: Dispatcher,
    *,
    counters: Callable[[], Mapping[str, int]] | None = None,
) -> Fronts:
    """``counters``: what the router counts about itself, for /metrics.

    Raises ConfigError: an address in use, keys, certificate or model files that are wrong.
    """
    config: Config = boot.config
    keys = load_keys(config.security.api_key_files)
    tls = load_tls(config.security)
    model = load_model(boot.model_path, boot.served_name, config)
    metrics = RouterMetrics(
        CollectorRegistry(), model.name, max_model_len=max(1, model.max_model_len)
    )
    metrics.watch_workers(dispatcher.workers)
    metrics.watch_shortfalls(lambda: _causes(dispatcher))
    if counters is not None:
        metrics.watch_counters(counters)
    # What was opened is closed, last first, unless all of it opens.
    async with contextlib.AsyncExitStack() as undo:
        exporter = open_exporter(config.telemetry.traces)
        if exporter is not None:
            undo.push_async_callback(asyncio.to_thread, exporter.close)
            metrics.watch_counters(exporter.counts)
        tokens = TokenService(model, config.router.tokenizer_threads)
        undo.callback(tokens.close)
        if tokens.pieces is None:
            log.warning("the model has no tokenizer.json: prompts and answers are token ids alone")
        tell = None if exporter is None else exporter.offer
        timelines = Timelines(config.telemetry.timelines, tell)
        service = Service(config.router, tokens, dispatcher, metrics, timelines)
        http = await start_http(service, keys, tls, shutdown_s=CLOSE_S)
        undo.push_async_callback(http.close)
        grpc = await start_grpc(service, keys, tls)
        undo.pop_all()
    return Fronts(http, grpc, tokens, dispatcher, exporter)


def _causes(dispatcher: Dispatcher) -> dict[str, bool]:
    """Every cause of a shortfall, and whether there is one now."""
    found = {one.cause for one in dispatcher.shortfalls()}
    return {cause.value: cause in found for cause in Cause}
