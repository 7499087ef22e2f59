"""One request of the load: sent, every message checked on arrival, judged at its end.

    asked -messages: no gap, no repeat-> finished once | cancelled by us | failed (the status)

An outcome whose ``wrong`` is empty kept all promises: it finished with exactly the calm answer, or
was cancelled by us and had exactly the beginning of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import aiohttp
import grpc
import grpc.aio

from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.ask import request
from tests.soak.cases import Case, Expected

TIMEOUT_S = 150.0


@dataclass(frozen=True)
class Cancel:
    """When to hang up: after so many seconds or tokens, whichever comes first."""

    seconds: float
    tokens: int


@dataclass
class Outcome:
    case: Case
    began: float  # monotonic seconds
    ended: float = 0.0
    first_s: float = 0.0  # until the first token; 0 if there was none
    gap_s: float = 0.0  # longest silence after the first token
    ending: str = ""  # finished, cancelled, or a status
    wrong: str = ""
    resumes: int = 0
    sequences: list[Expected] = field(default_factory=list)
    _heard: float = 0.0

    def heard(self) -> None:
        now = time.monotonic()
        if self._heard:
            self.gap_s = max(self.gap_s, now - self._heard)
        else:
            self.first_s = now - self.began
        self._heard = now

    def judge(self, expected: tuple[Expected, ...] | None) -> None:
        """Compares with the calm answer; a promise broken earlier stays the one told."""
        self.ended = time.monotonic()
        if self.wrong:
            return
        if self.ending not in ("finished", "cancelled"):
            self.wrong = f"lost: {self.ending}"
        elif expected is None:
            return
        elif self.ending == "finished" and tuple(self.sequences) != expected:
            self.wrong = f"another answer: {self.sequences} instead of {expected}"
        elif self.ending == "cancelled" and not _begins(self.sequences, expected):
            self.wrong = f"another beginning: {self.sequences} instead of {expected}"


def _begins(part: list[Expected], whole: tuple[Expected, ...]) -> bool:
    return all(
        w.tokens[: len(p.tokens)] == p.tokens and w.text.startswith(p.text)
        for p, w in zip(part, whole, strict=False)
    )


@dataclass
class Fronts:
    """Owns one gRPC channel and one HTTP session; made inside the event loop."""

    grpc_address: str
    http_url: str

    async def __aenter__(self) -> Fronts:
        # Many streams on one connection would wait for each other's window.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(self.grpc_address, options) for _ in range(4)]
        self._stubs = [pb_grpc.InferenceStub(channel) for channel in self._channels]
        # Connections kept for later would look like sockets that the router leaks.
        limit = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        self._http = aiohttp.ClientSession(connector=limit, timeout=timeout)
        self._next = 0
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        for channel in self._channels:
            await channel.close()

    async def ask(self, case: Case, salt: str, cancel: Cancel | None = None) -> Outcome:
        outcome = Outcome(case, time.monotonic())
        if case.n > 1:
            task = asyncio.ensure_future(self._ask_http(case, salt, outcome))
            if cancel is not None:
                asyncio.get_running_loop().call_later(cancel.seconds, task.cancel)
            try:
                await task
            except asyncio.CancelledError:
                if cancel is None:
                    raise
                outcome.ending = "cancelled"
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome.ending = type(error).__name__
        else:
            await self._ask_grpc(case, salt, outcome, cancel)
        return outcome

    async def _ask_grpc(
        self, case: Case, salt: str, outcome: Outcome, cancel: Cancel | None
    ) -> None:
        self._next += 1
        stub = self._stubs[self._next % len(self._stubs)]
        message = request(case.prompt, case.max_tokens, cache_salt=salt, **case.sampling)
        call = stub.Generate(message, timeout=TIMEOUT_S)
        if cancel is not None:
            asyncio.get_running_loop().call_later(cancel.seconds, call.cancel)
        tokens: list[int] = []
        text = ""
        finish = ""
        try:
            while (part := await call.read()) is not grpc.aio.EOF:
                _check(part, tokens, finish, case, outcome)
                outcome.heard()
                tokens.extend(part.token_ids)
                text += part.text
                finish = _finish(part)
                if finish:
                    outcome.resumes = part.usage.resumes
                if cancel is not None and len(tokens) >= cancel.tokens:
                    call.cancel()
            code = await call.code()
            outcome.ending = "finished" if finish and code is grpc.StatusCode.OK else code.name
            if code is grpc.StatusCode.OK and not finish:
                outcome.wrong = "ended with status OK and without a finish reason"
        except asyncio.CancelledError:
            if cancel is None:
                raise
            outcome.ending = "cancelled"
        except grpc.aio.AioRpcError as error:
            outcome.ending = f"{error.code().name}: {error.details()}"
        outcome.sequences = [Expected(tuple(tokens), text, finish)]

    async def _ask_http(self, case: Case, salt: str, outcome: Outcome) -> None:
        body = {
            "prompt": list(case.prompt),
            "max_tokens": case.max_tokens,
            "n": case.n,
            "stream": True,
            "cache_salt": salt,
            **case.sampling,
        }
        texts = [""] * case.n
        finishes = [""] * case.n
        done = False
        async with self._http.post(f"{self.http_url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                outcome.ending = f"HTTP {answer.status}: {await answer.text()}"
                return
            async for line in answer.content:
                said = line.decode().strip()
                if not said.startswith("data: "):
                    continue
                if done:
                    outcome.wrong = "something after [DONE]"
                if said == "data: [DONE]":
                    done = True
                    continue
                outcome.heard()
                _take(json.loads(said[6:]), texts, finishes, outcome)
                outcome.sequences = [
                    Expected((), *part) for part in zip(texts, finishes, strict=True)
                ]
        outcome.ending = outcome.ending or ("finished" if done and all(finishes) else "no ending")


def _check(
    part: pb.GenerateResponse, tokens: list[int], finish: str, case: Case, outcome: Outcome
) -> None:
    if part.offset != len(tokens):
        outcome.wrong = f"a chunk at {part.offset} after {len(tokens)} tokens"
    if finish:
        outcome.wrong = "a message after the last one"
    reported = [entry.token_id for entry in part.logprobs]
    if "logprobs" in case.sampling and reported != list(part.token_ids):
        outcome.wrong = f"logprobs of {reported} for {list(part.token_ids)}"


def _finish(part: pb.GenerateResponse) -> str:
    if part.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
        return ""
    return pb.FinishReason.Name(part.finish_reason).removeprefix("FINISH_REASON_").lower()


def _take(event: dict[str, object], texts: list[str], ends: list[str], outcome: Outcome) -> None:
    if "error" in event:
        outcome.ending = f"error event: {event['error']}"
        return
    choices = event.get("choices")
    assert isinstance(choices, list)
    for choice in choices:
        index = choice["index"]
        if ends[index]:
            outcome.wrong = f"sequence {index} went on after its end"
        texts[index] += choice["text"]
        ends[index] = choice["finish_reason"] or ""
