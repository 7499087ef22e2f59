"""What comes for a sequence that nobody follows any more is counted; a cancelled one's is not."""

from __future__ import annotations

import asyncio

from hand_off_world import SEQ, HandOff

from pdserve.engine import api
from pdserve.errors import Cancelled
from pdserve.types import TokenOut


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
