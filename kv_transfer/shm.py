"""Reading a peer's pool on the same host: its memory file, opened and mapped for reading only.

    open -> read* -> closed

The header is compared with what the peer announced before anything else is read. The mapping keeps
the peer's memory readable after the peer has died: what was final before still is, and a process
that took over the peer's pid is told apart by the incarnation in the header.
"""

from __future__ import annotations

import mmap
import os
import select
import stat
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kv_transfer.base import BlockOffer, Endpoint, ReadReport
from kv_transfer.plan import check_offers, split_reads
from pdserve.engine.memory import GENERATIONS_OFFSET, HEADER, MAGIC, PoolMemory, data_offset
from pdserve.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    LayoutMismatch,
    StaleBlock,
    TransferError,
)
from pdserve.types import Transport

# Copied before the deadline is looked at again.
_BATCH_BYTES = 2**22

Bytes = npt.NDArray[np.uint8]


def open_memory(endpoint: Endpoint) -> mmap.mmap:
    """The peer's whole memory file, read-only. TransferError unless it is what was announced."""
    path = f"/proc/{endpoint.pid}/fd/{endpoint.shm_fd}"
    try:
        # O_NONBLOCK: should the fd be a pipe by now, opening it must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransferError(f"the peer's memory cannot be opened: {error.strerror}") from error
    try:
        _check_file(fd, endpoint)
        size = data_offset(endpoint.num_blocks) + endpoint.num_blocks * endpoint.span_bytes
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise TransferError(f"the peer's memory cannot be mapped: {error.strerror}") from error
    finally:
        os.close(fd)
    return memory


def _check_file(fd: int, endpoint: Endpoint) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise TransferError("the peer's memory is not a file: the process has been replaced")
    header = os.pread(fd, HEADER.size, 0)
    if len(header) != HEADER.size:
        raise TransferError("the peer's memory is shorter than its header")
    magic, incarnation, num_blocks, span_bytes, start = HEADER.unpack(header)
    if magic != MAGIC:
        raise TransferError("the peer's memory does not start like a KV pool")
    if incarnation != endpoint.incarnation:
        raise StaleBlock("the peer's memory belongs to another incarnation than was announced")
    announced = (endpoint.num_blocks, endpoint.span_bytes, data_offset(endpoint.num_blocks))
    if (num_blocks, span_bytes, start) != announced:
        raise LayoutMismatch(
            f"the peer's memory holds {num_blocks} blocks of {span_bytes} bytes from {start} on, "
            f"announced were {announced}"
        )
    if status.st_size != start + num_blocks * span_bytes:
        raise LayoutMismatch(f"the peer's memory is {status.st_size} bytes long")


class ShmReader:
    """A BlockReader. ``usable`` turns False when it is closed."""

    transport = Transport.SHM

    def __init__(self, endpoint: Endpoint, pool: PoolMemory) -> None:
        assert pool.span_bytes == endpoint.span_bytes
        self._spans = pool.spans
        self.usable = True
        self._endpoint = endpoint
        self._local: Bytes = pool.blocks.numpy()
        self._process = _open_process(endpoint.pid)
        try:
            self._memory = open_memory(endpoint)
        except TransferError:
            os.close(self._process)
            raise
        count, span = endpoint.num_blocks, endpoint.span_bytes
        self._generations = np.frombuffer(
            self._memory, dtype=np.uint64, count=count, offset=GENERATIONS_OFFSET
        )
        self._remote: Bytes = np.frombuffer(
            self._memory, dtype=np.uint8, count=count * span, offset=data_offset(count)
        ).reshape(count, span)

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        check_offers(offers, into, self._endpoint.num_blocks)
        if not self.usable:
            raise TransferError("the peer's memory is closed")
        source = [offer.block for offer in offers]
        self._check_generations(source, offers)
        span = self._endpoint.span_bytes
        first = time.monotonic()
        wrong: BlockOffer | None = None
        for part in split_reads(len(offers), span, _BATCH_BYTES, len(offers)):
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("the transfer's deadline passed")
            sums = self._take(source[part], into[part])
            for offer, found in zip(offers[part], sums, strict=True):
                if wrong is None and found != offer.checksum:
                    wrong = offer
        last = time.monotonic()
        # Generations first: what a freed block was overwritten with fails its checksum, too.
        self._check_generations(source, offers)
        if wrong is not None:
            raise ChecksumMismatch(
                f"block {wrong.block} of the peer holds other bytes than it was offered with"
            )
        return ReadReport(len(offers) * span, first, last)

    def _take(self, source: Sequence[int], into: Sequence[int]) -> list[int]:
        return self._spans.take(self._remote, source, self._local, into)

    def peer_alive(self) -> bool:
        """False once the peer has ended: only this mapping keeps its memory then."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """Nothing waits here."""
        self.usable = False

    def close(self) -> None:
        if self._memory.closed:
            return
        self.usable = False
        # The mapping can go only when no array shows it.
        self._generations = np.zeros(0, dtype=np.uint64)
        self._remote = np.zeros((0, 0), dtype=np.uint8)
        self._memory.close()
        os.close(self._process)

    def _check_generations(self, source: list[int], offers: Sequence[BlockOffer]) -> None:
        now = self._generations[source] if source else self._generations[:0]
        offered = np.array([offer.generation for offer in offers], dtype=np.uint64)
        freed = np.flatnonzero(now != offered)
        if freed.size:
            raise StaleBlock(f"the peer freed its block {source[int(freed[0])]}")


def _open_process(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise TransferError(f"the peer's process is gone: {error.strerror}") from error
