"""The seam of every transport: a receiver *pulls* offered blocks into blocks of its own.

    prefill worker                         decode worker
    --------------                         -------------
    exporter = ...(pool)                   reader = open_reader(endpoint, pool)
    endpoint() ---- Accepted -->           (once per peer incarnation)
    offer(blocks) -- Offer ----->          reader.read(offers, into, deadline)
                                           checked: generation, then checksum, of what was read

Nobody writes into another process's pool: shared memory and CUDA IPC are opened and copied from by
the receiver; TCP and NCCL bytes are received by the receiver into blocks that it reserved. A reader
returns only when it will not touch the receiving blocks any more, whatever happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.types import Fingerprint, Incarnation, Transport


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How a worker's pool can be read by another; travels as pdserve.v1.KvEndpoint."""

    incarnation: Incarnation
    fingerprint: Fingerprint
    num_blocks: int
    span_bytes: int
    host_id: str  # equal on processes that can open each other's memory
    pid: int
    shm_fd: int  # 0: the pool is not in shared memory
    tcp_address: str  # host:port; empty: no transfer server
    device_uuid: str  # empty: CPU
    cuda_ipc_handle: bytes
    cuda_ipc_offset: int
    transports: tuple[Transport, ...]


@dataclass(frozen=True, slots=True)
class BlockOffer:
    """One finished block in the offering worker's pool."""

    index: int  # position in the prompt's block list
    block: int  # block number in the offering pool
    generation: int  # of that block when it was offered
    checksum: int  # of the span, by the offering pool's algorithm (kv_transfer/checksum.py)


@dataclass(frozen=True, slots=True)
class ReadReport:
    bytes_moved: int
    first_byte: float  # time.monotonic()
    last_byte: float


class BlockReader(Protocol):
    """Reads one peer incarnation's blocks into the local pool. One thread at a time."""

    @property
    def transport(self) -> Transport: ...

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        """Copies ``offers[i]`` into local block ``into[i]`` and verifies each.

        ``deadline`` is in seconds of time.monotonic(). Raises TransferError (StaleBlock,
        ChecksumMismatch, LayoutMismatch) or DeadlineExceeded; then nothing that was read may be
        used, and the local blocks are no longer written to.
        """
        ...

    def close(self) -> None: ...


class BlockExporter(Protocol):
    """Makes the local pool readable by peers, for the pool's whole life."""

    def endpoint(self) -> Endpoint: ...

    def offers(self, wanted: Sequence[tuple[int, int]]) -> tuple[BlockOffer, ...]:
        """Reads generation and checksum of final blocks. Any thread.

        ``wanted``: place in the prompt's list of blocks, and block in our pool.
        """
        ...

    def close(self) -> None: ...
