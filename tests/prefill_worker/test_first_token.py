"""The first token overtakes the blocks that it came with, and nothing else overtakes anything."""

from __future__ import annotations

import asyncio

from hand_off_world import SEQ, HandOff, denouncing

from pdserve.engine import api
from pdserve.types import TokenOut
from pdserve.v1 import kv_pb2

GRANT = kv_pb2.DecodeToPrefill(grant=kv_pb2.Grant(block_indices=[0, 1, 2]))
READY = api.BlocksReady(SEQ, 0, (api.BlockId(4), api.BlockId(5), api.BlockId(6)), None)
TOKENS = api.Tokens(SEQ, 0, (TokenOut(7),))


async def rest() -> None:
    """The loop does all that it can do without anybody's word."""
    for _ in range(20):
        await asyncio.sleep(0)


async def begun(it: HandOff) -> None:
    assert await it.hear() == "accepted"
    it.happens(api.Admitted(SEQ, 0))
    assert await it.hear() == "started"
    it.say(GRANT)
    await rest()


def test_the_token_is_told_while_its_blocks_are_hashed() -> None:
    async def story() -> None:
        async with HandOff() as it:
            await begun(it)
            it.exporter.go_on.clear()
            it.happens(READY, TOKENS)
            assert await it.hear() == "finished"
            await rest()
            it.exporter.go_on.set()
            assert await it.hear() == "offer"
            it.say(kv_pb2.DecodeToPrefill(done=kv_pb2.Done()))
            assert await it.hear() == ""
            assert it.ended is None
            assert it.gave_back()

    asyncio.run(story())


def test_a_peer_that_leaves_while_the_token_is_told_keeps_no_block() -> None:
    async def story() -> None:
        async with HandOff() as it:
            await begun(it)
            it.happens(READY)
            await rest()  # the offer fills the connection: nobody reads it
            it.happens(TOKENS)
            it.say(denouncing())
            await rest()
            await it.hang_up()
            assert it.gave_back()
            assert it.service.attempts == 0

    asyncio.run(story())
