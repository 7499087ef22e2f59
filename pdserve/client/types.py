"""What a client of pdserve passes in and gets back; immutable, free of gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.types import FinishReason, Numerics, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str
    name: str = ""


# Text, token ids, or a chat. A plain sequence of messages asks for an assistant's answer.
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens of an answer and the text that they made certain; the last has ``finish``."""

    request_id: str
    offset: int  # index of token_ids[0] among all generated tokens
    token_ids: tuple[int, ...]
    text: str
    seed: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: FinishReason | None = None
    stop_string: str = ""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    seed: int
    finish: FinishReason
    stop_string: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    max_model_len: int
    vocab_size: int
    block_size: int  # 0 until a worker was seen, as what follows is empty
    dtype: str
    numerics: Numerics | None
    fingerprint: str
