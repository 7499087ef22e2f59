"""One request of a client across all of its attempts. No I/O: the sync and async clients share it.

request() -> accept(message)* -> finished
          -> failed(error) -> wait so long, request() again (resumes after the tokens that came)
                           -> or the error for the caller

Chunks are checked by their offset: one that repeats tokens or leaves some out is a ProtocolError,
so no caller ever sees a gap or a repeat.
"""

from __future__ import annotations

import random
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.client.options import ClientOptions, SamplingOptions
from pdserve.client.types import Answer, Chunk, Message, ModelInfo, Prompt
from pdserve.errors import (
    ConfigError,
    DeadlineExceeded,
    DuplicateRequest,
    InternalError,
    PdserveError,
    ProtocolError,
    WorkerLost,
)
from pdserve.rpc.convert import (
    finish_reason_from_proto,
    prompt_logprobs_from_proto,
    token_logprob_from_proto,
    usage_from_proto,
)
from pdserve.telemetry.trace_context import TRACEPARENT, TRACESTATE
from pdserve.types import FinishReason, Numerics
from pdserve.v1 import inference_pb2

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 1.0
SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Ask:
    """What the caller asked for; the same through all attempts."""

    prompt: Prompt
    sampling: SamplingOptions
    request_id: str = ""
    cache_salt: str = ""
    priority: int = 0
    model: str = ""
    generated_token_ids: Sequence[int] = ()
    timeout_s: float | None = None
    # W3C trace context, sent with every attempt: what is resumed stays in its trace.
    traceparent: str = ""
    tracestate: str = ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        headers = ((TRACEPARENT, self.traceparent), (TRACESTATE, self.tracestate))
        return tuple((name, value) for name, value in headers if value)


class Session:
    """Mints id and seed, remembers the tokens that came, decides what a failure means."""

    def __init__(self, ask: Ask, options: ClientOptions) -> None:
        self._ask = ask
        self._options = options
        self.metadata = (*options.metadata(), *ask.metadata())
        self.request_id = ask.request_id or uuid.uuid4().hex
        seed = ask.sampling.seed
        self._seed = secrets.randbits(SEED_BITS) if seed is None else seed
        self._tokens = list(ask.generated_token_ids)
        self._attempts = 0
        self._quiet = 0  # attempts since the last token
        timeout = options.timeout_s if ask.timeout_s is None else ask.timeout_s
        self._deadline = time.monotonic() + timeout
        self.finished = False
        self._heard = False
        self._failing_since: float | None = None  # since the last chunk, or the start

    def remaining_s(self) -> float:
        """Raises DeadlineExceeded."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"request {self.request_id}: no time is left")
        return left

    def request(self) -> inference_pb2.GenerateRequest:
        """The next attempt's message; all but the first take over what the last one began."""
        message = inference_pb2.GenerateRequest(
            request_id=self.request_id,
            sampling=self._ask.sampling.to_proto(self._seed),
            generated_token_ids=self._tokens,
            resume=self._attempts > 0,
            cache_salt=self._ask.cache_salt,
            priority=self._ask.priority,
            model=self._ask.model,
        )
        set_prompt(message, self._ask.prompt)
        self._attempts += 1
        self._quiet += 1
        return message

    def accept(self, message: inference_pb2.GenerateResponse) -> Chunk:
        """Raises ProtocolError for tokens out of order."""
        chunk = _chunk(message)
        if chunk.offset != len(self._tokens):
            raise ProtocolError(
                f"request {self.request_id}: token {chunk.offset} came where token "
                f"{len(self._tokens)} was due"
            )
        self._heard = True
        self._failing_since = None
        if chunk.token_ids:
            self._quiet = 0
        self._tokens.extend(chunk.token_ids)
        self.finished = chunk.finish is not None
        return chunk

    def failed(self, error: PdserveError) -> float:
        """Seconds to wait before the next attempt; raises the error if there shall be none."""
        again = isinstance(error, WorkerLost)
        if self._heard or self._attempts > 1:
            # It ran: a router that restarted may know no worker yet, or be full of those like us.
            # And the attempt that was lost on the way may still hold the id.
            again = again or error.retryable or isinstance(error, DuplicateRequest)
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        patience = self._deadline
        if not self._heard:
            patience = self._failing_since + self._options.connect_timeout_s
        wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self._quiet, 10))
        wait *= random.uniform(0.5, 1.0)  # nosec B311  # noqa: S311  (keeps no secret)
        if not again or now + wait >= min(patience, self._deadline):
            raise error
        return wait

    def ended(self) -> PdserveError:
        """What it means that a stream ended without its last message."""
        return WorkerLost(f"request {self.request_id}: the stream ended before its last message")


def collect(chunks: Sequence[Chunk]) -> Answer:
    """A whole stream's chunks as one answer."""
    if not chunks or chunks[-1].finish is None or chunks[-1].usage is None:
        raise InternalError("an answer has no last chunk")
    last = chunks[-1]
    finish: FinishReason = chunks[-1].finish
    return Answer(
        request_id=last.request_id,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        seed=last.seed,
        finish=finish,
        stop_string=last.stop_string,
        usage=chunks[-1].usage,
        logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        prompt_logprobs=tuple(entry for chunk in chunks for entry in chunk.prompt_logprobs),
    )


def set_prompt(
    message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest, prompt: Prompt
) -> None:
    """Raises TypeError for a prompt of another type."""
    if isinstance(prompt, str):
        message.text = prompt
        return
    items = list(prompt)
    if items and all(isinstance(item, Message) for item in items):
        message.chat.messages.extend(
            inference_pb2.ChatMessage(role=item.role, content=item.content, name=item.name)
            for item in items
            if isinstance(item, Message)
        )
        return
    if isinstance(message, inference_pb2.TokenizeRequest):
        raise TypeError("a prompt to tokenize is text or a chat")
    if not all(isinstance(item, int) for item in items):
        raise TypeError("a prompt is text, token ids or messages")
    message.token_ids.ids.extend(item for item in items if isinstance(item, int))
    message.token_ids.SetInParent()


def _chunk(message: inference_pb2.GenerateResponse) -> Chunk:
    finish = finish_reason_from_proto(message.finish_reason)
    if finish is not None and not message.HasField("usage"):
        raise ProtocolError("the last message has no usage")
    return Chunk(
        request_id=message.request_id,
        offset=message.offset,
        token_ids=tuple(message.token_ids),
        text=message.text,
        seed=message.seed,
        logprobs=tuple(token_logprob_from_proto(entry) for entry in message.logprobs),
        prompt_logprobs=prompt_logprobs_from_proto(message.prompt_logprobs),
        finish=finish,
        stop_string=message.stop_string,
        usage=None if finish is None else usage_from_proto(message.usage),
    )


def model_info(message: inference_pb2.GetModelResponse) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        block_size=message.block_size,
        dtype=message.dtype,
        numerics=Numerics(message.numerics) if message.numerics else None,
        fingerprint=message.fingerprint,
    )


def check_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"address {address!r} is not of the form host:port")
    return address
