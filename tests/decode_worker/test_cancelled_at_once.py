"""An attempt that is cancelled in the moment in which it begins asks no prefill worker."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from decode_worker.attempt import Attempt
from pdserve.engine import api
from pdserve.errors import WorkerLost
from pdserve.types import AttemptTokens, BlockKey, Sampling
from pdserve.v1 import worker_pb2
from pdserve.worker.bridge import EngineBridge
from tests.prefill_facts import PREFILL_FACTS

SEQ = api.SeqId(b"s" * 16)


def test_no_call_is_opened_that_nobody_would_end() -> None:
    """So it is when a stopped worker wakes: starts and the end of its session lie side by side."""

    async def story() -> tuple[list[str], int]:
        asked: list[str] = []
        ended: list[None] = []
        bridge = EngineBridge()
        bridge.attach(asyncio.get_running_loop(), lambda command: None, None, None)

        def stub(address: str) -> Any:
            asked.append(address)
            raise WorkerLost("nobody is there")

        services: Any = SimpleNamespace(
            bridge=bridge,
            facts=PREFILL_FACTS,
            stubs=SimpleNamespace(stub=stub),
            keep_alive_s=1.0,
            peer_lost=lambda *given: None,
        )
        start = worker_pb2.StartAttempt(attempt_id=SEQ)
        start.prefill.address = "127.0.0.1:1"
        tokens = AttemptTokens(
            token_ids=(1, 2, 3), prompt_len=3, key_root=BlockKey(b"r" * 16), block_keys=()
        )
        submit = api.Submit(SEQ, api.Job.GENERATE, tokens, Sampling(max_tokens=4))
        attempt = Attempt(services, start, submit, lambda event: None, lambda: ended.append(None))
        attempt.begin()
        attempt.cancel(WorkerLost("the router's session ended"))
        for _ in range(5):
            await asyncio.sleep(0)
        return asked, len(ended)

    assert asyncio.run(story()) == ([], 1)
