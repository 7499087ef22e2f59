"""Blocks that a peer denounced are forgotten, however the hand-off ended before that was read."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator

import grpc
import pytest
from hand_off_world import KEYS, SEQ, START, HandOff, denouncing

from pdserve.engine import api
from pdserve.errors import Cancelled, DeadlineExceeded, WorkerLost
from pdserve.v1 import kv_pb2, kv_pb2_grpc

LEASE_S = 0.3
ADMITTED = api.Admitted(SEQ, 0)


async def rest() -> None:
    """The loop does all that it can do without anybody's word."""
    for _ in range(20):
        await asyncio.sleep(0)


def stand_still() -> None:
    """Nothing runs on the loop for longer than the lease."""
    time.sleep(2 * LEASE_S)


async def read_at_once() -> list[api.BlockKey]:
    async with HandOff() as it:
        assert await it.hear() == "accepted"
        it.say(denouncing(1))
        assert await it.hear() == ""
        assert isinstance(it.ended, Cancelled)
        assert it.forgotten() == [KEYS[1]]
        assert it.gave_back()
        return it.forgotten()


async def hashing_when_it_came() -> list[api.BlockKey]:
    """It waits in the inbox while offers are made, and the peer cuts the call off."""
    async with HandOff() as it:
        assert await it.hear() == "accepted"
        it.exporter.go_on.clear()
        grant = kv_pb2.Grant(block_indices=[0, 1, 2])
        it.happens(ADMITTED)
        assert await it.hear() == "started"
        it.say(kv_pb2.DecodeToPrefill(grant=grant))
        it.happens(api.BlocksReady(SEQ, 0, (api.BlockId(4),), None))
        await rest()
        it.say(denouncing(0))
        await rest()
        assert it.forgotten() == [], "it is being hashed still"
        await it.hang_up()
        assert it.forgotten() == list(KEYS)
        assert it.gave_back()
        return it.forgotten()


async def failed_before_it_was_read() -> list[api.BlockKey]:
    """The engine's failure stands before it in the line, and ends the stream."""
    async with HandOff() as it:
        it.happens(ADMITTED, api.Failed(SEQ, DeadlineExceeded("too late")))
        it.happens(api.BlocksReady(SEQ, 0, (), None))
        await rest()
        it.say(denouncing(2, 1))
        await rest()
        assert [await it.hear() for _ in range(3)] == ["accepted", "started", ""]
        assert isinstance(it.ended, DeadlineExceeded)
        assert it.forgotten() == [KEYS[1]]
        assert it.bridge.late_events == 1, "blocks of a sequence that had failed"
        return it.forgotten()


async def read_after_a_standstill() -> list[api.BlockKey]:
    """This process stood still for longer than the lease: the peer was not silent."""
    async with HandOff(LEASE_S) as it:
        it.happens(ADMITTED)
        await rest()
        it.say(denouncing(1))
        await rest()
        stand_still()
        assert [await it.hear() for _ in range(3)] == ["accepted", "started", ""]
        assert isinstance(it.ended, Cancelled)
        assert it.forgotten() == [KEYS[1]]
        return it.forgotten()


@pytest.mark.parametrize(
    "story",
    [read_at_once, hashing_when_it_came, failed_before_it_was_read, read_after_a_standstill],
    ids=lambda story: story.__name__,
)
def test_denounced_blocks_are_forgotten(
    story: Callable[[], Coroutine[None, None, list[api.BlockKey]]],
) -> None:
    assert KEYS[1] in asyncio.run(asyncio.wait_for(story(), 30))


def test_a_silent_peer_denounces_nothing() -> None:
    async def story() -> None:
        async with HandOff(LEASE_S) as it:
            assert await it.hear() == "accepted"
            assert await it.hear() == ""
            assert isinstance(it.ended, WorkerLost)
            assert it.forgotten() == []
            assert it.gave_back()

    asyncio.run(story())


@pytest.mark.parametrize("cut_off", [False, True])
def test_what_lies_in_the_connection_after_a_standstill_is_read(cut_off: bool) -> None:
    """The peer speaks, and may give up, while nothing at all runs here; a real connection."""

    accepted, still, over = threading.Event(), threading.Event(), threading.Event()

    def peer(address: str) -> None:
        denounce = threading.Event()

        def says() -> Iterator[kv_pb2.DecodeToPrefill]:
            yield kv_pb2.DecodeToPrefill(start=START)
            denounce.wait(10)
            yield denouncing(1)
            over.wait(10)

        with grpc.insecure_channel(address) as channel:
            call = kv_pb2_grpc.PrefillStub(channel).Run(says())
            assert next(call).WhichOneof("message") == "accepted"
            accepted.set()
            assert still.wait(10)
            denounce.set()
            time.sleep(LEASE_S / 2)
            if cut_off:
                call.cancel()
            over.wait(10)

    async def story() -> None:
        it = HandOff(LEASE_S)
        it.bridge.attach(asyncio.get_running_loop(), it.posted.append, None, None)
        server = grpc.aio.server()
        kv_pb2_grpc.add_PrefillServicer_to_server(it.service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = asyncio.create_task(asyncio.to_thread(peer, f"127.0.0.1:{port}"))
        try:
            assert await asyncio.to_thread(accepted.wait, 10)
            still.set()
            stand_still()
            # The attempt ends when it has read what came, or at once.
            await asyncio.sleep(4 * LEASE_S)
            assert it.service.attempts == 0
            assert it.forgotten() == [KEYS[1]]
            assert it.gave_back()
        finally:
            over.set()
            await client
            await server.stop(0)
            it.service.close()

    asyncio.run(story())
