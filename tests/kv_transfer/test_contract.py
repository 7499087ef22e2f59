"""The contract that every transport keeps, always between two processes.

``slots`` is the two-sided protocol that NCCL uses, over a socket: the order of slots, cancellation
and loss of the peer need no GPU. The cases that need one say so when they are skipped.
"""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kv_links
import numpy as np
import pytest
import torch
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

import kv_transfer.cuda_ipc
import kv_transfer.shm
import kv_transfer.slot_reader
import kv_transfer.tcp
from kv_transfer.nccl import (
    MULTI_RANK_SINCE,
    MULTI_RANK_VARIABLE,
    library_version,
    load_library,
)
from kv_transfer.readers import ReaderPool
from pdserve.config import TransferConfig
from pdserve.engine.host_spans import PLAIN_SPANS, HostSpans, NativeSpans
from pdserve.engine.memory import PoolMemory
from pdserve.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    LayoutMismatch,
    StaleBlock,
    TransferError,
)
from pdserve.types import Fingerprint, Incarnation, Transport
from tests.engine.model_world import kernel, kernel_folder


@dataclass(frozen=True)
class Case:
    name: str
    transport: Transport
    gpu: bool = False
    socket_links: bool = False
    one_sided: bool = False  # reading needs nothing from the peer's process
    native: bool = False  # blocks are copied and summed by the kernels

    @property
    def transports(self) -> tuple[Transport, ...]:
        return (self.transport,)


CASES = [
    Case("shm", Transport.SHM, one_sided=True),
    Case("shm-native", Transport.SHM, one_sided=True, native=True),
    Case("tcp", Transport.TCP),
    Case("slots", Transport.NCCL, socket_links=True),
    Case("cuda_ipc", Transport.CUDA_IPC, gpu=True),
    Case("nccl", Transport.NCCL, gpu=True),
]

# More than all socket buffers of a connection hold together, so that a sender waits for us.
BIG_SPAN = 2**20
BIG_BLOCKS = 40


@pytest.fixture(
    params=[
        pytest.param(case, id=case.name, marks=[pytest.mark.gpu] if case.gpu else [])
        for case in CASES
    ]
)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    chosen: Case = request.param
    if chosen.gpu:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")
        monkeypatch.setenv(MULTI_RANK_VARIABLE, "1")
        # Both processes are on the first device, however many there are.
        library = load_library() if chosen.transport is Transport.NCCL else None
        if library is not None and library_version(library) < MULTI_RANK_SINCE:
            pytest.skip(f"NCCL {library_version(library)} refuses two ranks on one device")
    return chosen


@dataclass
class Pair:
    case: Case
    peer: Peer
    pool: PoolMemory
    readers: ReaderPool

    def read(self, blocks: list[int], into: list[int], seconds: float = 20.0) -> Any:
        offers = self.peer.offers(blocks)
        return self.read_offers(offers, into, seconds)

    def read_offers(self, offers: Any, into: list[int], seconds: float = 20.0) -> Any:
        reader = self.readers.reader_for(self.peer.endpoint)
        assert reader.transport is self.case.transport
        return reader.read(offers, into, time.monotonic() + seconds)

    def in_the_middle(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
        """Runs ``act`` once, when the next read has begun and is not complete."""
        pending = [act]

        def once() -> None:
            if pending:
                pending.pop()()

        patch_middle(self.case, monkeypatch, once)


def patch_middle(case: Case, monkeypatch: pytest.MonkeyPatch, once: Callable[[], None]) -> None:
    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            once()
            return real(*args)

        monkeypatch.setattr(owner, name, wrapped)

    if case.transport is Transport.SHM:
        take = kv_transfer.shm.ShmReader._take

        def act_half_way(reader: Any, source: Any, into: Any) -> list[int]:
            half = len(source) // 2
            first = take(reader, source[:half], into[:half])
            once()
            return first + take(reader, source[half:], into[half:])

        monkeypatch.setattr(kv_transfer.shm.ShmReader, "_take", act_half_way)
    elif case.transport is Transport.TCP:
        before(kv_transfer.tcp.TcpReader, "_receive_spans")
    elif case.transport is Transport.NCCL:
        before(kv_transfer.slot_reader, "wait_for_slot")
    else:
        before(kv_transfer.cuda_ipc.CudaIpcReader, "_check_generations")


def spans_of(case: Case) -> HostSpans:
    if not case.native:
        return PLAIN_SPANS
    if not kernel().pdserve_has_tiles():
        pytest.skip("no kernels that copy on this processor")
    return NativeSpans(kernel())


def make_pair(case: Case, num_blocks: int, span_bytes: int, local_blocks: int) -> Iterator[Pair]:
    peer_device = local_device = "cpu"
    if case.gpu:
        two = case.transport is Transport.NCCL and torch.cuda.device_count() > 1
        peer_device, local_device = "cuda:0", "cuda:1" if two else "cuda:0"
    spans = spans_of(case)
    setup = PeerSetup(
        num_blocks,
        span_bytes,
        transports=case.transports,
        socket_links=case.socket_links,
        device=peer_device,
        kernels=str(kernel_folder()) if isinstance(spans, NativeSpans) else "",
    )
    with running(setup) as peer:
        pool = new_pool(local_blocks, span_bytes, local_device)
        links = kv_links.SocketLinks() if case.socket_links else None
        config = TransferConfig(transports=tuple(t.value for t in case.transports))
        pool.spans = spans
        readers = ReaderPool(pool, FINGERPRINT, config, TOKEN, links=links)
        try:
            yield Pair(case, peer, pool, readers)
        finally:
            readers.close()
            pool.close()


@pytest.fixture
def pair(case: Case) -> Iterator[Pair]:
    yield from make_pair(case, 24, 1536, 32)


@pytest.fixture
def big_pair(case: Case) -> Iterator[Pair]:
    yield from make_pair(case, BIG_BLOCKS, BIG_SPAN, BIG_BLOCKS)


def test_the_right_bytes_arrive_in_the_right_blocks_whatever_the_order(pair: Pair) -> None:
    """Random permutations against a plain loop; neighbours stay as they were."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    reference = all_bytes(pair.pool)
    for _ in range(12):
        count = rng.choice([0, 1, 2, 7, 24])
        blocks = rng.sample(range(24), count)
        into = rng.sample(range(32), count)
        if rng.random() < 0.5:  # long adjacent runs
            blocks, into = sorted(blocks), sorted(into)
        before = time.monotonic()
        report = pair.read(blocks, into)
        for block, place in zip(blocks, into, strict=True):
            reference[place] = pair.peer.expected(block)
        np.testing.assert_array_equal(all_bytes(pair.pool), reference)
        assert report.bytes_moved == count * 1536
        assert before <= report.first_byte <= report.last_byte <= time.monotonic()


def test_a_read_longer_than_one_message_or_slot(big_pair: Pair) -> None:
    blocks = list(range(BIG_BLOCKS))
    into = blocks[::-1]
    report = big_pair.read(blocks, into)
    arrived = all_bytes(big_pair.pool)
    for block, place in zip(blocks, into, strict=True):
        np.testing.assert_array_equal(arrived[place], big_pair.peer.expected(block))
    assert report.bytes_moved == BIG_BLOCKS * BIG_SPAN
    assert report.first_byte < report.last_byte


def test_a_block_freed_before_the_read_is_stale_and_the_reader_lives_on(pair: Pair) -> None:
    offers = pair.peer.offers([3, 4, 5])
    pair.peer.call("free", 4)
    with pytest.raises(StaleBlock):
        pair.read_offers(offers, [0, 1, 2])
    reader = pair.readers.reader_for(pair.peer.endpoint)
    pair.read([5, 3], [7, 8])
    np.testing.assert_array_equal(all_bytes(pair.pool)[7], pair.peer.expected(5))
    assert pair.readers.reader_for(pair.peer.endpoint) is reader


def test_a_block_freed_during_the_read_is_stale(
    big_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = list(range(BIG_BLOCKS))
    offers = big_pair.peer.offers(blocks)
    big_pair.in_the_middle(monkeypatch, lambda: big_pair.peer.call("free", 0))
    with pytest.raises(StaleBlock):
        big_pair.read_offers(offers, blocks)
    # Nothing is wrong with the connection: what is still offered can be read.
    big_pair.read([1], [1])
    np.testing.assert_array_equal(all_bytes(big_pair.pool)[1], big_pair.peer.expected(1))


@pytest.mark.parametrize("byte", [0, 777, 1535])
def test_one_flipped_bit_is_noticed(pair: Pair, byte: int) -> None:
    offers = pair.peer.offers([9, 10])
    pair.peer.call("flip", 10, byte)
    with pytest.raises(ChecksumMismatch):
        pair.read_offers(offers, [0, 1])
    pair.peer.call("flip", 10, byte)
    pair.read_offers(offers, [0, 1])


def test_another_incarnation_is_refused(pair: Pair) -> None:
    wrong = dataclasses.replace(pair.peer.endpoint, incarnation=Incarnation(os.urandom(16)))
    with pytest.raises(StaleBlock):
        pair.readers.reader_for(wrong)


def test_another_fingerprint_is_refused(pair: Pair) -> None:
    wrong = dataclasses.replace(pair.peer.endpoint, fingerprint=Fingerprint(bytes(32)))
    with pytest.raises(LayoutMismatch):
        pair.readers.reader_for(wrong)


@pytest.mark.parametrize(
    "change", [{"num_blocks": 23}, {"num_blocks": 2**31}, {"span_bytes": 1024}]
)
def test_another_geometry_is_refused(pair: Pair, change: dict[str, int]) -> None:
    wrong = dataclasses.replace(pair.peer.endpoint, **change)
    with pytest.raises(LayoutMismatch):
        pair.readers.reader_for(wrong)


def test_a_block_that_the_peer_does_not_have_is_refused(pair: Pair) -> None:
    (offer,) = pair.peer.offers([0])
    with pytest.raises(TransferError):
        pair.read_offers([dataclasses.replace(offer, block=24)], [0])


def test_a_deadline_that_has_passed_moves_nothing(pair: Pair) -> None:
    before = all_bytes(pair.pool)
    offers = pair.peer.offers([1])
    with pytest.raises(DeadlineExceeded):
        pair.read_offers(offers, [0], seconds=-1)
    time.sleep(0.1)
    np.testing.assert_array_equal(all_bytes(pair.pool), before)


def test_a_stopped_peer_does_not_hold_a_read_beyond_its_deadline(pair: Pair) -> None:
    pair.read([0], [0])
    offers = pair.peer.offers([1, 2])
    pair.peer.stop()
    began = time.monotonic()
    if pair.case.one_sided:
        pair.read_offers(offers, [1, 2], seconds=0.4)
        np.testing.assert_array_equal(all_bytes(pair.pool)[2], pair.peer.expected(2))
    else:
        with pytest.raises(DeadlineExceeded):
            pair.read_offers(offers, [1, 2], seconds=0.4)
        # Whatever the peer sends once it wakes must not reach these blocks.
        quiet = all_bytes(pair.pool)
    assert time.monotonic() - began < 3
    pair.peer.wake()
    if not pair.case.one_sided:
        time.sleep(0.3)
        np.testing.assert_array_equal(all_bytes(pair.pool), quiet)
    pair.read([5], [5])
    np.testing.assert_array_equal(all_bytes(pair.pool)[5], pair.peer.expected(5))


def test_a_peer_killed_in_the_middle_leaves_the_local_blocks_alone(
    big_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = list(range(BIG_BLOCKS))
    offers = big_pair.peer.offers(blocks)
    big_pair.in_the_middle(monkeypatch, big_pair.peer.kill)
    if big_pair.case.one_sided:
        # The memory outlives its owner, and what was final in it still is.
        big_pair.read_offers(offers, blocks)
        for block, row in enumerate(all_bytes(big_pair.pool)):
            np.testing.assert_array_equal(row, big_pair.peer.expected(block))
    else:
        with pytest.raises(TransferError):
            big_pair.read_offers(offers, blocks)
    after = all_bytes(big_pair.pool)
    time.sleep(0.3)
    np.testing.assert_array_equal(all_bytes(big_pair.pool), after)
    # The pool of readers lets go of the dead peer, its memory included.
    big_pair.readers.close_lost()
    with pytest.raises(TransferError):
        big_pair.read_offers(offers, blocks)


def test_a_revoked_peer_is_closed_and_stays_closed(pair: Pair) -> None:
    offers = pair.peer.offers([0])
    reader = pair.readers.reader_for(pair.peer.endpoint)
    revoke(pair.readers, pair.peer)
    with pytest.raises(TransferError):
        reader.read(offers, [0], time.monotonic() + 5)
    with pytest.raises(StaleBlock):
        pair.readers.reader_for(pair.peer.endpoint)


def test_revoking_ends_a_read_that_waits(pair: Pair) -> None:
    """The revocation does not wait for the stopped peer, nor does the read."""
    if pair.case.one_sided:
        pytest.skip("such a read never waits for the peer")
    pair.read([0], [0])
    offers = pair.peer.offers([1])
    pair.peer.stop()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            pair.read_offers(offers, [1], seconds=30)
        except TransferError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    revoke(pair.readers, pair.peer)
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - began < 2
    assert len(failures) == 1


def test_many_threads_share_the_reader(pair: Pair) -> None:
    """One connection a pair; reads take turns and none gets another's bytes."""
    offers = pair.peer.offers(list(range(24)))
    errors: list[BaseException] = []

    def read(part: list[int]) -> None:
        try:
            for _ in range(10):
                pair.read_offers([offers[i] for i in part], part)
        except BaseException as error:
            errors.append(error)

    parts = [list(range(start, 24, 4)) for start in range(4)]
    threads = [threading.Thread(target=read, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    arrived = all_bytes(pair.pool)
    for block in range(24):
        np.testing.assert_array_equal(arrived[block], pair.peer.expected(block))


def test_closing_leaves_no_file_and_no_thread(pair: Pair) -> None:
    pair.read([0], [0])
    pair.readers.close()
    files, threads = open_files(), set(threading.enumerate())
    config = TransferConfig(transports=(pair.case.transport.value,))
    links = kv_links.SocketLinks() if pair.case.socket_links else None
    for _ in range(3):
        readers = ReaderPool(pair.pool, FINGERPRINT, config, TOKEN, links=links)
        offers = pair.peer.offers([1])
        readers.reader_for(pair.peer.endpoint).read(offers, [1], time.monotonic() + 20)
        assert open_files() - files
        readers.close()
    assert open_files() <= files
    assert eventually(lambda: set(threading.enumerate()) <= threads)
    # The peer, too, is back to a state in which everything can start again.
    pair.readers = ReaderPool(pair.pool, FINGERPRINT, config, TOKEN, links=links)
    pair.read([2], [2])
