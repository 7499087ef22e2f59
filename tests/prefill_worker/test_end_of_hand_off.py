"""However and whenever a hand-off ends, nothing of it is left at the prefill worker."""

from __future__ import annotations

import asyncio

import pytest
from hand_off_world import SEQ, START, HandOff

from pdserve.engine import api
from pdserve.errors import DeadlineExceeded
from pdserve.types import CachedTokens, TokenOut
from pdserve.v1 import kv_pb2

COMPUTED = api.Tokens(SEQ, 0, (TokenOut(7),), None, cached=CachedTokens())


@pytest.mark.parametrize("rounds", range(12))
def test_a_call_that_is_cancelled_while_it_ends_leaves_nothing(rounds: int) -> None:
    """A peer that cancels is seen twice: its side of the stream ends, and so does the call."""

    async def story() -> tuple[int, int, bool]:
        async with HandOff() as it:
            assert await it.hear() == "accepted"
            it.happens(api.Admitted(SEQ, 0))
            assert await it.hear() == "started"
            it.close()
            for _ in range(rounds):
                await asyncio.sleep(0)
            await it.hang_up()
            return it.service.attempts, it.bridge.listening, it.gave_back()

    assert asyncio.run(story()) == (0, 0, True)


def test_a_peer_that_only_keeps_the_call_alive_holds_nothing_past_the_deadline() -> None:
    start = kv_pb2.StartPrefill()
    start.CopyFrom(START)
    start.remaining_ms = 300

    async def story() -> HandOff:
        async with HandOff(lease_s=0.5, start=start) as it:
            assert await it.hear() == "accepted"
            it.happens(api.Admitted(SEQ, 0), COMPUTED)
            over = asyncio.create_task(it.over())
            for _ in range(100):
                if over.done():
                    break
                it.say(kv_pb2.DecodeToPrefill(keep_alive=kv_pb2.KeepAlive()))
                await asyncio.sleep(0.05)
            assert over.done(), "kept alive for five seconds"
            return it

    it = asyncio.run(story())
    assert isinstance(it.ended, DeadlineExceeded)
    assert it.gave_back()
