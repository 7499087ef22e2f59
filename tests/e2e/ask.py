"""A plain gRPC caller of a cluster's public service: many requests at once, answers as values."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    text: str
    finish: str
    usage: pb.Usage
    seed: int
    offsets: tuple[int, ...]
    logprobs: tuple[pb.TokenLogprob, ...] = ()
    prompt_logprobs: tuple[pb.TokenLogprob, ...] = ()

    @property
    def cached(self) -> pb.CachedTokens:
        return self.usage.cached_tokens


@dataclass
class Caller:
    """Owns one channel. ``timeout`` in seconds bounds every call."""

    address: str
    timeout: float = 120.0
    channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.address)
        self.stub = pb_grpc.InferenceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def stream(self, request: pb.GenerateRequest) -> Answer:
        tokens: list[int] = []
        text: list[str] = []
        offsets: list[int] = []
        logprobs: list[pb.TokenLogprob] = []
        prompt_logprobs: list[pb.TokenLogprob] = []
        last = pb.GenerateResponse()
        for chunk in self.stub.Generate(request, timeout=self.timeout):
            assert chunk.offset == len(request.generated_token_ids) + len(tokens), "gap or repeat"
            offsets.append(chunk.offset)
            tokens.extend(chunk.token_ids)
            text.append(chunk.text)
            logprobs.extend(chunk.logprobs)
            prompt_logprobs.extend(chunk.prompt_logprobs)
            last = chunk
        assert last.finish_reason != pb.FINISH_REASON_UNSPECIFIED, "the stream has no ending"
        return Answer(
            tuple(tokens),
            "".join(text),
            pb.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower(),
            last.usage,
            last.seed,
            tuple(offsets),
            tuple(logprobs),
            tuple(prompt_logprobs),
        )

    def ask(
        self,
        prompt: Sequence[int] | str,
        max_tokens: int = 16,
        *,
        generated: Sequence[int] = (),
        cache_salt: str = "",
        request_id: str = "",
        **sampling: Any,
    ) -> Answer:
        return self.stream(
            request(
                prompt,
                max_tokens,
                generated=generated,
                cache_salt=cache_salt,
                request_id=request_id,
                **sampling,
            )
        )

    def ask_all(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
        """All at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.ask(prompt, max_tokens), prompts))


def request(
    prompt: Sequence[int] | str,
    max_tokens: int,
    *,
    generated: Sequence[int] = (),
    cache_salt: str = "",
    request_id: str = "",
    **sampling: Any,
) -> pb.GenerateRequest:
    """Greedy unless ``temperature`` says otherwise."""
    sampling.setdefault("temperature", 0.0)
    made = pb.GenerateRequest(
        request_id=request_id,
        sampling=pb.SamplingParams(max_tokens=max_tokens, **sampling),
        generated_token_ids=generated,
        cache_salt=cache_salt,
    )
    if isinstance(prompt, str):
        made.text = prompt
    else:
        made.token_ids.ids.extend(prompt)
    return made
