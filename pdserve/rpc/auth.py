"""The cluster's token on internal calls: attached by every client, demanded by every server.

client: TokenChannel adds ``authorization: Bearer <token>`` to each call it opens.
server: TokenInterceptor compares it in constant time before the method is looked up, so a caller
without the token learns nothing about what is served and no handler, request parser included, runs.

The channel is wrapped where calls are *opened* instead of intercepted: gRPC's own client
interceptors put a queue and a task between a stream and each of its messages, and token streams
would pay for that on every step.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from pdserve.errors import ConfigError, Unauthenticated
from pdserve.rpc.status import abort_with

HEADER = "authorization"

Metadata = Sequence[tuple[str, str | bytes]]


def bearer(token: str) -> str:
    """The header's value. ConfigError for a token that a header cannot carry."""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("the cluster's token must be printable ASCII without spaces, not empty")
    return f"Bearer {token}"


class _Opener:
    """A multi-callable of any of the four kinds whose calls carry ``metadata`` first."""

    def __init__(self, inner: Callable[..., Any], metadata: Metadata) -> None:
        self._inner = inner
        self._metadata = tuple(metadata)

    def __call__(self, *args: Any, metadata: Metadata | None = None, **options: Any) -> Any:
        return self._inner(*args, metadata=(*self._metadata, *(metadata or ())), **options)


class TokenChannel(grpc.aio.Channel):  # type: ignore[misc]
    """A channel of which every call carries the token. Owns, and closes, the channel inside."""

    def __init__(self, inner: grpc.aio.Channel, token: str) -> None:
        self._inner = inner
        self._metadata: Metadata = ((HEADER, bearer(token)),)

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return _Opener(self._inner.unary_unary(*args, **options), self._metadata)

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return _Opener(self._inner.unary_stream(*args, **options), self._metadata)

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return _Opener(self._inner.stream_unary(*args, **options), self._metadata)

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return _Opener(self._inner.stream_stream(*args, **options), self._metadata)

    async def __aenter__(self) -> TokenChannel:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._inner.__aexit__(kind, error, traceback)

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses, with UNAUTHENTICATED, every call that does not carry the token."""

    def __init__(self, token: str) -> None:
        self._expected = bearer(token).encode()
        # One kind of handler refuses all four kinds of call: it neither reads nor answers.
        self._refuse = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        if self._allowed(handler_call_details.invocation_metadata or ()):
            return await continuation(handler_call_details)
        return self._refuse

    def _allowed(self, metadata: Metadata) -> bool:
        given = [value for name, value in metadata if name == HEADER]
        if len(given) != 1:
            return False
        value = given[0]
        raw = value if isinstance(value, bytes) else value.encode()
        return hmac.compare_digest(raw, self._expected)


async def _refuse(_requests: object, context: grpc.aio.ServicerContext) -> None:
    await abort_with(context, Unauthenticated("this call needs the cluster's token"))
