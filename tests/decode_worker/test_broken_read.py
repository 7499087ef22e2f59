"""A read that breaks in a way that has no name costs its attempt, and no block stays lent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from decode_worker.attempt import Attempt
from decode_worker.protocol import Read
from kv_transfer.base import BlockOffer
from pdserve.engine import api
from pdserve.errors import InternalError
from pdserve.types import AttemptTokens, BlockKey, CachedTokens, Sampling
from pdserve.v1 import worker_pb2
from pdserve.worker.bridge import EngineBridge
from tests.prefill_facts import PREFILL_FACTS

SEQ = api.SeqId(b"s" * 16)


def test_it_is_told_and_the_blocks_go_back() -> None:
    async def break_down(*_given: object) -> None:
        raise RuntimeError("nobody thought of this")

    async def story() -> tuple[list[api.Command], list[worker_pb2.AttemptEvent]]:
        posted: list[api.Command] = []
        told: list[worker_pb2.AttemptEvent] = []
        bridge = EngineBridge()
        bridge.attach(asyncio.get_running_loop(), posted.append, None, None)
        services: Any = SimpleNamespace(
            bridge=bridge, facts=PREFILL_FACTS, read=break_down, late_read=lambda: None
        )
        start = worker_pb2.StartAttempt(attempt_id=SEQ)
        start.prefill.worker_id = "p0"
        tokens = AttemptTokens(
            token_ids=(1, 2, 3, 4, 5),
            prompt_len=5,
            key_root=BlockKey(b"r" * 16),
            block_keys=(BlockKey(b"k" * 16),),
        )
        submit = api.Submit(SEQ, api.Job.GENERATE, tokens, Sampling(max_tokens=4))
        attempt = Attempt(services, start, submit, told.append, lambda: None)
        machine = attempt._machine
        machine.accepted()
        machine.started()
        machine.reserved(api.Reserved(SEQ, 0, (api.BlockId(9),), CachedTokens()))
        (read,) = machine.offered([BlockOffer(0, 0, 0, 0)])
        assert isinstance(read, Read)
        attempt._reader = asyncio.get_running_loop().create_future()
        attempt._reader.set_result(SimpleNamespace())  # type: ignore[arg-type]
        await attempt._read(read)
        return posted, told

    posted, told = asyncio.run(story())
    assert api.ImportFailed(SEQ, 0) in posted
    (event,) = told
    assert event.failure.code == InternalError("").code
