"""How fast blocks move, beside the plain thing in the same run.

Printed with ``-s``; the bounds asserted are far below the targets (half of memcpy for shared
memory, 0.7 of a bare socket loop for TCP), so that a busy machine does not fail the suite while a
needless copy or a lost overlap still does.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
from kv_peer import FINGERPRINT, TOKEN, Peer, PeerSetup, new_pool, running

from kv_transfer.readers import ReaderPool
from pdserve.config import TransferConfig
from pdserve.types import Transport

SPAN = 368_640  # SmolLM2: 16 tokens, 30 layers, 3 heads of 64, bfloat16
BLOCKS = 128
TOTAL = SPAN * BLOCKS


def best_rate(move: Callable[[], None], repeats: int = 5) -> float:
    """GB/s of the fastest of a few."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        move()
        times.append(time.perf_counter() - began)
    return TOTAL / min(times) / 1e9


def transfer_rate(peer: Peer, transport: Transport) -> float:
    pool = new_pool(BLOCKS, SPAN)
    config = TransferConfig(transports=(transport.value,))
    readers = ReaderPool(pool, FINGERPRINT, config, TOKEN)
    blocks = list(range(BLOCKS))
    offers = peer.offers(blocks)
    reader = readers.reader_for(peer.endpoint)
    rate = best_rate(lambda: (reader.read(offers, blocks, time.monotonic() + 30), None)[1])
    readers.close()
    pool.close()
    return rate


def memcpy_rate() -> float:
    source = np.ones(TOTAL, dtype=np.uint8)
    target = np.zeros(TOTAL, dtype=np.uint8)
    return best_rate(lambda: np.copyto(target, source))


def bare_socket_rate(peer: Peer) -> float:
    # As much memory on both ends as the transfer reads and writes.
    target = memoryview(bytearray(b"x" * TOTAL))

    port = peer.call("bare_sender", TOTAL, SPAN)

    def move() -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
            at = 0
            while at < TOTAL:
                at += sock.recv_into(target[at : at + SPAN])

    return best_rate(move)


def test_the_rates_beside_the_plain_ones() -> None:
    with running(PeerSetup(BLOCKS, SPAN)) as peer:
        rates = []
        for _ in range(2):  # in turns: what a shared machine can do drifts
            shm, memcpy = transfer_rate(peer, Transport.SHM), memcpy_rate()
            rates.append((shm, memcpy, transfer_rate(peer, Transport.TCP), bare_socket_rate(peer)))
        shm, memcpy, tcp, bare = (max(each) for each in zip(*rates, strict=True))
    print(f"\nshm with checksum {shm:.2f} GB/s, memcpy {memcpy:.2f} GB/s: {shm / memcpy:.2f}")
    print(f"tcp with checksum {tcp:.2f} GB/s, bare socket {bare:.2f} GB/s: {tcp / bare:.2f}")
    assert shm > 0.15 * memcpy
    assert tcp > 0.2 * bare
