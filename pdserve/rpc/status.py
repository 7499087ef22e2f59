"""Our errors on gRPC's wire, in both directions.

handler raises PdserveError -> ErrorsToStatus -> status, details, trailers
status, details, trailers -> from_rpc_error -> the same PdserveError

The class travels as its ``code`` in the trailer ``pdserve-code``; a status without that trailer was
made by gRPC itself (or by a server that is not ours) and is mapped by its number alone.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio

from pdserve.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PdserveError,
    PermissionDenied,
    ProtocolError,
    Unauthenticated,
    WorkerLost,
    from_wire,
)

CODE = "pdserve-code"
RETRY_AFTER_MS = "pdserve-retry-after-ms"
PARAM = "pdserve-param"

# gRPC percent-encodes details and limits all trailers together to 8 KiB.
DETAILS_MAX = 2000
INTERNAL_TEXT = "internal error; the server's log has the details"

log = logging.getLogger(__name__)

_BY_STATUS: Mapping[grpc.StatusCode, type[PdserveError]] = {
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    # Our own Overloaded has the trailer: without it this is a message above gRPC's size limit.
    grpc.StatusCode.RESOURCE_EXHAUSTED: ProtocolError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
}


def from_rpc_error(error: grpc.aio.AioRpcError) -> PdserveError:
    """What the peer raised, or what became of the call. Its text has no peer's address."""
    trailers = {
        name: value
        for name, value in error.trailing_metadata() or ()
        if isinstance(value, str) and name.startswith("pdserve-")
    }
    details = error.details() or ""
    code = trailers.get(CODE)
    if code is None:
        status = error.code()
        return _BY_STATUS.get(status, InternalError)(f"gRPC {status.name}: {details}")
    retry_after = trailers.get(RETRY_AFTER_MS, "")
    result = from_wire(code, details, int(retry_after) / 1000 if _is_number(retry_after) else None)
    result.param = trailers.get(PARAM)
    return result


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 15


async def abort_with(context: grpc.aio.ServicerContext, error: PdserveError) -> NoReturn:
    """Ends the call with the error's status, text and trailers. Never returns."""
    trailers = [(CODE, error.code)]
    if error.retry_after_s is not None:
        trailers.append((RETRY_AFTER_MS, str(max(0, round(error.retry_after_s * 1000)))))
    if error.param is not None and error.param.isascii() and error.param.isprintable():
        trailers.append((PARAM, error.param[:200]))
    await context.abort(error.grpc_status, str(error)[:DETAILS_MAX], tuple(trailers))
    raise AssertionError("abort returned")


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> NoReturn:
    # The handler ended the call itself, or a write failed because its deadline did.
    if isinstance(error, grpc.aio.AbortError | grpc.aio.InternalError):
        raise error
    if isinstance(error, PdserveError):
        await abort_with(context, error)
    log.error("%s failed", method, exc_info=error)
    await abort_with(context, InternalError(INTERNAL_TEXT))


class ErrorsToStatus(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets handlers raise PdserveError; anything else they raise becomes INTERNAL and is logged.

    Also closes a streaming handler's generator in the call's own task, however the call ends: what
    its ``finally`` gives back is given back then, not when the garbage is collected.
    """

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        return None if handler is None else _wrap(handler, handler_call_details.method)


def _wrap(handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
    inner, make = _parts(handler)
    if inspect.isasyncgenfunction(inner):
        behaviour = _wrap_generator(inner, method)
    elif inspect.iscoroutinefunction(inner):
        behaviour = _wrap_coroutine(inner, method)
    else:
        raise TypeError(f"{method}: handlers are coroutines or asynchronous generators")
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _parts(handler: grpc.RpcMethodHandler) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The handler's function and the factory of its kind."""
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _wrap_coroutine(inner: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await inner(request, context)
        except Exception as error:
            await _abort(context, error, method)

    return call


def _wrap_generator(inner: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
        try:
            async with contextlib.aclosing(inner(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
        except Exception as error:
            await _abort(context, error, method)

    return call
