"""Plain HTTP for tests: bodies as they are on the wire, streams event by event."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    json: Any = field(default=None)


def call(
    address: str,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """``body``: bytes as they are, anything else as JSON."""
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, headers or {})
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    names = {name.lower(): value for name, value in response.getheaders()}
    is_json = names.get("content-type", "").startswith("application/json")
    return Reply(response.status, names, data, json.loads(data) if is_json else None)


def post(address: str, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
    return call(address, "POST", path, body, headers)


def events(reply: Reply) -> list[str]:
    """The data of each event; comments are left out."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = reply.body.decode().split("\n\n")
    assert blocks[-1] == "", "the stream ends within an event"
    return [block.removeprefix("data: ") for block in blocks[:-1] if not block.startswith(":")]


def chunks(reply: Reply) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    data = events(reply)
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]
