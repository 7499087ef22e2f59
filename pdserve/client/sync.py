"""The blocking client. See pdserve.client for what a request goes through."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any

import grpc

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


class Client:
    """Connects lazily; may be used from several threads. ``close`` it, or use it in ``with``."""

    def __init__(self, address: str, options: ClientOptions | None = None) -> None:
        """``address``: host:port of the router's gRPC front. Raises ConfigError."""
        self._options = options or ClientOptions()
        credentials = self._options.credentials()
        channel_options = self._options.channel_options()
        target = check_address(address)
        self._channel = (
            grpc.insecure_channel(target, options=channel_options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=channel_options)
        )
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def stream(
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
    ) -> Generator[Chunk, None, None]:
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
                yield from self._attempt(session)
                if session.finished:
                    return
                failure: PdserveError = session.ended()
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
            time.sleep(session.failed(failure))

    def generate(self, prompt: Prompt, **options: Any) -> Answer:
        """The whole answer; takes what ``stream`` takes."""
        return collect(list(self.stream(prompt, **options)))

    def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool | None = None
    ) -> tuple[int, ...]:
        message = inference_pb2.TokenizeRequest(add_special_tokens=add_special_tokens)
        set_prompt(message, prompt)
        return tuple(self._unary(self._stub.Tokenize, message).token_ids)

    def model(self) -> ModelInfo:
        return model_info(self._unary(self._stub.GetModel, inference_pb2.GetModelRequest()))

    def _attempt(self, session: Session) -> Generator[Chunk, None, None]:
        call = self._stub.Generate(
            session.request(),
            timeout=session.remaining_s(),
            metadata=session.metadata,
        )
        try:
            for message in call:
                yield session.accept(message)
        finally:
            call.cancel()  # does nothing to a call that has ended

    def _unary(self, call: Any, message: Any) -> Any:
        try:
            return call(
                message,
                timeout=self._options.connect_timeout_s,
                metadata=self._options.metadata(),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
