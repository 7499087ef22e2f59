"""Log-probabilities in the shapes of OpenAI's two endpoints (and vLLM's for prompts)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdserve.types import TokenLogprob, TokenOut
from router.tokens import TokenService

# JSON has no infinity: what an excluded token's log-probability is written as.
LOWEST = -9999.0


def _finite(value: float) -> float:
    return max(value, LOWEST)


def chat(tokens: Sequence[TokenOut], service: TokenService) -> dict[str, Any]:
    """``logprobs`` of a chat choice or delta; tokens without one are left out."""
    return {
        "content": [
            {
                **_entry(token.token_id, token.logprob.logprob, service),
                "top_logprobs": [
                    _entry(top.token_id, top.logprob, service) for top in token.logprob.top
                ],
            }
            for token in tokens
            if token.logprob is not None
        ],
        "refusal": None,
    }


def _entry(token: int, logprob: float, service: TokenService) -> dict[str, Any]:
    raw = service.bytes_of(token)
    return {
        "token": raw.decode(errors="replace"),
        "logprob": _finite(logprob),
        "bytes": list(raw),
    }


class CompletionLogprobs:
    """``logprobs`` of a completion choice; remembers how far into its text the tokens are."""

    def __init__(self, service: TokenService) -> None:
        self._service = service
        self._offset = 0

    def entries(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, Any]:
        """``logprobs`` None: nothing is known of that token, as of a prompt's first one."""
        result: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, entry in zip(ids, logprobs, strict=True):
            text = self._service.text_of(token)
            result["tokens"].append(text)
            result["text_offset"].append(self._offset)
            self._offset += len(text)
            result["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            result["top_logprobs"].append(None if entry is None else self._top(entry))
        return result

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The alternatives and the token itself, as OpenAI lists it when it is none of them."""
        listed = {
            self._service.text_of(top.token_id): _finite(top.logprob) for top in reversed(entry.top)
        }
        listed.setdefault(self._service.text_of(entry.token_id), _finite(entry.logprob))
        return listed


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of one choice as one."""
    result: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, list):
                result.setdefault(name, []).extend(value)
            else:
                result.setdefault(name, value)
    return result


def prompt(
    entries: Sequence[TokenLogprob | None], service: TokenService
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each position, token ids and what is known of them."""
    return [None if entry is None else _prompt_entry(entry, service) for entry in entries]


def _prompt_entry(entry: TokenLogprob, service: TokenService) -> dict[str, Any]:
    listed: dict[str, Any] = {
        str(entry.token_id): {
            "logprob": _finite(entry.logprob),
            "rank": None,
            "decoded_token": service.text_of(entry.token_id),
        }
    }
    for top in entry.top:
        listed[str(top.token_id)] = {
            "logprob": _finite(top.logprob),
            "rank": top.rank,
            "decoded_token": service.text_of(top.token_id),
        }
    return listed
