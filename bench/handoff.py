"""Hand-off of KV blocks, checksums included, beside memcpy and a bare socket loop.

One turn moves the same blocks each way: shared memory (copied and summed by the kernels, as workers
do where there is a compiler, and by numpy and xxhash), memcpy, TCP, a bare socket. The checksum
that the receiver compares is part of a read. The sender's is made when a block is final: once as in
a hand-off of chunks, of which the receiver reads one while the sender makes those of the next, and
once on its own, to be added to a read, as where all blocks were final before.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bench.peer import (
    FINGERPRINT,
    SOCKET_BUFFER,
    TOKEN,
    Peer,
    new_pool,
    running_peer,
    workers_spans,
)
from bench.record import Goal, Record, interleaved
from kv_transfer.readers import ReaderPool
from pdserve.config import TransferConfig
from pdserve.engine.host_spans import PLAIN_SPANS, HostSpans
from pdserve.engine.memory import PoolMemory
from pdserve.types import Transport

SPAN = 368_640  # SmolLM2: 16 tokens, 30 layers, 3 heads of 64, keys and values, bfloat16
BLOCK_TOKENS = 16
BLOCKS = 256  # 94 MB: larger than the caches of a processor
CHUNK_BLOCKS = 16  # 256 tokens
REPEATS = 9
GROWTH_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def run() -> Record:
    record = Record("handoff")
    with running_peer(BLOCKS, SPAN) as peer:
        pool = new_pool(BLOCKS, SPAN)
        fast, record.notes["copied by"] = workers_spans(SPAN)
        shm, shm_readers = _reading(peer, pool, Transport.SHM, fast)
        plain, plain_readers = _reading(peer, pool, Transport.SHM)
        tcp, tcp_readers = _reading(peer, pool, Transport.TCP)
        source = np.ones(BLOCKS * SPAN, dtype=np.uint8)
        target = np.zeros(BLOCKS * SPAN, dtype=np.uint8)
        with socket.create_connection(("127.0.0.1", peer.socket_port)) as bare:
            found = interleaved(
                {
                    "shm": lambda: _rate(lambda: shm(BLOCKS)),
                    "shm, copied by numpy": lambda: _rate(lambda: plain(BLOCKS)),
                    "whole": lambda: _rate(lambda: _whole(peer, shm_readers)),
                    "memcpy": lambda: _rate(lambda: np.copyto(target, source)),
                    "offer": lambda: _rate(lambda: peer.offers(BLOCKS)),
                    "tcp": lambda: _rate(lambda: tcp(BLOCKS)),
                    "socket": lambda: _rate(_bare_reading(bare, target.data)),
                },
                REPEATS,
            )
        record.notes["growth"] = {"shm": _growth(shm), "tcp": _growth(tcp)}
        for readers in (shm_readers, plain_readers, tcp_readers):
            readers.close()
        pool.close()
    for name, rates in found.items():
        record.value(name, "GB/s", rates)
    record.ratio(
        "shared memory, read and verified / memcpy", found["shm"], found["memcpy"], Goal(0.5)
    )
    record.ratio(
        "the whole hand-off, with the sender's checksums beside the reads / memcpy",
        found["whole"],
        found["memcpy"],
        Goal(0.5),
    )
    both = [1 / (1 / a + 1 / b) for a, b in zip(found["shm"], found["offer"], strict=True)]
    record.ratio("checksums of all blocks first, then all reads / memcpy", both, found["memcpy"])
    record.ratio(
        "TCP loopback, read and verified / bare socket", found["tcp"], found["socket"], Goal(0.7)
    )
    return record


def _reading(
    peer: Peer, pool: PoolMemory, transport: Transport, spans: HostSpans = PLAIN_SPANS
) -> tuple[Callable[[int], None], ReaderPool]:
    """Reads so many blocks of the peer, by the product's own reader."""
    config = TransferConfig(transports=(transport.value,))
    readers = ReaderPool(replace(pool, spans=spans), FINGERPRINT, config, TOKEN)
    reader = readers.reader_for(peer.endpoint)
    offers = peer.offers(BLOCKS)

    def read(count: int) -> None:
        reader.read(offers[:count], range(count), time.monotonic() + 60)

    return read, readers


def _whole(peer: Peer, readers: ReaderPool) -> None:
    """As two workers do it: chunk by chunk, and who offers does not wait for who reads."""
    reader = readers.reader_for(peer.endpoint)
    for first in range(0, BLOCKS, CHUNK_BLOCKS):
        peer.ask(first, CHUNK_BLOCKS)
    for first in range(0, BLOCKS, CHUNK_BLOCKS):
        reader.read(peer.offered(), range(first, first + CHUNK_BLOCKS), time.monotonic() + 60)


def _bare_reading(sock: socket.socket, into: memoryview) -> Callable[[], None]:
    def read() -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        sock.sendall(b"!")
        at = 0
        while at < into.nbytes:
            at += sock.recv_into(into[at : at + SPAN])

    return read


def _rate(move: Callable[[], object]) -> float:
    """GB/s of all blocks."""
    began = time.perf_counter()
    move()
    return BLOCKS * SPAN / (time.perf_counter() - began) / 1e9


def _growth(read: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of one hand-off against its tokens: the median of a few."""
    seconds = []
    for count in GROWTH_BLOCKS:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            read(count)
            times.append(time.perf_counter() - began)
        seconds.append(float(np.median(times)))
    return {"tokens": [float(BLOCK_TOKENS * count) for count in GROWTH_BLOCKS], "seconds": seconds}
