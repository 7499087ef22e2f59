"""The fields of OpenAI's two endpoints, and what each means here: read, ignored, or refused.

A JSON object in, an Ask out. Fields that change nothing about the answer are ignored; fields whose
meaning we cannot honour are Unsupported unless their value asks for nothing; any other name is an
InvalidRequest that names the nearest field there is. null is the same as absent. Values that are
only passed on are checked in validation.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.errors import InvalidRequest, Unsupported
from router import fields
from router.requests import RawChat, RawIds, RawPrompt, RawRequest, RawText

Body = Mapping[str, object]

# What OpenAI's completions endpoint writes when nothing else is said.
DEFAULT_COMPLETION_TOKENS = 16


class Kind(enum.Enum):
    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: what to generate (raw), and how to present it (checked)."""

    kind: Kind
    raw: RawRequest
    stream: bool
    include_usage: bool
    continuous_usage: bool  # in every chunk, of its choice so far
    echo: bool
    # Alternatives to list with each token; None lists nothing.
    logprobs: int | None
    prompt_logprobs: bool
    return_token_ids: bool


# OpenAI's, and one that servers of open models and their load generators share.
_STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")
# Passed on by the names of the proto.
_PASSED = frozenset(
    {
        "model",
        "request_id",
        "n",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "prompt_logprobs",
        "seed",
        "include_stop_str_in_output",
        "skip_special_tokens",
        "generated_token_ids",
        "resume",
        "cache_salt",
        "priority",
    }
)
_SHARED = _PASSED | {
    "stream",
    "stream_options",
    "logprobs",
    "add_special_tokens",
    "return_token_ids",
    "best_of",
}
READ = {
    Kind.CHAT: _SHARED
    | {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    },
    Kind.COMPLETION: _SHARED | {"prompt", "echo"},
}
_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
# Name -> the values beside null that ask for nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "documents": ([],),
    "chat_template": (),
    "mm_processor_kwargs": ({},),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "kv_transfer_params": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True, False),
    "detokenize": (True,),
}


def parse(kind: Kind, body: Body, *, max_prompts: int) -> Ask:
    """Raises InvalidRequest."""
    check_names(body, READ[kind])
    _check_best_of(body)
    stream = _flag(body, "stream")
    echo = kind is Kind.COMPLETION and _flag(body, "echo")
    passed = {name: body[name] for name in _PASSED if body.get(name) is not None}
    labels: dict[str, str] = {}
    if kind is Kind.CHAT:
        logprobs = _chat_logprobs(body)
        prompts: tuple[RawPrompt, ...] = (chat_prompt(body),)
        _chat_length(body, passed, labels)
        labels["logprobs"] = "top_logprobs"
    else:
        logprobs = body.get("logprobs")
        prompts = _prompts(body, max_prompts)
        if echo and logprobs is not None:
            passed.setdefault("prompt_logprobs", logprobs)
    if logprobs is not None:
        passed["logprobs"] = logprobs
    options = _stream_options(body)
    return Ask(
        kind=kind,
        raw=RawRequest(
            prompts=prompts,
            fields=passed,
            default_max_tokens=None if kind is Kind.CHAT else DEFAULT_COMPLETION_TOKENS,
            labels=labels,
        ),
        stream=stream,
        include_usage=stream and options["include_usage"],
        continuous_usage=stream and options["include_usage"] and options["continuous_usage_stats"],
        echo=echo,
        logprobs=logprobs if isinstance(logprobs, int) else None,
        prompt_logprobs=body.get("prompt_logprobs") is not None,
        return_token_ids=_flag(body, "return_token_ids"),
    )


def check_names(body: Body, read: frozenset[str]) -> None:
    """Every name is read, harmless, or has a value that asks for nothing."""
    for name, value in body.items():
        if name in read or name in _IGNORED:
            continue
        if name not in NEUTRAL:
            raise _unknown(name, read)
        neutral = NEUTRAL[name]
        if value is not None and not any(type(value) is type(ok) and value == ok for ok in neutral):
            raise Unsupported(
                f"{name}: {fields.show(value)} is not supported by this server", param=name
            )


def _unknown(name: str, read: frozenset[str]) -> InvalidRequest:
    near = difflib.get_close_matches(name[:64], read, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InvalidRequest(f"{fields.show(name)}: there is no such field{hint}", param=name[:64])


def chat_prompt(body: Body) -> RawChat:
    if body.get("messages") is None:
        raise InvalidRequest("messages: is required", param="messages")
    return RawChat(
        "messages",
        body["messages"],
        add_generation_prompt=body.get("add_generation_prompt"),
        continue_final_message=body.get("continue_final_message"),
        template_kwargs=body.get("chat_template_kwargs"),
        add_special_tokens=body.get("add_special_tokens"),
    )


def _prompts(body: Body, max_prompts: int) -> tuple[RawPrompt, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    value = body.get("prompt")
    special = body.get("add_special_tokens")
    if value is None:
        raise InvalidRequest("prompt: is required", param="prompt")
    if isinstance(value, str):
        return (RawText("prompt", value, special),)
    if not isinstance(value, list):
        raise fields.refuse("prompt", value, "a string, token ids, or a list of either")
    if not value:
        raise InvalidRequest("prompt: must not be empty", param="prompt")
    if not isinstance(value[0], (str, list)):
        return (RawIds("prompt", value),)
    if len(value) > max_prompts:
        raise InvalidRequest(
            f"prompt: {len(value)} prompts are more than the {max_prompts} allowed", param="prompt"
        )
    return tuple(
        RawIds(f"prompt[{at}]", item)
        if isinstance(value[0], list)
        else RawText(f"prompt[{at}]", item, special)
        for at, item in enumerate(value)
    )


def _flag(body: Body, name: str) -> bool:
    value = body.get(name)
    return False if value is None else fields.boolean(name, value)


def _check_best_of(body: Body) -> None:
    """Choosing among more sequences than are answered is not offered."""
    best_of = body.get("best_of")
    if best_of is None:
        return
    n = 1 if body.get("n") is None else body["n"]
    if fields.integer("best_of", best_of, 1, 2**31 - 1) != n:
        raise Unsupported(
            f"best_of: {best_of} is not supported unless it equals n, {fields.show(n)}",
            param="best_of",
        )


def _chat_logprobs(body: Body) -> object:
    """The number of alternatives (checked later), or None for no log-probabilities at all."""
    wanted = _flag(body, "logprobs")
    top = body.get("top_logprobs")
    if not wanted and top is not None and top != 0:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    if not wanted:
        return None
    return 0 if top is None else top


def _chat_length(body: Body, passed: dict[str, object], labels: dict[str, str]) -> None:
    """max_completion_tokens is the newer name of max_tokens."""
    newer, older = body.get("max_completion_tokens"), body.get("max_tokens")
    if newer is None:
        return
    if older is not None and older != newer:
        raise InvalidRequest(
            f"max_tokens: {fields.show(older)} contradicts max_completion_tokens, "
            f"{fields.show(newer)}",
            param="max_tokens",
        )
    passed["max_tokens"] = newer
    labels["max_tokens"] = "max_completion_tokens"


def _stream_options(body: Body) -> dict[str, bool]:
    """Each option of a stream, False where it is not given."""
    value = body.get("stream_options")
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise fields.refuse("stream_options", value, "an object")
    for name, item in value.items():
        if name not in _STREAM_OPTIONS:
            raise InvalidRequest(
                f"stream_options: {fields.show(name)} is not a field of it; "
                f"{', '.join(_STREAM_OPTIONS)} are",
                param="stream_options",
            )
        if item is not None:
            fields.boolean(f"stream_options.{name}", item)
    return {name: value.get(name) is True for name in _STREAM_OPTIONS}
