"""Errors of the HTTP front: every one of them has OpenAI's body and the request's id.

The middleware is the outermost layer: it names the request, lets the handler run, and turns
whatever it raises into an answer. Once a stream has begun, its own handler reports errors in it.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from pdserve.errors import (
    Draining,
    InternalError,
    PdserveError,
    RequestTooLarge,
    Unauthenticated,
)
from router.fields import printable_id
from router.validation import MAX_ID_CHARS

log = logging.getLogger(__name__)

REQUEST_ID = web.RequestKey("request_id", str)
HEADER = "x-request-id"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def error_object(error: PdserveError) -> dict[str, Any]:
    """What OpenAI's clients expect under ``error``, in a body or in a stream."""
    return {
        "message": _encodable(str(error)),
        "type": error.openai_type,
        "param": None if error.param is None else _encodable(error.param),
        "code": error.code,
    }


def _encodable(text: str) -> str:
    """Names of fields come from clients; JSON can spell what UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def json_response(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def error_response(error: PdserveError) -> web.Response:
    response = json_response({"error": error_object(error)}, status=error.http_status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Draining):
        # The next try opens a connection, which behind a shared address leads to another router.
        response.force_close()
    return response


def as_typed(error: Exception, request_id: str) -> PdserveError:
    """Our own errors as they are; anything else is a bug, logged here and not told to clients."""
    if isinstance(error, PdserveError):
        return error
    log.error("request %s failed", request_id, exc_info=error)
    return InternalError("internal error; the server's log has the details")


def _of_aiohttp(error: web.HTTPException, request: web.Request) -> web.Response:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return error_response(RequestTooLarge("the body is longer than this server accepts"))
    code = _HTTP_CODES.get(error.status, "invalid_request")
    body = {
        "message": f"{request.method} {request.path}: {error.reason}",
        "type": "invalid_request_error" if error.status < 500 else "server_error",
        "param": None,
        "code": code,
    }
    response = json_response({"error": body}, status=error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    given = request.headers.get(HEADER)
    request[REQUEST_ID] = uuid.uuid4().hex
    try:
        if given is not None:
            request[REQUEST_ID] = printable_id(HEADER, given, MAX_ID_CHARS)
        response = await handler(request)
    except web.HTTPException as error:
        response = _of_aiohttp(error, request)
    except Exception as error:
        response = error_response(as_typed(error, request[REQUEST_ID]))
    if not response.prepared:
        response.headers[HEADER] = request[REQUEST_ID]
    return response
