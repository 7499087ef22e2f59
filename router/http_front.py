"""The public HTTP front: routes, limits and the listening socket.

Handlers are cancelled when their client goes away, which cancels the client's jobs.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from pdserve.errors import ConfigError
from router.auth import KeyRing, Tls
from router.http_errors import errors
from router.http_live import LiveHandlers
from router.http_openai import OpenAiHandlers
from router.http_page import load_page, page_routes
from router.http_requests import RequestHandlers
from router.http_tools import ToolHandlers
from router.service import Service

# Request line and headers; bodies have a limit of their own.
MAX_LINE_BYTES = 16 * 1024
BACKLOG = 128


def make_app(service: Service, keys: KeyRing) -> web.Application:
    openai = OpenAiHandlers(service, keys)
    tools = ToolHandlers(service, keys)
    requests = RequestHandlers(service.timelines, keys)
    live = LiveHandlers(service, keys)
    app = web.Application(middlewares=[errors], client_max_size=service.config.max_body_bytes)
    app.add_routes(
        [
            web.post("/v1/chat/completions", openai.chat),
            web.post("/v1/completions", openai.completion),
            web.get("/v1/models", tools.models),
            web.get("/v1/models/{name:.+}", tools.model),
            web.post("/tokenize", tools.tokenize),
            web.post("/detokenize", tools.detokenize),
            web.get("/health", tools.health),
            web.get("/ready", tools.ready),
            web.get("/metrics", tools.metrics),
            web.get("/version", tools.version),
            web.get("/workers", tools.workers),
            web.get("/live.json", live.live),
            *page_routes(load_page()),
            web.get("/requests", requests.requests),
            web.get("/requests/{request_id}", requests.request),
        ]
    )
    app.cleanup_ctx.append(live.run)
    return app


class HttpFront:
    """A listening server; ``address`` is host:port as it was bound."""

    def __init__(self, runner: web.AppRunner, server: asyncio.Server, address: str) -> None:
        self._runner = runner
        self._server = server
        self.address = address

    async def close(self) -> None:
        self._server.close()
        await self._runner.cleanup()


class _NoRoom(asyncio.Protocol):
    """A connection above the limit: closed before a byte of it is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


async def start_http(
    service: Service, keys: KeyRing, tls: Tls | None, *, shutdown_s: float
) -> HttpFront:
    """Raises ConfigError if the address cannot be bound."""
    config = service.config
    runner = web.AppRunner(
        make_app(service, keys),
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,
        shutdown_timeout=shutdown_s,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
    )
    await runner.setup()
    handlers = runner.server
    assert handlers is not None, "set up above"

    def connected() -> asyncio.Protocol:
        if len(handlers.connections) >= config.max_connections:
            return _NoRoom()
        return handlers()

    try:
        server = await asyncio.get_running_loop().create_server(
            connected,
            config.host,
            config.http_port,
            ssl=None if tls is None else tls.http,
            backlog=BACKLOG,
        )
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.http_port}: in use, or not ours to bind "
            f"({error.strerror or error})"
        ) from error
    host, port = server.sockets[0].getsockname()[:2]
    return HttpFront(runner, server, f"{host}:{port}")
