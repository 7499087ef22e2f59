"""A worker is idle when its engine is, and when no attempt waits for a sequence of it either."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import Any

import pytest

from pdserve.engine import api
from pdserve.types import AttemptTokens, BlockKey, Sampling
from pdserve.v1 import worker_pb2
from pdserve.worker.bridge import EngineBridge
from pdserve.worker.service import WorkerService
from tests.prefill_facts import PREFILL_FACTS

SEQ = api.SeqId(b"s" * 16)
TOKENS = AttemptTokens((1, 2, 3), 3, key_root=BlockKey(b"r" * 16), block_keys=())


@pytest.mark.parametrize("engine_idle", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_both_must_be_so(engine_idle: bool, waits: bool) -> None:
    counts: dict[str, Any] = dict.fromkeys((each.name for each in fields(api.EngineSnapshot)), 0)
    counts |= {"blocks_free": 6, "blocks_cached": 2, "blocks_total": 8}
    snapshot = api.EngineSnapshot(**{**counts, "violations": (), "idle": engine_idle})

    def post(command: api.Command) -> None:
        if isinstance(command, api.Inspect):
            command.read(snapshot)

    async def ask() -> worker_pb2.CheckIdleResponse:
        bridge = EngineBridge()
        bridge.attach(asyncio.get_running_loop(), post, None, None)
        nothing: Any = None
        service = WorkerService(bridge, PREFILL_FACTS, nothing, nothing, 1.0, False)
        if waits:
            submit = api.Submit(SEQ, api.Job.GENERATE, TOKENS, Sampling(max_tokens=4))
            bridge.submit(submit, lambda event: None)
        return await service.CheckIdle(worker_pb2.CheckIdleRequest(), nothing)

    found = asyncio.run(ask())
    assert found.idle is (engine_idle and not waits)
    assert (found.blocks_free, found.blocks_cached, found.blocks_total) == (6, 2, 8)
