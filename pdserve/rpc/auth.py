"""Credentials on internal calls: attached by every client, demanded by every server.

client: TokenChannel adds ``authorization: Bearer <credential>`` to each call it opens.
server: RoleInterceptor asks the process's Identity who calls and whether that role may, before the
method is looked up: a caller without a credential learns nothing about what is served, and no
handler, request parser included, runs.

The channel is wrapped where calls are *opened* instead of intercepted: gRPC's own client
interceptors put a queue and a task between a stream and each of its messages, and token streams
would pay for that on every step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from pdserve.errors import PdserveError, Unauthenticated
from pdserve.rpc.identity import POLICY, Identity, Policy
from pdserve.rpc.status import abort_with

HEADER = "authorization"

Metadata = Sequence[tuple[str, str | bytes]]


class _Opener:
    """A multi-callable of any of the four kinds whose calls carry ``metadata`` first."""

    def __init__(self, inner: Callable[..., Any], metadata: Metadata) -> None:
        self._inner = inner
        self._metadata = tuple(metadata)

    def __call__(self, *args: Any, metadata: Metadata | None = None, **options: Any) -> Any:
        return self._inner(*args, metadata=(*self._metadata, *(metadata or ())), **options)


class TokenChannel(grpc.aio.Channel):  # type: ignore[misc]
    """A channel whose calls carry the caller's credential. Owns, and closes, the channel inside."""

    def __init__(self, inner: grpc.aio.Channel, identity: Identity) -> None:
        self._inner = inner
        self._identity = identity

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return self._opener(method, self._inner.unary_unary(method, *args, **options))

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return self._opener(method, self._inner.unary_stream(method, *args, **options))

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        return self._opener(method, self._inner.stream_unary(method, *args, **options))

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        return self._opener(method, self._inner.stream_stream(method, *args, **options))

    def _opener(self, method: str, inner: Callable[..., Any]) -> _Opener:
        return _Opener(inner, ((HEADER, self._identity.header(method)),))

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


class RoleInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call whose caller is not known, or whose role the policy does not name."""

    def __init__(self, identity: Identity, policy: Policy = POLICY) -> None:
        self._identity = identity
        self._policy = policy

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        metadata: Metadata = handler_call_details.invocation_metadata or ()
        given = [value for name, value in metadata if name == HEADER]
        try:
            if len(given) != 1:
                raise Unauthenticated("this call needs a credential of the cluster")
            self._identity.judge(given[0], handler_call_details.method, self._policy)
        except PdserveError as error:
            return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: PdserveError) -> grpc.RpcMethodHandler:
    """One kind of handler refuses all four kinds of call: it neither reads nor answers."""

    async def refuse(_requests: object, context: grpc.aio.ServicerContext) -> None:
        await abort_with(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
