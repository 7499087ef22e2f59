"""The public gRPC messages and what the fronts share: requests in, deltas out. Pure functions.

Messages are parsed here and not by gRPC, which would report a string that is not UTF-8 as a fault
of the server. Unknown fields are ignored, as protobuf does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from pdserve.errors import InvalidRequest
from pdserve.rpc.convert import (
    finish_reason_to_proto,
    prompt_logprobs_to_proto,
    token_logprob_to_proto,
    usage_to_proto,
)
from pdserve.types import ModelFacts
from pdserve.v1 import inference_pb2
from router.requests import RawChat, RawIds, RawPrompt, RawRequest, RawText
from router.text import TextDelta

M = TypeVar("M", bound=Message)

# Fields of SamplingParams with presence: absent ones take the model's defaults.
_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
    "seed",
    "skip_special_tokens",
)


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidRequest for bytes that are no such message."""
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        name = message.DESCRIPTOR.full_name
        raise InvalidRequest(
            f"the request is not a valid {name}: broken, or it holds text that is not UTF-8"
        ) from None
    return message


def raw_request(message: inference_pb2.GenerateRequest) -> RawRequest:
    """Raises InvalidRequest where there is no prompt."""
    values: dict[str, object] = {
        "request_id": message.request_id,
        "generated_token_ids": list(message.generated_token_ids),
        "resume": message.resume,
        "cache_salt": message.cache_salt,
        "priority": message.priority,
        "model": message.model,
        **_sampling(message.sampling),
    }
    return RawRequest(prompts=(_prompt(message),), fields=values)


def _sampling(params: inference_pb2.SamplingParams) -> Mapping[str, object]:
    present: dict[str, object] = {
        name: getattr(params, name) for name in _OPTIONAL if params.HasField(name)
    }
    return {
        **present,
        "logit_bias": dict(params.logit_bias),
        "min_tokens": params.min_tokens,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
        "include_stop_str_in_output": params.include_stop_str_in_output,
    }


def _prompt(message: inference_pb2.GenerateRequest) -> RawPrompt:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return RawText("text", message.text)
    if kind == "token_ids":
        return RawIds("token_ids", list(message.token_ids.ids))
    if kind == "chat":
        return _chat(message.chat)
    raise InvalidRequest("prompt: is required: text, token_ids or chat", param="prompt")


def tokenize_prompt(message: inference_pb2.TokenizeRequest) -> RawPrompt:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        special = message.add_special_tokens if message.HasField("add_special_tokens") else None
        return RawText("text", message.text, special)
    if kind == "chat":
        return _chat(message.chat)
    raise InvalidRequest("prompt: is required: text or chat", param="prompt")


def _chat(chat: inference_pb2.Chat) -> RawChat:
    return RawChat(
        "chat.messages",
        [_message(message) for message in chat.messages],
        add_generation_prompt=_optional(chat, "add_generation_prompt"),
        continue_final_message=_optional(chat, "continue_final_message"),
    )


def _message(message: inference_pb2.ChatMessage) -> dict[str, object]:
    values: dict[str, object] = {"role": message.role, "content": message.content}
    return {**values, "name": message.name} if message.name else values


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def response(request_id: str, seed: int, delta: TextDelta) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse(
        request_id=request_id,
        offset=delta.offset,
        token_ids=[token.token_id for token in delta.tokens],
        text=delta.text,
        logprobs=[
            token_logprob_to_proto(token.logprob)
            for token in delta.tokens
            if token.logprob is not None
        ],
        finish_reason=finish_reason_to_proto(delta.finish),
        seed=seed,
        prompt_logprobs=prompt_logprobs_to_proto(delta.prompt_logprobs),
        stop_string=delta.stop_string or "",
    )
    if delta.finish is not None:
        message.usage.CopyFrom(usage_to_proto(delta.usage))
    return message


def model_response(
    name: str, max_model_len: int, vocab_size: int, facts: ModelFacts | None
) -> inference_pb2.GetModelResponse:
    """What no worker has told yet stays empty."""
    message = inference_pb2.GetModelResponse(
        name=name, max_model_len=max_model_len, vocab_size=vocab_size
    )
    if facts is not None:
        message.block_size = facts.block_size
        message.dtype = facts.dtype
        message.numerics = facts.numerics.value
        message.fingerprint = facts.fingerprint.hex()
    return message
