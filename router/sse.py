"""Answers on their way to a client that may read slowly, or not at all; and server-sent events.

open -> ( event | comment )* -> done | fail

A stream that ends well ends with ``data: [DONE]``. One that fails after it began ends with
``data: {"error": {...}}`` and no [DONE]: a client that waits for [DONE] knows that tokens are
missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web

from pdserve.errors import PdserveError
from router.http_errors import HEADER, REQUEST_ID, error_object

_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
# A client that has not read everything so long after its deadline will never do so.
_GRACE_S = 0.5


def encode(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


@contextlib.asynccontextmanager
async def _patience(deadline: float) -> AsyncIterator[None]:
    """Around a write. ConnectionResetError when the client reads nothing until its deadline."""
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0) + _GRACE_S):
            yield
    except TimeoutError:
        raise ConnectionResetError("the client does not read") from None


async def send_whole(
    request: web.Request, response: web.Response, deadline: float
) -> web.StreamResponse:
    """An answer in one piece; its client may be gone, or not read."""
    response.headers[HEADER] = request[REQUEST_ID]
    try:
        async with _patience(deadline):
            await response.prepare(request)
            await response.write_eof()
    except ConnectionResetError:
        abort(request)
    return response


def abort(request: web.Request) -> None:
    """Gives the connection up; nothing more can be said on it."""
    if request.transport is not None:
        request.transport.abort()


class EventStream:
    """Writes raise ConnectionResetError once the client has gone, or stopped reading."""

    def __init__(self, request: web.Request, deadline: float) -> None:
        self._request = request
        self._deadline = deadline
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                HEADER: request[REQUEST_ID],
            }
        )

    @property
    def begun(self) -> bool:
        return self._response.prepared

    @property
    def request_id(self) -> str:
        return str(self._request[REQUEST_ID])

    def abort(self) -> web.StreamResponse:
        abort(self._request)
        return self._response

    async def events(self, values: list[dict[str, Any]]) -> None:
        """Several events at once cost one write."""
        await self._write(b"".join(map(encode, values)))

    async def keep_alive(self) -> None:
        await self._write(_KEEP_ALIVE)

    async def done(self) -> web.StreamResponse:
        await self._write(_DONE)
        await self._response.write_eof()
        return self._response

    async def fail(self, error: PdserveError) -> web.StreamResponse:
        await self._write(encode({"error": error_object(error)}))
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        async with _patience(self._deadline):
            if not self._response.prepared:
                await self._response.prepare(self._request)
            await self._response.write(data)
