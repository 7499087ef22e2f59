"""What comes for a sequence that nobody follows any more is counted; a cancelled one's is not."""

from __future__ import annotations

import asyncio

from hand_off_world import SEQ, HandOff

from pdserve.engine import api
from pdserve.errors import Cancelled
from pdserve.types import TokenOut
from pdserve.v1 import kv_pb2


def test_events_of_a_hand_off_that_is_over_are_counted() -> None:
    async def story() -> list[int]:
        counts = []
        async with HandOff() as it:
            assert await it.hear() == "accepted"
            await it.hang_up()
            for event in (
                api.Failed(SEQ, Cancelled("the peer left")),
                api.Tokens(SEQ, 0, (TokenOut(7),)),
                api.BlocksReady(SEQ, 0, (), None),
            ):
                it.happens(event)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                counts.append(it.bridge.late_events)
        return counts

    assert asyncio.run(story()) == [0, 1, 2]


def test_blocks_that_were_still_being_offered_when_the_peer_left_are_counted() -> None:
    async def story() -> list[int]:
        counts = []
        async with HandOff() as it:
            assert await it.hear() == "accepted"
            it.exporter.go_on.clear()
            it.happens(api.Admitted(SEQ, 0), api.BlocksReady(SEQ, 0, (api.BlockId(3),), None))
            assert await it.hear() == "started"
            it.say(kv_pb2.DecodeToPrefill(grant=kv_pb2.Grant(block_indices=[0])))
            await asyncio.sleep(0.1)
            counts.append(it.bridge.late_events)
            await it.hang_up()
            counts.append(it.bridge.late_events)
            it.exporter.go_on.set()
        return counts

    assert asyncio.run(story()) == [0, 1]
