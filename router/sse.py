"""Server-sent events of one answer.

open -> ( event | comment )* -> done | fail

A stream that ends well ends with ``data: [DONE]``. One that fails after it began ends with
``data: {"error": {...}}`` and no [DONE]: a client that waits for [DONE] knows that tokens are
missing.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from aiohttp import web

from pdserve.errors import PdserveError
from router.http_errors import HEADER, REQUEST_ID, error_object

_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
# A client that reads nothing for so long past its deadline is gone.
_GRACE_S = 5.0


def encode(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


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
        """Gives the connection up; nothing more can be said on it."""
        if self._request.transport is not None:
            self._request.transport.abort()
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
        left = max(self._deadline - time.monotonic(), 0) + _GRACE_S
        try:
            async with asyncio.timeout(left):
                if not self._response.prepared:
                    await self._response.prepare(self._request)
                await self._response.write(data)
        except TimeoutError:
            raise ConnectionResetError("the client does not read") from None
