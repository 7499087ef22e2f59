"""Answers in the shapes of OpenAI's two endpoints: whole ones and the chunks of streams.

Answer(ask, prepared) -> chunk(event)* -> last_usage()       streamed
Answer(ask, prepared) -> take(event)*  -> whole()            at once

Beside OpenAI's fields, ``usage`` has an object ``pdserve`` that says how the answer was made, and a
stream's first chunk of each choice has one with the seed, so that it can be resumed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pdserve.types import TokenLogprob, TokenOut, Usage
from router import openai_logprobs
from router.openai_fields import Ask, Kind
from router.requests import Prepared
from router.text import TextDelta
from router.tokens import TokenService

_PREFIX = {Kind.CHAT: "chatcmpl-", Kind.COMPLETION: "cmpl-"}
_OBJECT = {Kind.CHAT: "chat.completion", Kind.COMPLETION: "text_completion"}
_CHUNK = {Kind.CHAT: "chat.completion.chunk", Kind.COMPLETION: "text_completion"}


@dataclass(slots=True)
class _Choice:
    """What is kept of one choice; the pieces only where the answer is given at once."""

    logprobs: openai_logprobs.CompletionLogprobs
    started: bool = False
    usage: Usage | None = None
    finish: str | None = None
    stop_string: str | None = None
    text: list[str] = field(default_factory=list)
    logprob_parts: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class Answer:
    def __init__(
        self, ask: Ask, prepared: Prepared, tokens: TokenService, echo_texts: tuple[str, ...]
    ) -> None:
        """``echo_texts``: each prompt's text; used only where the ask echoes."""
        self._ask = ask
        self._prepared = prepared
        self._tokens = tokens
        self._echo_texts = echo_texts
        self._head = {
            "id": _PREFIX[ask.kind] + prepared.request_id,
            "created": int(time.time()),
            "model": tokens.model.name,
        }
        self._choices = [_Choice(openai_logprobs.CompletionLogprobs(tokens)) for _ in prepared.jobs]

    # ---- streamed -------------------------------------------------------------------------------

    def chunk(self, index: int, delta: TextDelta) -> dict[str, Any] | None:
        """None where the delta has nothing to show yet (its text is held back)."""
        choice = self._choices[index]
        choice.usage = delta.usage
        first = not choice.started
        text = self._text(index, delta, first)
        logprobs = self._logprobs(index, delta, first)
        if not (first or text or logprobs or delta.finish or self._ask.return_token_ids):
            return None
        choice.started = True
        shown: dict[str, Any] = {"index": index}
        if self._ask.kind is Kind.CHAT:
            role = {"role": "assistant"} if first else {}
            shown["delta"] = {**role, "content": text} if text or first else {}
        else:
            shown["text"] = text
        shown["logprobs"] = logprobs
        shown["finish_reason"] = None if delta.finish is None else delta.finish.value
        if delta.finish is not None:
            shown["stop_reason"] = delta.stop_string
        if self._ask.return_token_ids:
            shown["token_ids"] = [token.token_id for token in delta.tokens]
        if first:
            shown["pdserve"] = {"seed": self._prepared.jobs[index].sampling.seed}
            if self._ask.prompt_logprobs:
                shown["prompt_logprobs"] = openai_logprobs.prompt(
                    delta.prompt_logprobs, self._tokens
                )
        result = {**self._head, "object": _CHUNK[self._ask.kind], "choices": [shown]}
        if self._ask.continuous_usage:
            return {**result, "usage": _so_far(delta.usage)}
        return {**result, "usage": None} if self._ask.include_usage else result

    def last_usage(self) -> dict[str, Any]:
        """The chunk that closes a stream with include_usage."""
        return {
            **self._head,
            "object": _CHUNK[self._ask.kind],
            "choices": [],
            "usage": self.usage(),
        }

    # ---- at once --------------------------------------------------------------------------------

    def take(self, index: int, delta: TextDelta) -> None:
        choice = self._choices[index]
        first = not choice.started
        choice.started = True
        choice.usage = delta.usage
        choice.text.append(self._text(index, delta, first))
        logprobs = self._logprobs(index, delta, first)
        if logprobs is not None:
            choice.logprob_parts.append(logprobs)
        if self._ask.return_token_ids:
            choice.token_ids.extend(token.token_id for token in delta.tokens)
        if delta.prompt_logprobs:
            choice.prompt_logprobs = delta.prompt_logprobs
        if delta.finish is not None:
            choice.finish = delta.finish.value
            choice.stop_string = delta.stop_string

    def whole(self) -> dict[str, Any]:
        result = {
            **self._head,
            "object": _OBJECT[self._ask.kind],
            "choices": [self._whole_choice(index) for index in range(len(self._choices))],
            "usage": self.usage(),
        }
        if self._ask.kind is Kind.CHAT and self._ask.prompt_logprobs:
            result["prompt_logprobs"] = openai_logprobs.prompt(
                self._choices[0].prompt_logprobs, self._tokens
            )
        return result

    def _whole_choice(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        text = "".join(choice.text)
        shown: dict[str, Any] = {"index": index}
        if self._ask.kind is Kind.CHAT:
            shown["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            shown["text"] = text
            if self._ask.prompt_logprobs:
                shown["prompt_logprobs"] = openai_logprobs.prompt(
                    choice.prompt_logprobs, self._tokens
                )
        parts = choice.logprob_parts
        shown["logprobs"] = openai_logprobs.merge(parts) if parts else None
        shown["finish_reason"] = choice.finish
        shown["stop_reason"] = choice.stop_string
        if self._ask.return_token_ids:
            shown["prompt_token_ids"] = list(self._prepared.jobs[index].prompt)
            shown["token_ids"] = choice.token_ids
        return shown

    # ---- both -----------------------------------------------------------------------------------

    def usage(self) -> dict[str, Any]:
        """Each prompt counts once, however many answers it got."""
        empty = Usage(prompt_tokens=0, completion_tokens=0)
        usages = [choice.usage or empty for choice in self._choices]
        firsts = usages[:: self._prepared.n]
        prompt = sum(usage.prompt_tokens for usage in firsts)
        completion = sum(usage.completion_tokens for usage in usages)
        made = [
            how_made(usage, job.sampling.seed)
            for usage, job in zip(usages, self._prepared.jobs, strict=True)
        ]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens.total for usage in firsts)
            },
            "pdserve": made[0] if len(made) == 1 else {**made[0], "choices": made},
        }

    def _text(self, index: int, delta: TextDelta, first: bool) -> str:
        if first and self._ask.echo:
            return self._echo_texts[index // self._prepared.n] + delta.text
        return delta.text

    def _logprobs(self, index: int, delta: TextDelta, first: bool) -> dict[str, Any] | None:
        if self._ask.logprobs is None:
            return None
        if self._ask.kind is Kind.CHAT:
            return openai_logprobs.chat(delta.tokens, self._tokens) if delta.tokens else None
        entries = self._choices[index].logprobs
        parts = []
        if first and self._ask.echo:
            prompt = self._prepared.jobs[index].prompt
            known = delta.prompt_logprobs or (None,) * len(prompt)
            parts.append(entries.entries(prompt, known))
        if delta.tokens:
            parts.append(entries.entries(*_split(delta.tokens)))
        return openai_logprobs.merge(parts) if parts else None


def _so_far(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _split(tokens: tuple[TokenOut, ...]) -> tuple[list[int], list[TokenLogprob | None]]:
    return [token.token_id for token in tokens], [token.logprob for token in tokens]


def how_made(usage: Usage, seed: int) -> dict[str, Any]:
    """Workers, tiers and bytes behind one choice: the proto's Usage by the same names."""
    return {
        "seed": seed,
        "cached_tokens": {
            "device": usage.cached_tokens.device,
            "host": usage.cached_tokens.host,
            "redis": usage.cached_tokens.redis,
        },
        "prefill_worker": usage.prefill_worker,
        "decode_worker": usage.decode_worker,
        "kv_bytes_transferred": usage.kv_bytes_transferred,
        "kv_transport": usage.kv_transport,
        "kv_skipped_reason": usage.kv_skipped_reason,
        "preemptions": usage.preemptions,
        "resumes": usage.resumes,
        "chunks": [
            {
                "first_token": chunk.first_token,
                "tokens": chunk.tokens,
                "compute_start": chunk.compute_start,
                "compute_end": chunk.compute_end,
                "first_byte": chunk.first_byte,
                "last_byte": chunk.last_byte,
            }
            for chunk in usage.chunks
        ],
    }
