"""A peer that is gone or fenced: what was open to it ends, at once, whoever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import kv_links
import numpy as np
import pytest
from kv_peer import (
    FINGERPRINT,
    TOKEN,
    Peer,
    PeerSetup,
    all_bytes,
    eventually,
    new_pool,
    open_files,
    revoke,
    running,
)

from decode_worker import reads
from decode_worker.peer import PeerStubs
from decode_worker.session import DecodeService
from kv_transfer.base import BlockReader
from kv_transfer.pooled_reader import PooledReader
from kv_transfer.readers import ReaderPool
from pdserve.config import TransferConfig
from pdserve.engine.memory import PoolMemory
from pdserve.errors import DeadlineExceeded, StaleBlock, TransferError
from pdserve.rpc.identity import Caller, mint
from pdserve.types import Incarnation, Transport
from pdserve.v1 import worker_pb2
from pdserve.worker.bridge import EngineBridge

WAITING = 6
TRANSPORTS = {"shm": Transport.SHM, "tcp": Transport.TCP, "slots": Transport.NCCL}
TWO_SIDED = ["tcp", "slots"]


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    pool = new_pool(8, PeerSetup().span_bytes)
    yield pool
    pool.close()


def setup_of(way: str) -> PeerSetup:
    return PeerSetup(transports=(TRANSPORTS[way],), socket_links=way == "slots")


def readers_of(pool: PoolMemory, way: str, **changes: Any) -> ReaderPool:
    links = kv_links.SocketLinks() if way == "slots" else None
    config = TransferConfig(transports=(TRANSPORTS[way].value,), **changes)
    return ReaderPool(pool, FINGERPRINT, config, TOKEN, links=links)


@pytest.mark.parametrize("way", TRANSPORTS)
def test_nothing_stays_open_and_nothing_opens_again(pool: PoolMemory, way: str) -> None:
    with running(setup_of(way)) as peer:
        readers = readers_of(pool, way)
        offers = peer.offers([1, 2])
        files, threads = open_files(), set(threading.enumerate())
        reader = readers.reader_for(peer.endpoint)
        reader.read(offers[:1], [1], time.monotonic() + 20)
        assert open_files() - files
        revoke(readers, peer)
        assert open_files() <= files
        assert eventually(lambda: set(threading.enumerate()) <= threads)
        before = all_bytes(pool)
        with pytest.raises(TransferError):
            reader.read(offers[1:], [2], time.monotonic() + 5)
        with pytest.raises(StaleBlock):
            readers.reader_for(peer.endpoint)
        assert open_files() <= files
        np.testing.assert_array_equal(all_bytes(pool), before)
        readers.close()


@pytest.mark.parametrize("way", TWO_SIDED)
def test_all_that_wait_for_a_stopped_peer_end_with_it(pool: PoolMemory, way: str) -> None:
    with running(setup_of(way)) as peer:
        readers = readers_of(pool, way)
        reader = readers.reader_for(peer.endpoint)
        offers = peer.offers(list(range(WAITING)))
        failures: list[BaseException] = []

        def read(at: int) -> None:
            try:
                reader.read(offers[at : at + 1], [at], time.monotonic() + 60)
            except TransferError as error:
                failures.append(error)

        peer.stop()
        before = all_bytes(pool)
        threads = [threading.Thread(target=read, args=(at,)) for at in range(WAITING)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert failures == []
        began = time.monotonic()
        revoke(readers, peer)
        for thread in threads:
            thread.join(5)
        assert time.monotonic() - began < 2
        assert len(failures) == WAITING
        # What it sends once it wakes reaches nobody.
        peer.wake()
        time.sleep(0.3)
        np.testing.assert_array_equal(all_bytes(pool), before)
        readers.close()


def test_a_peer_that_is_revoked_while_it_is_connected_to_is_not_opened(pool: PoolMemory) -> None:
    with running(setup_of("tcp")) as peer:
        readers = readers_of(pool, "tcp", setup_timeout_s=5.0)
        files = open_files()
        peer.stop()
        failures: list[BaseException] = []

        def open_it() -> None:
            try:
                readers.reader_for(peer.endpoint)
            except TransferError as error:
                failures.append(error)

        opening = threading.Thread(target=open_it)
        opening.start()
        time.sleep(0.2)
        revoking = threading.Thread(target=revoke, args=(readers, peer))
        revoking.start()
        time.sleep(0.1)
        peer.wake()
        for thread in (opening, revoking):
            thread.join(5)
            assert not thread.is_alive()
        assert len(failures) == 1
        assert eventually(lambda: open_files() <= files)
        with pytest.raises(StaleBlock):
            readers.reader_for(peer.endpoint)
        readers.close()


class Told:
    """The session of a decode worker as far as a peer's end matters to it."""

    def __init__(self, peer_lost: Any) -> None:
        self.messages: asyncio.Queue[worker_pb2.RouterToDecode] = asyncio.Queue()
        facts = SimpleNamespace(incarnation=Incarnation(b"d" * 16))
        stubs = PeerStubs(mint(TOKEN, Caller.DECODE), 2**20)
        services: Any = SimpleNamespace(
            facts=facts, peer_lost=peer_lost, stubs=stubs, bridge=EngineBridge()
        )
        service = DecodeService(services, 60.0, lambda: False)
        context: Any = None
        self._stream = service.Session(self._requests(), context)

    async def _requests(self) -> AsyncIterator[worker_pb2.RouterToDecode]:
        while True:
            yield await self.messages.get()

    async def run(self) -> None:
        async with contextlib.aclosing(self._stream) as stream:
            async for _ in stream:
                pass

    def gone(self, peer: Peer) -> None:
        gone = worker_pb2.PeerGone(incarnation=peer.endpoint.incarnation)
        self.messages.put_nowait(worker_pb2.RouterToDecode(peer_gone=gone))


def closing() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("kv-close")]


async def ended_well(session: asyncio.Task[None]) -> None:
    """Until now it ran; what else it may have died of is raised."""
    session.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await session


def test_the_routers_word_ends_reads_and_holds_up_no_other_peer(
    pool: PoolMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More reads wait for the stopped peer than there are threads, and still it is let go."""
    monkeypatch.setattr(reads, "READ_THREADS", 4)

    async def story(stopped: Peer, other: Peer) -> None:
        threads = reads.PeerReads(readers_of(pool, "tcp", deadline_s=30.0))
        told = Told(threads.peer_lost)
        session = asyncio.create_task(told.run())
        to_stopped = await threads.open(stopped.endpoint)
        to_other = await threads.open(other.endpoint)
        offers, far = stopped.offers(list(range(WAITING))), time.monotonic() + 60
        (offer,) = other.offers([7])
        stopped.stop()
        waiting = [
            asyncio.ensure_future(threads.read(to_stopped, (offers[at],), (at,), far))
            for at in range(WAITING)
        ]
        await asyncio.sleep(0.3)
        assert not any(read.done() for read in waiting)
        began = time.monotonic()
        told.gone(stopped)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, TransferError | DeadlineExceeded) for error in ended)
        await threads.read(to_other, (offer,), (7,), time.monotonic() + 5)
        assert time.monotonic() - began < 3
        np.testing.assert_array_equal(all_bytes(pool)[7], other.expected(7))
        await ended_well(session)
        threads.end_reads()
        threads.close()

    with running(setup_of("tcp")) as stopped, running(setup_of("tcp")) as other:
        asyncio.run(asyncio.wait_for(story(stopped, other), 30))


def test_closing_one_peer_holds_up_the_end_of_no_other(
    pool: PoolMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it hold up its own: nothing is read any more while it still closes."""
    may_close, slow = threading.Event(), list[BlockReader]()
    close = PooledReader.close

    def close_slowly(reader: PooledReader) -> None:
        assert reader not in slow or may_close.wait(20)
        close(reader)

    monkeypatch.setattr(PooledReader, "close", close_slowly)

    async def story(first: Peer, second: Peer) -> None:
        threads = reads.PeerReads(readers_of(pool, "tcp"))
        told = Told(threads.peer_lost)
        session = asyncio.create_task(told.run())
        to_first: Any = await threads.open(first.endpoint)
        to_second: Any = await threads.open(second.endpoint)
        slow.append(to_first)
        told.gone(first)
        told.gone(second)
        assert await asyncio.to_thread(eventually, lambda: not to_second.is_open)
        # The thread that closed it ends a moment later; the other one still closes.
        assert await asyncio.to_thread(eventually, lambda: len(closing()) == 1)
        assert to_first.is_open
        with pytest.raises(StaleBlock):
            await threads.open(first.endpoint)
        with pytest.raises(TransferError):
            await threads.read(to_first, tuple(first.offers([1])), (1,), time.monotonic() + 5)
        may_close.set()
        assert await asyncio.to_thread(eventually, lambda: not to_first.is_open)
        # Each closing had a thread of its own, and it ended with it.
        assert await asyncio.to_thread(eventually, lambda: closing() == [])
        await ended_well(session)
        threads.end_reads()
        threads.close()

    with running(setup_of("tcp")) as first, running(setup_of("tcp")) as second:
        asyncio.run(asyncio.wait_for(story(first, second), 30))
