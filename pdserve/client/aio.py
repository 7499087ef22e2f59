"""The asynchronous client. See pdserve.client for what a request goes through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from pdserve.client.options import ClientOptions, SamplingOptions
from pdserve.client.session import (
    Ask,
    Session,
    check_address,
    collect,
    model_info,
    set_prompt,
)
from pdserve.client.types import Answer, Chunk, ModelInfo, Prompt
from pdserve.errors import PdserveError
from pdserve.rpc.status import from_rpc_error
from pdserve.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """Connects lazily; use as an async context manager or ``close`` it."""

    def __init__(self, address: str, options: ClientOptions | None = None) -> None:
        """``address``: host:port of the router's gRPC front. Raises ConfigError."""
        self._options = options or ClientOptions()
        self._address = check_address(address)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        cache_salt: str = "",
        priority: int = 0,
        model: str = "",
        generated_token_ids: Sequence[int] = (),
        timeout_s: float | None = None,
        traceparent: str = "",
        tracestate: str = "",
        **sampling: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Yields chunks without gap or repeat; ``sampling``: the fields of SamplingOptions.

        Raises PdserveError. Closing the generator cancels the request.
        """
        ask = Ask(
            prompt,
            SamplingOptions(**sampling),
            request_id,
            cache_salt,
            priority,
            model,
            generated_token_ids,
            timeout_s,
            traceparent,
            tracestate,
        )
        session = Session(ask, self._options)
        while True:
            try:
                async with contextlib.aclosing(self._attempt(session)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                if session.finished:
                    return
                failure: PdserveError = session.ended()
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
            await asyncio.sleep(session.failed(failure))

    async def generate(self, prompt: Prompt, **options: Any) -> Answer:
        """The whole answer; takes what ``stream`` takes."""
        return collect([chunk async for chunk in self.stream(prompt, **options)])

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool | None = None
    ) -> tuple[int, ...]:
        message = inference_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
        set_prompt(message, prompt)
        response = await self._unary("Tokenize", message)
        return tuple(response.token_ids)

    async def model(self) -> ModelInfo:
        return model_info(await self._unary("GetModel", inference_pb2.GetModelRequest()))

    async def _attempt(self, session: Session) -> AsyncGenerator[Chunk, None]:
        call = self._stub().Generate(
            session.request(),
            timeout=session.remaining_s(),
            metadata=session.metadata,
        )
        try:
            async for message in call:
                yield session.accept(message)
        finally:
            call.cancel()  # does nothing to a call that has ended

    async def _unary(self, method: str, message: Any) -> Any:
        call = getattr(self._stub(), method)
        try:
            return await call(
                message,
                timeout=self._options.connect_timeout_s,
                metadata=self._options.metadata(),
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def _stub(self) -> Any:
        """Made on the loop that uses it."""
        if self._channel is None:
            credentials = self._options.credentials()
            options = self._options.channel_options()
            self._channel = (
                grpc.aio.insecure_channel(self._address, options=options)
                if credentials is None
                else grpc.aio.secure_channel(self._address, credentials, options=options)
            )
        return inference_pb2_grpc.InferenceStub(self._channel)
