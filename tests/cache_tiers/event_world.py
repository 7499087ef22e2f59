"""Sockets, chains and waiting, for the stories about KV events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import zmq

from cache_tiers.kv_events import KvEventPublisher
from cache_tiers.kv_subscriber import KvEventSubscriber
from cache_tiers.kv_wire import END_SEQ, encode_batch, encode_seq
from cache_tiers.prefix_index import PrefixIndex
from pdserve.engine.api import Stored
from pdserve.types import BlockKey, WorkerId

W = WorkerId("w")


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def stored(number: int) -> Stored:
    return Stored((key(number),), key(number - 1) if number else None, (1, 2), 2)


@asynccontextmanager
async def following(
    publisher: KvEventPublisher | FakePublisher, index: PrefixIndex, **settings: float
) -> AsyncIterator[KvEventSubscriber]:
    subscriber = KvEventSubscriber(
        W,
        publisher.address,
        publisher.replay_address,
        index,
        quiet_s=settings.get("quiet_s", 0.1),
        retry_s=settings.get("retry_s", 0.05),
        replay_timeout_s=settings.get("replay_timeout_s", 0.5),
    )
    subscriber.start()
    try:
        yield subscriber
    finally:
        await subscriber.close()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.005)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(story(), 30)

    asyncio.run(bounded())


def chain(count: int) -> list[BlockKey]:
    return [key(i) for i in range(count)]


class FakePublisher:
    """Sockets in the test's own hands: publishes what it likes, repeats what it likes."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.pub = self.context.socket(zmq.PUB)
        self.router = self.context.socket(zmq.ROUTER)
        self.address, self.replay_address = (
            f"tcp://127.0.0.1:{sock.bind_to_random_port('tcp://127.0.0.1')}"
            for sock in (self.pub, self.router)
        )
        self.requests: list[int] = []
        self.repeatable: dict[int, bytes] = {}
        self.answers = True

    def send(self, seq: int, payload: bytes) -> None:
        self.pub.send_multipart([b"kv-events", encode_seq(seq), payload])

    async def serve(self) -> None:
        while True:
            if not self.router.poll(0):
                await asyncio.sleep(0.005)
                continue
            client, empty, start = self.router.recv_multipart()
            assert empty == b""
            first = int.from_bytes(start, "big")
            self.requests.append(first)
            if not self.answers:
                continue
            for seq, payload in sorted(self.repeatable.items()):
                if seq >= first:
                    self.router.send_multipart(
                        [client, b"", b"kv-events", encode_seq(seq), payload]
                    )
            self.router.send_multipart([client, b"", b"", END_SEQ, b""])


@asynccontextmanager
async def fake() -> AsyncIterator[FakePublisher]:
    made = FakePublisher()
    task = asyncio.create_task(made.serve())
    try:
        yield made
    finally:
        task.cancel()
        made.context.destroy(linger=0)


def batch(number: int) -> bytes:
    return encode_batch([stored(number)], 0.0)


async def subscribed(source: FakePublisher, subscriber: KvEventSubscriber) -> None:
    """Returns when published messages arrive: an old number is a duplicate and does no harm."""
    await subscriber.wait_live()
    while not subscriber.stats().duplicates:
        source.send(0, batch(0))
        await asyncio.sleep(0.01)
