"""However many attempts a lost peer leaves behind, this worker goes on serving the others."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

import decode_worker.attempt as attempt_module
from decode_worker.reads import PeerReads
from decode_worker.session import DecodeService
from pdserve.errors import InternalError
from pdserve.types import Incarnation
from pdserve.v1 import worker_pb2
from pdserve.worker.bridge import EngineBridge
from tests.prefill_facts import PREFILL_FACTS

PEER = Incarnation(b"p" * 16)


class SlowReaders:
    """Looks for ended peers; one look takes as long as a read that must return first."""

    def __init__(self) -> None:
        self.looks = 0
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def close_lost(self) -> int:
        with self._lock:
            self.looks += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.2)
        with self._lock:
            self.at_once -= 1
        return 0

    def close(self) -> None:
        pass


def test_one_lost_peer_is_looked_for_once_and_once_more() -> None:
    readers: Any = SlowReaders()

    async def story() -> float:
        reads = PeerReads(readers)
        began = time.monotonic()
        for _ in range(500):
            reads.peer_lost(PEER, False)
        held_up = time.monotonic() - began
        await asyncio.sleep(0.05)
        reads.peer_lost(PEER, False)
        reads.end_reads()
        await asyncio.to_thread(reads.close)
        return held_up

    assert asyncio.run(story()) < 0.2, "the event loop was held up"
    assert readers.most_at_once == 1
    assert 2 <= readers.looks <= 3


def test_an_attempt_that_cannot_begin_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_step: object) -> None:
        raise InternalError("a bug of ours")

    monkeypatch.setattr(attempt_module, "board", SimpleNamespace(hit=broken))
    start = worker_pb2.StartAttempt(
        attempt_id=b"a" * 16, remaining_ms=60_000, expected_incarnation=PREFILL_FACTS.incarnation
    )
    start.tokens.token_ids.extend((1, 2, 3))
    start.tokens.prompt_len = 3
    start.tokens.key_root = b"r" * 16
    start.sampling.max_tokens = 4
    start.sampling.top_p = 1.0
    start.sampling.repetition_penalty = 1.0

    async def requests() -> Any:
        yield worker_pb2.RouterToDecode(start=start)
        await asyncio.sleep(30)

    async def story() -> int:
        bridge = EngineBridge()
        bridge.attach(asyncio.get_running_loop(), lambda command: None, None, None)
        services: Any = SimpleNamespace(
            facts=PREFILL_FACTS, bridge=bridge, stubs=SimpleNamespace(renew=lambda: None)
        )
        service = DecodeService(services, 60.0, lambda: False)
        context: Any = None
        stream = service.Session(requests(), context)
        await anext(stream)
        told = await asyncio.wait_for(anext(stream), 5)
        (event,) = told.events
        assert event.failure.code == InternalError("").code
        left = service.attempts
        await stream.aclose()
        return left

    assert asyncio.run(story()) == 0
