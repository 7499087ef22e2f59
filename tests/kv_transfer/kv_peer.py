"""The offering side of the contract tests: a process of its own with a pool and an exporter.

The test drives it by commands over a pipe. What block b of a peer holds is a pure function of
(seed, b), so that the test knows the bytes without asking.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kv_links
import numpy as np
import numpy.typing as npt
import torch

import kv_transfer.serving
from kv_transfer.base import BlockOffer, Endpoint
from kv_transfer.exporter import PoolExporter
from kv_transfer.nccl import MULTI_RANK_VARIABLE
from kv_transfer.readers import ReaderPool
from kv_transfer.serving import ServerStats
from pdserve.engine.host_spans import NativeSpans
from pdserve.engine.memory import PoolMemory, allocate_cuda, allocate_shared
from pdserve.engine.native import load_native
from pdserve.types import Fingerprint, Incarnation, Transport

TOKEN = "a token of the tests' cluster"
FINGERPRINT = Fingerprint(bytes(range(32)))
Bytes = npt.NDArray[np.uint8]

# A forked server with torch loaded makes a peer in milliseconds instead of seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["kv_transfer.exporter"])


@dataclass(frozen=True)
class PeerSetup:
    num_blocks: int = 24
    span_bytes: int = 1536
    seed: int = 1
    transports: tuple[Transport, ...] = (Transport.SHM, Transport.TCP)
    host: str = "127.0.0.1"
    token: str = TOKEN
    socket_links: bool = False  # two-sided transfers over sockets instead of NCCL
    device: str = "cpu"
    handshake_seconds: float = 5.0
    kernels: str = ""  # a folder with them, which sum its blocks


def content(seed: int, block: int, span_bytes: int) -> Bytes:
    return np.random.default_rng((seed, block)).integers(0, 256, span_bytes, dtype=np.uint8)


def new_pool(num_blocks: int, span_bytes: int, device: str = "cpu") -> PoolMemory:
    incarnation = Incarnation(os.urandom(16))
    if device == "cpu":
        return allocate_shared(num_blocks, span_bytes, incarnation)
    return allocate_cuda(num_blocks, span_bytes, incarnation, torch.device(device))


def set_block(pool: PoolMemory, block: int, data: Bytes) -> None:
    pool.blocks[block].copy_(torch.from_numpy(data))
    if pool.blocks.is_cuda:
        torch.cuda.synchronize()


def all_bytes(pool: PoolMemory) -> Bytes:
    return pool.blocks.cpu().numpy().copy()


class _Server:
    """The commands, by name."""

    def __init__(self, setup: PeerSetup) -> None:
        kv_transfer.serving.HANDSHAKE_SECONDS = setup.handshake_seconds
        if setup.device != "cpu":
            os.environ[MULTI_RANK_VARIABLE] = "1"
        self._setup = setup
        self._pool = new_pool(setup.num_blocks, setup.span_bytes, setup.device)
        if setup.kernels:
            kernels = load_native(Path(setup.kernels)).kernels
            assert kernels is not None
            self._pool.spans = NativeSpans(kernels)
        links = kv_links.SocketLinks() if setup.socket_links else None
        self._exporter = PoolExporter(
            self._pool, FINGERPRINT, setup.host, setup.token, setup.transports, links=links
        )
        for block in range(setup.num_blocks):
            self.fill(block)

    def fill(self, block: int) -> None:
        set_block(self._pool, block, content(self._setup.seed, block, self._setup.span_bytes))

    def endpoint(self) -> Endpoint:
        return self._exporter.endpoint()

    def offers(self, blocks: list[int]) -> tuple[BlockOffer, ...]:
        return self._exporter.offers(list(enumerate(blocks)))

    def free(self, block: int) -> None:
        """As an engine does it: first the generation, then other bytes."""
        self._pool.generations[block] += np.uint64(1)
        set_block(self._pool, block, content(self._setup.seed + 1, block, self._setup.span_bytes))

    def flip(self, block: int, byte: int) -> None:
        self._pool.blocks[block, byte] ^= 0x10
        if self._pool.blocks.is_cuda:
            torch.cuda.synchronize()

    def open_connections(self) -> int:
        server = self._exporter._server
        return server.open_connections() if server is not None else 0

    def stats(self) -> ServerStats:
        return self._exporter.stats()

    def bare_sender(self, total: int, chunk: int) -> int:
        """A socket loop with nothing around it, to measure against; returns its port."""
        listener = socket.create_server(("127.0.0.1", 0))
        data = memoryview(bytearray(os.urandom(chunk)) * (total // chunk))

        def send() -> None:
            while True:
                sock, _ = listener.accept()
                with sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 2**20)
                    for start in range(0, total, chunk):
                        sock.sendall(data[start : start + chunk])

        threading.Thread(target=send, daemon=True).start()
        port: int = listener.getsockname()[1]
        return port

    def close(self) -> None:
        self._exporter.close()
        self._pool.close()


def _serve(setup: PeerSetup, pipe: Connection) -> None:
    server = _Server(setup)
    pipe.send(None)
    while True:
        name, args = pipe.recv()
        pipe.send(getattr(server, name)(*args))
        if name == "close":
            return


class Peer:
    """The test's handle of a peer process."""

    def __init__(self, setup: PeerSetup) -> None:
        self.setup = setup
        self._pipe, far = _processes.Pipe()
        self.process = _processes.Process(target=_serve, args=(setup, far), daemon=True)
        self.process.start()
        far.close()
        self._pipe.recv()
        assert self.process.pid is not None
        self.pid: int = self.process.pid
        self.endpoint: Endpoint = self.call("endpoint")
        assert self.endpoint.pid == self.pid != os.getpid()

    def call(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        if not self._pipe.poll(60):
            raise AssertionError(f"the peer did not answer {name}")
        return self._pipe.recv()

    def offers(self, blocks: list[int]) -> tuple[BlockOffer, ...]:
        return self.call("offers", blocks)

    def expected(self, block: int) -> Bytes:
        return content(self.setup.seed, block, self.setup.span_bytes)

    def stop(self) -> None:
        """Returns when every thread stands still; the signal alone takes a moment."""
        os.kill(self.pid, signal.SIGSTOP)
        assert eventually(lambda: set(self._thread_states()) == {"T"})

    def _thread_states(self) -> list[str]:
        tasks = Path(f"/proc/{self.pid}/task").glob("*/stat")
        return [task.read_text().rpartition(")")[2].split()[0] for task in tasks]

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        if self.process.is_alive():
            self.wake()
            with contextlib.suppress(OSError, EOFError):
                self.call("close")
            self.process.join(10)
            if self.process.is_alive():
                self.kill()
        self._pipe.close()


@contextlib.contextmanager
def running(setup: PeerSetup) -> Iterator[Peer]:
    peer = Peer(setup)
    try:
        yield peer
    finally:
        peer.close()


def revoke(readers: ReaderPool, peer: Peer) -> None:
    """Gives a peer up, and waits until nothing is open to it."""
    reader = readers.fence(peer.endpoint.incarnation)
    if reader is not None:
        reader.close()


def open_files() -> set[tuple[str, str]]:
    """Descriptor and what it leads to, of this process. Compared as sets: what an earlier test left
    to be collected may close at any time, and must hide nothing."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return found


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
