"""A router that says nothing and takes nothing: its attempts end all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from decode_worker.session import DecodeService
from pdserve.engine import api
from pdserve.types import TokenOut
from pdserve.v1 import worker_pb2
from pdserve.worker.bridge import EngineBridge
from tests.prefill_facts import PREFILL_FACTS as FACTS
from tests.prefill_worker.hand_off_world import SEQ, START

SILENCE_S = 0.3


def test_its_attempts_are_cancelled_while_a_message_to_it_is_stuck() -> None:
    async def story() -> tuple[list[api.Command], int]:
        posted: list[api.Command] = []
        bridge = EngineBridge()
        bridge.attach(asyncio.get_running_loop(), posted.append, None, None)
        services: Any = SimpleNamespace(
            bridge=bridge, facts=FACTS, stubs=SimpleNamespace(renew=lambda: None)
        )
        start = worker_pb2.StartAttempt(
            attempt_id=SEQ,
            tokens=START.tokens,
            sampling=START.sampling,
            remaining_ms=60_000,
            expected_incarnation=FACTS.incarnation,
        )

        async def requests() -> AsyncIterator[worker_pb2.RouterToDecode]:
            yield worker_pb2.RouterToDecode(start=start)
            await asyncio.Event().wait()

        context: Any = None
        service = DecodeService(services, SILENCE_S, lambda: False)
        session = service.Session(requests(), context)
        await anext(session)
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        bridge.sink([api.Tokens(SEQ, 0, (TokenOut(1),), None)])
        await anext(session)  # its writer stands here: what was sent is taken by nobody
        assert service.attempts == 1
        await asyncio.sleep(3 * SILENCE_S)
        found = list(posted)
        await session.aclose()
        return found, bridge.late_events

    posted, late = asyncio.run(story())
    assert late == 1, "the message that was stuck"
    assert [type(command) for command in posted] == [api.Submit, api.Cancel]
