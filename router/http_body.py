"""Bodies of HTTP requests: bytes to a JSON object, or a typed error that says where it is wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import msgspec
from aiohttp import web

from pdserve.errors import DeadlineExceeded, InvalidRequest, RequestTooLarge


async def read_object(
    request: web.Request, max_bytes: int, timeout_s: float
) -> Mapping[str, object]:
    """Raises InvalidRequest, RequestTooLarge, DeadlineExceeded for a body that does not come."""
    if request.content_length is not None and request.content_length > max_bytes:
        raise RequestTooLarge(
            f"the body of {request.content_length} bytes is longer than the {max_bytes} allowed"
        )
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.read()
    except TimeoutError:
        raise DeadlineExceeded("the body did not arrive in time") from None
    except web.HTTPRequestEntityTooLarge:
        raise RequestTooLarge(f"the body is longer than the {max_bytes} bytes allowed") from None
    return parse_object(body)


def parse_object(body: bytes) -> Mapping[str, object]:
    value = _parse(body)
    if not isinstance(value, dict):
        raise InvalidRequest("the body is JSON, but not an object")
    return value


def _parse(body: bytes) -> object:
    """Numbers that JSON does not have (NaN) are let through: validation names their field.

    The strict parser is the fast one; the lenient one sees only what the strict one refused.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # the lenient parser below decides, and says where the error is
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 at byte {error.start}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    except ValueError:
        raise InvalidRequest("the body is not valid JSON: it holds a number too long") from None
    except RecursionError:
        raise InvalidRequest("the body is not valid JSON: it is nested too deeply") from None
