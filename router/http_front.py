"""The public HTTP front: routes, limits and the listening socket.

Handlers are cancelled when their client goes away, which cancels the client's jobs.
"""

from __future__ import annotations

from aiohttp import web

from pdserve.errors import ConfigError
from router.auth import KeyRing, Tls
from router.http_errors import errors
from router.http_openai import OpenAiHandlers
from router.http_tools import ToolHandlers
from router.service import Service

# Request line and headers; bodies have a limit of their own.
MAX_LINE_BYTES = 16 * 1024


def make_app(service: Service, keys: KeyRing) -> web.Application:
    openai = OpenAiHandlers(service, keys)
    tools = ToolHandlers(service, keys)
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
        ]
    )
    return app


class HttpFront:
    """A listening server; ``address`` is host:port as it was bound."""

    def __init__(self, runner: web.AppRunner, address: str) -> None:
        self._runner = runner
        self.address = address

    async def close(self) -> None:
        await self._runner.cleanup()


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
    site = web.TCPSite(
        runner, config.host, config.http_port, ssl_context=None if tls is None else tls.http
    )
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.http_port}: in use, or not ours to bind "
            f"({error.strerror or error})"
        ) from error
    host, port = runner.addresses[0][:2]
    return HttpFront(runner, f"{host}:{port}")
