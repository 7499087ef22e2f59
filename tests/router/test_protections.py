"""The router's fences are needed: the same story without one gives the client wrong tokens."""

from __future__ import annotations

import pytest
from router_harness import cluster, collect, drive, tokens
from scripted_worker import Raw, ScriptedWorker, Shift, Write, answer, job

from pdserve.errors import DuplicateRequest, PdserveError
from pdserve.v1 import kv_pb2, worker_pb2
from router.book import RequestBook
from router.request_log import RequestLog
from router.session import DecodeSession

PROMPT = (1, 2, 3, 4, 5)


def late_token(start: worker_pb2.StartAttempt) -> worker_pb2.AttemptEvent:
    """Of an attempt that was fenced; it would fit just where the stream is now."""
    return worker_pb2.AttemptEvent(
        attempt_id=b"fenced-attempt-0", offset=3, tokens=[kv_pb2.TokenOut(token_id=999)]
    )


async def a_late_token() -> int:
    """How many events were dropped for being late."""
    worker = ScriptedWorker("d0", scripts=[[Write(3), Raw(late_token)]])
    async with cluster(worker) as made:
        deltas = await collect(made, job(prompt=PROMPT, tokens=8))
        assert tokens(deltas) == answer(PROMPT, 8)
        return made.dispatcher.counters.late_events


def test_attempt_fence() -> None:
    assert drive(a_late_token) == 1, "it was counted"


def test_without_the_attempt_fence_the_past_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DecodeSession._relay

    def believing(self: DecodeSession, batch: worker_pb2.DecodeToRouter) -> None:
        """Whatever comes is taken for the attempt that runs."""
        for event in batch.events:
            event.attempt_id = next(iter(self._attempts), event.attempt_id)
        plain(self, batch)

    monkeypatch.setattr(DecodeSession, "_relay", believing)
    with pytest.raises((AssertionError, PdserveError)):
        drive(a_late_token)


async def a_repeat_and_a_gap() -> int:
    """How many of the two were found to break the protocol."""
    found = 0
    for shift in (-1, 1):
        worker = ScriptedWorker("d0", scripts=[[Write(3), Shift(shift)]])
        async with cluster(worker) as made:
            deltas = await collect(made, job(prompt=PROMPT, tokens=8))
            assert tokens(deltas) == answer(PROMPT, 8)
            found += made.dispatcher.counters.protocol_errors
    return found


def test_continuity_of_offsets() -> None:
    assert drive(a_repeat_and_a_gap) == 2


def test_without_continuity_tokens_repeat_or_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestLog, "_check", lambda self, offset, made: None)
    with pytest.raises((AssertionError, PdserveError)):
        drive(a_repeat_and_a_gap)


async def the_same_id_twice() -> tuple[int, bool]:
    """How many attempts a request costs that a client sends twice, say for want of an answer.

    And whether the second one was refused.
    """
    worker = ScriptedWorker("d0", token_delay_s=0.02)
    async with cluster(worker) as made:
        stream = made.dispatcher.generate(job("twice", prompt=PROMPT, tokens=8))
        first = [await anext(stream)]
        refused = False
        try:
            await collect(made, job("twice", prompt=PROMPT, tokens=8))
        except DuplicateRequest:
            refused = True
        first += [delta async for delta in stream]
        assert tokens(first) == answer(PROMPT, 8)
        return len(worker.starts), refused


def test_deduplication() -> None:
    assert drive(the_same_id_twice) == (1, True)


def test_without_deduplication_a_duplicate_is_worked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RequestBook.open

    def forgetful(
        self: RequestBook, request: RequestLog, *, own: bool = False
    ) -> RequestLog | None:
        """Knows of nobody who asked before."""
        self._by_id.clear()
        return plain(self, request, own=own)

    monkeypatch.setattr(RequestBook, "open", forgetful)
    assert drive(the_same_id_twice) == (2, False)
