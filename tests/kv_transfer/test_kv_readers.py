"""The pool of readers: which way it takes, that it says so, and what it does without that way."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator

import kv_links
import numpy as np
import pytest
import torch
from kv_peer import FINGERPRINT, TOKEN, Peer, PeerSetup, all_bytes, eventually, new_pool, running

from kv_transfer.base import Endpoint
from kv_transfer.readers import ReaderPool
from kv_transfer.slots import words
from pdserve.config import TransferConfig
from pdserve.engine.memory import PoolMemory
from pdserve.errors import DeadlineExceeded, TransferError
from pdserve.types import Transport
from tests.standstill import watched


@pytest.fixture
def peer() -> Iterator[Peer]:
    with running(PeerSetup()) as peer:
        yield peer


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    pool = new_pool(8, PeerSetup().span_bytes)
    yield pool
    pool.close()


def readers_of(pool: PoolMemory, **changes: object) -> ReaderPool:
    config = TransferConfig(**changes)  # type: ignore[arg-type]
    return ReaderPool(pool, FINGERPRINT, config, TOKEN)


def read_one(readers: ReaderPool, peer: Peer, endpoint: Endpoint, pool: PoolMemory) -> Transport:
    reader = readers.reader_for(endpoint)
    reader.read(peer.offers([6]), [2], time.monotonic() + 5)
    np.testing.assert_array_equal(all_bytes(pool)[2], peer.expected(6))
    return reader.transport


def test_the_choice_and_its_reason_are_logged_once_a_pair(
    peer: Peer, pool: PoolMemory, caplog: pytest.LogCaptureFixture
) -> None:
    readers = readers_of(pool)
    with caplog.at_level(logging.INFO, logger="kv_transfer.readers"):
        for _ in range(3):
            assert read_one(readers, peer, peer.endpoint, pool) is Transport.SHM
    (line,) = [record.getMessage() for record in caplog.records]
    assert " by shm: " in line
    assert "this host's memory" in line
    assert peer.endpoint.incarnation[:4].hex() in line
    readers.close()


def test_memory_that_cannot_be_opened_falls_back_to_tcp_and_says_so(
    peer: Peer, pool: PoolMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """The same host by its id, but the file is not to be had: as under a stricter kernel."""
    blocked = dataclasses.replace(peer.endpoint, shm_fd=9999)
    readers = readers_of(pool)
    with caplog.at_level(logging.WARNING, logger="kv_transfer.readers"):
        assert read_one(readers, peer, blocked, pool) is Transport.TCP
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("shm ")
    readers.close()


def test_a_way_that_took_too_long_is_not_tried_again(peer: Peer, pool: PoolMemory) -> None:
    """A link whose other rank never comes costs one set-up, not one for every request."""

    class NobodyComes(kv_links.SocketLinks):
        def connect(
            self, link_id: bytes, rank: int, deadline: float, check_peer: Callable[[], None]
        ) -> kv_links.SocketLink:
            time.sleep(max(0.0, deadline - time.monotonic()))
            raise DeadlineExceeded("the other rank did not come")

    setup = PeerSetup(transports=(Transport.NCCL, Transport.TCP), socket_links=True)
    with running(setup) as linked:
        config = TransferConfig(setup_timeout_s=1.0)
        readers = ReaderPool(pool, FINGERPRINT, config, TOKEN, links=NobodyComes())
        with watched() as still:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                readers.reader_for(linked.endpoint)
            assert time.monotonic() - began < 2.5 + still.seconds
        assert read_one(readers, linked, linked.endpoint, pool) is Transport.TCP
        readers.close()


def test_only_what_is_allowed_is_used(peer: Peer, pool: PoolMemory) -> None:
    readers = readers_of(pool, transports=("tcp",))
    assert read_one(readers, peer, peer.endpoint, pool) is Transport.TCP
    readers.close()
    nothing = readers_of(pool, transports=("cuda_ipc", "nccl"))
    with pytest.raises(TransferError):
        nothing.reader_for(peer.endpoint)
    nothing.close()


def test_threads_that_come_together_open_one_connection(peer: Peer, pool: PoolMemory) -> None:
    readers = readers_of(pool, transports=("tcp",))
    before = peer.call("stats").connections
    barrier = threading.Barrier(8)
    found: list[object] = []

    def ask() -> None:
        barrier.wait()
        found.append(readers.reader_for(peer.endpoint))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert eventually(lambda: peer.call("stats").connections == before + 1)
    readers.close()


def test_setting_up_a_connection_to_a_stopped_peer_is_bounded(peer: Peer, pool: PoolMemory) -> None:
    readers = readers_of(pool, transports=("tcp",), setup_timeout_s=1.0)
    peer.stop()
    with watched() as still:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            readers.reader_for(peer.endpoint)
        assert time.monotonic() - began < 2.5 + still.seconds
    peer.wake()
    assert read_one(readers, peer, peer.endpoint, pool) is Transport.TCP
    readers.close()


def test_waiting_for_another_read_counts_towards_the_deadline(peer: Peer, pool: PoolMemory) -> None:
    readers = readers_of(pool, transports=("tcp",))
    reader = readers.reader_for(peer.endpoint)
    offers = peer.offers([0, 1])
    peer.stop()
    failures: list[BaseException] = []

    def read_long() -> None:
        try:
            reader.read(offers[:1], [0], time.monotonic() + 3.0)
        except DeadlineExceeded as error:
            failures.append(error)

    thread = threading.Thread(target=read_long)
    thread.start()
    time.sleep(0.2)
    with pytest.raises(DeadlineExceeded):
        reader.read(offers[1:], [1], time.monotonic() + 0.3)
    assert thread.is_alive(), "it waited for the read before it, whatever its own deadline"
    thread.join(5)
    assert len(failures) == 1
    readers.close()


class Queue:
    """Reads of one block each, on threads; the first is under way when the others come."""

    def __init__(self, readers: ReaderPool, peer: Peer, count: int) -> None:
        self._reader = readers.reader_for(peer.endpoint)
        self._offers = peer.offers(list(range(count)))
        self.errors: list[BaseException | None] = [None] * count
        peer.stop()
        self._threads = [threading.Thread(target=self._read, args=(at,)) for at in range(count)]
        self._threads[0].start()
        time.sleep(0.2)
        for thread in self._threads[1:]:
            thread.start()

    def _read(self, at: int) -> None:
        try:
            self._reader.read(self._offers[at : at + 1], [at], time.monotonic() + 20)
        except (TransferError, DeadlineExceeded) as error:
            self.errors[at] = error

    def join(self, first: bool = False) -> None:
        for thread in self._threads[:1] if first else self._threads:
            thread.join(10)
            assert not thread.is_alive()


def test_reads_behind_one_that_broke_the_connection_go_on_over_a_new_one(
    peer: Peer, pool: PoolMemory
) -> None:
    """And the time for which they waited is not taken from the time that a read may last."""
    readers = readers_of(pool, transports=("tcp",), deadline_s=0.8)
    connections = peer.call("stats").connections
    queue = Queue(readers, peer, 4)
    queue.join(first=True)
    assert isinstance(queue.errors[0], DeadlineExceeded)
    time.sleep(0.2)
    peer.wake()
    queue.join()
    assert queue.errors[1:] == [None] * 3
    for block in (1, 2, 3):
        np.testing.assert_array_equal(all_bytes(pool)[block], peer.expected(block))
    assert peer.call("stats").connections == connections + 2
    readers.close()


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_reads_behind_a_peer_that_is_lost_twice_end_together(pool: PoolMemory, end: str) -> None:
    """One read and one new connection find out; nobody else waits for that peer."""
    with running(PeerSetup()) as lost:
        readers = readers_of(pool, transports=("tcp",), deadline_s=0.6, setup_timeout_s=0.4)
        queue = Queue(readers, lost, 6)
        if end == "killed":
            lost.kill()
        with watched() as still:
            began = time.monotonic()
            queue.join()
            assert time.monotonic() - began < 2 + still.seconds
        assert None not in queue.errors
        readers.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_memory_of_an_ended_peer_is_let_go(pool: PoolMemory, transport: str) -> None:
    with running(PeerSetup()) as short_lived:
        readers = readers_of(pool, transports=(transport,))
        read_one(readers, short_lived, short_lived.endpoint, pool)
        assert readers.close_lost() == 0
        short_lived.kill()
        assert eventually(lambda: readers.close_lost() == 1)
        assert readers.close_lost() == 0
        with pytest.raises(TransferError):
            readers.reader_for(short_lived.endpoint)
        readers.close()


def test_closed_readers_open_nothing(peer: Peer, pool: PoolMemory) -> None:
    readers = readers_of(pool)
    readers.close()
    with pytest.raises(TransferError):
        readers.reader_for(peer.endpoint)


@pytest.mark.parametrize("span", [8, 12, 13, 368_640])
def test_words_are_the_same_memory_whatever_the_span(span: int) -> None:
    rows = torch.randint(0, 256, (5, span), dtype=torch.uint8)
    index, copied = torch.tensor([4, 0, 2]), torch.zeros(3, span, dtype=torch.uint8)
    torch.index_select(words(rows), 0, index, out=words(copied))
    assert torch.equal(copied, rows[index])
