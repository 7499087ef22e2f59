"""One request to ``/v1/completions``, streamed, and what became of it.

due -> (waits for its turn) sent -> chunks -> [DONE]     : ANSWERED
                                 -> anything else       : REFUSED, FAILED, CUT, TIMED_OUT

A call never raises for what the server does: every end is a Sample.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import aiohttp
import msgspec

from pdserve.bench.bodies import read_body
from pdserve.bench.samples import Outcome, Sample
from pdserve.bench.sse import SseReader
from pdserve.bench.workload import Request
from pdserve.errors import WorkerLost

_ERROR_BYTES_MAX = 64 * 1024


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    token_ids: list[int] | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(msgspec.Struct, frozen=True):
    code: str | int | None = None
    type: str | None = None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []  # msgspec copies it
    usage: _Usage | None = None
    error: _Error | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error | None = None


_EVENTS = msgspec.json.Decoder(_Event)
_REFUSALS = msgspec.json.Decoder(_Refusal)


@dataclass(frozen=True, slots=True)
class Target:
    """``plain``: only fields that OpenAI's own API has, for servers that refuse any other."""

    url: str  # scheme://host:port
    model: str
    plain: bool = False
    timeout_s: float = 600.0

    def body(self, prompt: list[int], output_tokens: int) -> bytes:
        fields: dict[str, object] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self.plain:
            fields |= {"ignore_eos": True, "return_token_ids": True}
        return msgspec.json.encode(fields)


@dataclass(slots=True)
class _Seen:
    """What has come of one answer so far."""

    begin: float  # when it was due, on time.perf_counter's clock
    token_s: list[float] = field(default_factory=list)
    ids: int = 0
    usage: _Usage | None = None
    error: _Error | None = None
    whole: bool = False

    def take(self, events: list[bytes], now: float) -> None:
        """msgspec.DecodeError when an event is not what the API says."""
        for data in events:
            if data == b"[DONE]":
                self.whole = True
                continue
            event = _EVENTS.decode(data)
            self.error = event.error or self.error
            self.usage = event.usage or self.usage
            ids = sum(len(choice.token_ids or ()) for choice in event.choices)
            self.ids += ids
            if ids or any(choice.text for choice in event.choices):
                self.token_s.append(now - self.begin)

    def tokens(self) -> tuple[int, str]:
        if self.usage is not None and self.usage.completion_tokens:
            return self.usage.completion_tokens, "usage"
        if self.ids:
            return self.ids, "token ids"
        return len(self.token_s), "chunks"


async def call(
    session: aiohttp.ClientSession, target: Target, request: Request, prompt: list[int], due: float
) -> Sample:
    """``due``: on time.perf_counter's clock."""
    seen = _Seen(due)
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(target.timeout_s):
            outcome, detail = await _exchange(session, target, request, prompt, seen)
    except TimeoutError:
        outcome, detail = Outcome.TIMED_OUT, f"no end within {target.timeout_s:g} s"
    except aiohttp.ClientPayloadError as error:
        outcome, detail = Outcome.CUT, type(error).__name__
    except (aiohttp.ClientError, OSError) as error:
        outcome, detail = Outcome.FAILED, type(error).__name__
    except (msgspec.DecodeError, WorkerLost):
        outcome, detail = Outcome.FAILED, "not the API's events"
    output_tokens, counted_by = seen.tokens()
    return Sample(
        outcome=outcome,
        detail=detail,
        due_s=request.due_s,
        sent_s=sent - due,
        prompt_tokens=request.prompt_tokens,
        output_tokens=output_tokens,
        asked_tokens=request.output_tokens,
        token_s=tuple(seen.token_s),
        end_s=time.perf_counter() - due,
        counted_by=counted_by,
    )


async def _exchange(
    session: aiohttp.ClientSession,
    target: Target,
    request: Request,
    prompt: list[int],
    seen: _Seen,
) -> tuple[Outcome, str]:
    body = target.body(prompt, request.output_tokens)
    headers = {"content-type": "application/json"}
    async with session.post(f"{target.url}/v1/completions", data=body, headers=headers) as response:
        if response.status != 200:
            return _refusal(response.status, await read_body(response, _ERROR_BYTES_MAX))
        reader = SseReader()
        while received := await response.content.readany():
            seen.take(reader.feed(received), time.perf_counter())
    if seen.error is not None:
        return Outcome.FAILED, f"in the stream: {_code(seen.error)}"
    if not seen.whole:
        return Outcome.CUT, "no [DONE]"
    if not seen.token_s:
        return Outcome.FAILED, "no output"
    return Outcome.ANSWERED, ""


def _refusal(status: int, body: bytes) -> tuple[Outcome, str]:
    try:
        error = _REFUSALS.decode(body).error
    except msgspec.DecodeError:
        error = None
    outcome = Outcome.REFUSED if status < 500 or status == 503 else Outcome.FAILED
    code = "" if error is None else f" {_code(error)}"
    return outcome, f"HTTP {status}{code}"


def _code(error: _Error) -> str:
    """Short and printable: it comes from the server and becomes a key of the result."""
    text = str(error.code or error.type or "error")
    return "".join(c if c.isprintable() else "?" for c in text)[:64]
