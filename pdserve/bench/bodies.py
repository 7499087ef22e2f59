"""Reading a body to its end, up to a limit: what a server sends is not trusted to be short."""

from __future__ import annotations

import aiohttp


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """At most ``limit`` bytes; what lies beyond is left."""
    parts: list[bytes] = []
    held = 0
    while held < limit and (part := await response.content.read(limit - held)):
        parts.append(part)
        held += len(part)
    return b"".join(parts)
