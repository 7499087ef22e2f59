"""A silent decode worker: its lease ends, and the blocks come back. Without a lease, never."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

import prefill_worker.service as service
from kv_transfer.base import Endpoint
from pdserve.engine import api
from pdserve.errors import Cancelled, WorkerLost
from pdserve.types import (
    PROTOCOL_VERSION,
    Fingerprint,
    Incarnation,
    ModelFacts,
    Numerics,
    Role,
    WorkerFacts,
    WorkerId,
)
from pdserve.v1 import kv_pb2
from pdserve.worker.bridge import EngineBridge

LEASE_S = 0.2
FACTS = WorkerFacts(
    id=WorkerId("p0"),
    incarnation=Incarnation(b"p" * 16),
    role=Role.PREFILL,
    pid=1,
    node="here",
    address="127.0.0.1:1",
    model=ModelFacts(
        path="/model",
        max_model_len=64,
        vocab_size=100,
        block_size=4,
        dtype="float32",
        numerics=Numerics.EXACT,
        fingerprint=Fingerprint(b"f" * 32),
    ),
    blocks_total=10,
)
START = kv_pb2.StartPrefill(
    attempt_id=b"a" * 16,
    tokens=kv_pb2.AttemptTokens(
        token_ids=range(1, 10), prompt_len=9, key_root=b"r" * 16, block_keys=b"k" * 32
    ),
    sampling=kv_pb2.EngineSampling(max_tokens=4, temperature=0, top_p=1.0, repetition_penalty=1.0),
    remaining_ms=60_000,
    expected_incarnation=FACTS.incarnation,
    layout_fingerprint=FACTS.model.fingerprint,
    protocol_version=PROTOCOL_VERSION,
)
ENDPOINT = Endpoint(
    FACTS.incarnation, FACTS.model.fingerprint, 10, 64, "h", 1, 0, "", "", b"", 0, ()
)


async def a_silent_peer(wait_s: float) -> list[api.Command]:
    """What the engine was told, ``wait_s`` seconds after the peer's only message."""
    posted: list[api.Command] = []
    bridge = EngineBridge()
    bridge.attach(asyncio.get_running_loop(), posted.append, None, None)
    exporter: Any = SimpleNamespace(endpoint=lambda: ENDPOINT)
    made = service.PrefillService(bridge, exporter, lambda: FACTS, LEASE_S, lambda: False)

    async def requests() -> AsyncIterator[kv_pb2.DecodeToPrefill]:
        yield kv_pb2.DecodeToPrefill(start=START)
        await asyncio.Event().wait()

    async def run() -> None:
        context: Any = None
        async for _ in made.Run(requests(), context):
            pass

    task = asyncio.create_task(run())
    try:
        with contextlib.suppress(TimeoutError, WorkerLost):
            await asyncio.wait_for(asyncio.shield(task), wait_s)
        return list(posted)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, WorkerLost):
            await task
        made.close()


def gives_back(posted: list[api.Command]) -> bool:
    return any(isinstance(command, api.Release) for command in posted)


def test_the_lease_ends_and_blocks_come_back() -> None:
    posted = asyncio.run(a_silent_peer(20 * LEASE_S))
    assert isinstance(posted[0], api.Submit)
    assert gives_back(posted)


def test_without_a_lease_a_silent_peer_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.PrefillService, "lease_s", property(lambda self: 3600.0))
    assert not gives_back(asyncio.run(a_silent_peer(20 * LEASE_S)))


def test_a_denounced_block_and_what_builds_on_it_are_forgotten() -> None:
    """A checksum that was wrong at the other end: the copy here may be the wrong one."""

    async def story() -> list[api.Command]:
        posted: list[api.Command] = []
        bridge = EngineBridge()
        bridge.attach(asyncio.get_running_loop(), posted.append, None, None)
        exporter: Any = SimpleNamespace(endpoint=lambda: ENDPOINT)
        made = service.PrefillService(bridge, exporter, lambda: FACTS, 5.0, lambda: False)

        async def requests() -> AsyncIterator[kv_pb2.DecodeToPrefill]:
            yield kv_pb2.DecodeToPrefill(start=START)
            cancel = kv_pb2.CancelPrefill(reason="damaged", suspect_blocks=[1])
            yield kv_pb2.DecodeToPrefill(cancel=cancel)

        context: Any = None
        with pytest.raises(Cancelled):
            async for _ in made.Run(requests(), context):
                pass
        made.close()
        return posted

    posted = asyncio.run(story())
    assert api.Forget((api.BlockKey(b"k" * 16),)) in posted
    assert gives_back(posted)
