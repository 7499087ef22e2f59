"""The other end of a hand-off that is measured: a process with a pool that can be read.

with running_peer(blocks, span) as peer:   its pool is filled and exported
    peer.offers(blocks)                    asks for offers; the peer computes the checksums
    peer.ask(first, blocks), .offered()    the same in two steps, with time between them
    peer.socket_port                       a bare socket loop over as many bytes, to compare with;
                                           0 where the pool is on a device
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.exporter import PoolExporter
from pdserve.engine.host_spans import HostSpans, choose_spans
from pdserve.engine.memory import PoolMemory, allocate_cuda, allocate_shared
from pdserve.engine.native import load_native
from pdserve.engine.resolve import default_cache
from pdserve.pages import take_pages
from pdserve.types import Fingerprint, Incarnation, Transport

TOKEN = "the token of a measurement"
FINGERPRINT = Fingerprint(bytes(range(32)))
ON_HOST = (Transport.SHM, Transport.TCP)
SOCKET_BUFFER = 4 * 2**20
START_S, ANSWER_S = 180.0, 60.0
_processes = multiprocessing.get_context("spawn")


def new_pool(blocks: int, span: int, device: str = "cpu") -> PoolMemory:
    incarnation = Incarnation(os.urandom(16))
    if torch.device(device).type == "cuda":
        return allocate_cuda(blocks, span, incarnation, torch.device(device))
    pool = allocate_shared(blocks, span, incarnation)
    take_pages(pool.blocks.numpy()).join()  # an engine's are taken by the time of its first read
    return pool


def workers_spans(span: int) -> tuple[HostSpans, str]:
    """How a worker copies and sums blocks here, and the line that says so."""
    loading = load_native(default_cache() / "kernels")
    spans, note = choose_spans(loading.kernels, span)
    return spans, f"{note}; {loading.reason}" if loading.reason else note


@dataclass(frozen=True, slots=True)
class Peer:
    endpoint: Endpoint
    socket_port: int
    _pipe: Connection

    def offers(self, count: int) -> tuple[BlockOffer, ...]:
        """Of the first ``count`` blocks."""
        self.ask(0, count)
        return self.offered()

    def ask(self, first: int, count: int) -> None:
        """For offers of some blocks, which ``offered`` returns once their checksums are made."""
        self._pipe.send((first, count))

    def offered(self) -> tuple[BlockOffer, ...]:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"the other process made no offers within {ANSWER_S:g} s")
        offers: tuple[BlockOffer, ...] = self._pipe.recv()
        return offers


@contextlib.contextmanager
def running_peer(
    blocks: int, span: int, device: str = "cpu", transports: tuple[Transport, ...] = ON_HOST
) -> Iterator[Peer]:
    ours, theirs = _processes.Pipe()
    process = _processes.Process(
        target=_serve, args=(theirs, (blocks, span, device), transports), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise TimeoutError(f"the other process has no pool after {START_S:g} s")
        endpoint, port = ours.recv()
        yield Peer(endpoint, port, ours)
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(
    pipe: Connection, wanted: tuple[int, int, str], transports: tuple[Transport, ...]
) -> None:
    pool = new_pool(*wanted)
    on_host = pool.blocks.device.type == "cpu"
    if on_host:
        pool.spans, _ = workers_spans(pool.span_bytes)
    pool.blocks.random_(0, 256)
    exporter = PoolExporter(pool, FINGERPRINT, "127.0.0.1", TOKEN, transports)
    port = _bare_sender(pool.blocks, wanted[1]) if on_host else 0
    pipe.send((exporter.endpoint(), port))
    with contextlib.suppress(EOFError):
        while True:
            first, count = pipe.recv()
            pipe.send(exporter.offers([(index, index) for index in range(first, first + count)]))
    exporter.close()
    pool.close()


def _bare_sender(data: torch.Tensor, span: int) -> int:
    """Sends all of ``data``, span by span, to whoever connects, each time a byte asks for it."""
    listener = socket.create_server(("127.0.0.1", 0))
    view = data.view(-1).numpy().data

    def send() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
            while sock.recv(1):
                for start in range(0, view.nbytes, span):
                    sock.sendall(view[start : start + span])

    threading.Thread(target=send, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port
