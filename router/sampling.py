"""Sampling fields of a request: limits and defaults, one place for every front.

check_sampling(raw)           -> Checked    (needs no tokens; runs first, so bad values answer fast)
resolve(checked, prompt, ...) -> Sampling   (needs the prompt's length)
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass

from pdserve.config import RouterConfig
from pdserve.errors import ContextTooLong, InvalidRequest
from pdserve.types import Sampling
from router import fields
from router.model_files import SamplingDefaults
from router.requests import RawRequest, TextOptions

MAX_BIAS_ENTRIES = 1024
MAX_BIAS = 100.0
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 256
MAX_TEMPERATURE = 100.0
MAX_REPETITION = 100.0
MAX_INT = 2**31 - 1
# A seed that JSON readers with 53-bit numbers hand back unchanged.
MINTED_SEED_BITS = 53
# Below this, dividing logits by the temperature overflows: greedy is meant.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model allows."""

    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...]
    defaults: SamplingDefaults


@dataclass(frozen=True, slots=True)
class Checked:
    """Everything but the length, which depends on the prompt."""

    max_tokens: int | None
    n: int
    text: TextOptions
    base: Sampling


class _Reader:
    """The fields of one request, by our names; errors carry the client's."""

    def __init__(self, raw: RawRequest) -> None:
        self._raw = raw

    def value(self, name: str) -> tuple[str, object]:
        return self._raw.label(name), self._raw.fields.get(name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        label, value = self.value(name)
        return None if value is None else fields.integer(label, value, low, high)

    def number(
        self, name: str, low: float, high: float, default: float, *, above: bool = False
    ) -> float:
        label, value = self.value(name)
        return default if value is None else fields.number(label, value, low, high, above=above)

    def boolean(self, name: str, default: bool) -> bool:
        label, value = self.value(name)
        return default if value is None else fields.boolean(label, value)


def check_sampling(raw: RawRequest, limits: Limits, config: RouterConfig) -> Checked:
    """Raises InvalidRequest, which names the field."""
    read = _Reader(raw)
    defaults = limits.defaults
    temperature = read.number("temperature", 0, MAX_TEMPERATURE, defaults.temperature)
    min_tokens = read.integer("min_tokens", 0, MAX_INT) or 0
    max_tokens = read.integer("max_tokens", 1, MAX_INT)
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: {min_tokens} is more than {raw.label('max_tokens')}, {max_tokens}",
            param="min_tokens",
        )
    seed = read.integer("seed", 0, 2**64 - 1)
    base = Sampling(
        max_tokens=0,
        temperature=0.0 if temperature < LEAST_TEMPERATURE else temperature,
        top_k=_top_k(read, defaults.top_k, limits.vocab_size),
        top_p=read.number("top_p", 0, 1, defaults.top_p, above=True),
        min_p=read.number("min_p", 0, 1, defaults.min_p),
        presence_penalty=read.number("presence_penalty", -2, 2, 0.0),
        frequency_penalty=read.number("frequency_penalty", -2, 2, 0.0),
        repetition_penalty=read.number(
            "repetition_penalty", 0, MAX_REPETITION, defaults.repetition_penalty, above=True
        ),
        logit_bias=_bias(read, limits),
        min_tokens=min_tokens,
        stop_token_ids=_stop_ids(read, limits),
        logprobs=read.integer("logprobs", 0, config.max_logprobs),
        prompt_logprobs=read.integer("prompt_logprobs", 0, config.max_logprobs),
        seed=secrets.randbits(MINTED_SEED_BITS) if seed is None else seed,
    )
    n = read.integer("n", 1, config.max_n) or 1
    return Checked(max_tokens, n, _text_options(read, config), base)


def _top_k(read: _Reader, default: int, vocab_size: int) -> int:
    """0 and -1 both mean off; more than the vocabulary means the same."""
    top_k = read.integer("top_k", -1, MAX_INT)
    value = default if top_k is None else max(0, top_k)
    return 0 if value >= vocab_size else value


def _bias(read: _Reader, limits: Limits) -> tuple[tuple[int, float], ...]:
    label, value = read.value("logit_bias")
    if value is None:
        return ()
    return fields.bias(
        label, value, limits.vocab_size, max_items=MAX_BIAS_ENTRIES, largest=MAX_BIAS
    )


def _stop_ids(read: _Reader, limits: Limits) -> tuple[int, ...]:
    label, value = read.value("stop_token_ids")
    given = () if value is None else fields.token_ids(label, value, limits.vocab_size)
    if len(given) > MAX_STOP_IDS:
        raise InvalidRequest(
            f"{label}: {len(given)} ids are more than the {MAX_STOP_IDS} allowed", param=label
        )
    eos = () if read.boolean("ignore_eos", False) else limits.eos_ids
    return tuple(sorted({*given, *eos}))


def _text_options(read: _Reader, config: RouterConfig) -> TextOptions:
    label, value = read.value("stop")
    stop = (
        ()
        if value is None
        else fields.string_list(
            label, value, max_items=config.max_stop_strings, max_chars=MAX_STOP_CHARS
        )
    )
    return TextOptions(
        stop=tuple(dict.fromkeys(stop)),
        include_stop=read.boolean("include_stop_str_in_output", False),
        skip_special_tokens=read.boolean("skip_special_tokens", True),
    )


def resolve_length(
    checked: Checked, prompt_tokens: int, limits: Limits, raw: RawRequest, prompt_name: str
) -> int:
    """max_tokens, counted from the end of the prompt. Raises ContextTooLong with the figures."""
    context = limits.max_model_len
    room = context - prompt_tokens
    if room < 1:
        raise ContextTooLong(
            f"{prompt_name}: {prompt_tokens} tokens leave no room for an answer in the model's "
            f"context of {context} tokens",
            param=prompt_name,
        )
    if checked.max_tokens is not None:
        label = raw.label("max_tokens")
        if checked.max_tokens > room:
            raise ContextTooLong(
                f"{label}: a prompt of {prompt_tokens} tokens and {label} of {checked.max_tokens} "
                f"are {prompt_tokens + checked.max_tokens} tokens; the model's context is "
                f"{context}, which leaves {room}",
                param=label,
            )
        return checked.max_tokens
    default = math.inf if raw.default_max_tokens is None else raw.default_max_tokens
    # min_tokens asks for at least so many; a default never contradicts it.
    length = int(min(room, max(default, checked.base.min_tokens)))
    if checked.base.min_tokens > length:
        raise ContextTooLong(
            f"min_tokens: {checked.base.min_tokens} is more than the {room} tokens that a prompt "
            f"of {prompt_tokens} leaves in the model's context of {context}",
            param="min_tokens",
        )
    return length


def child_seed(seed: int, index: int) -> int:
    """The seed of choice ``index``; the first one's is the request's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(
        seed.to_bytes(8, "big") + index.to_bytes(4, "big"), digest_size=8, person=b"child-seed"
    )
    return int.from_bytes(digest.digest(), "big")
