"""Two-sided transfer: packed slots over a link of two ranks, in one order on both ends.

    reader's owner thread                     server's connection thread (the link's owner there)
    ---------------------                     ---------------------------------------------------
    LinkOpen -------------------------------> new id
             <------------------------------- LinkId
    connect(rank 1)                           connect(rank 0)
             <------------------------------- SlotStatus 0
    SlotRead n -----------------------------> generations still right?
             <------------------------------- SlotStatus n: accepted
    receive a slot  <======= link =========== gather into a slot, send it
             <------------------------------- SlotStatus n: generations looked at again
    verify, scatter into the local blocks

    IDLE -> ASKED -> RUNNING -> IDLE          LOST from any of them

A slot is a buffer of fixed size on each end; the part of it that the request fills moves.
A slot that both ends accepted always runs: it is received into a buffer of the link's own, so a
read whose deadline has passed leaves it running, and only its scatter is dropped. The link is
aborted when the peer is lost, never for the sake of one read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch

from kv_transfer.session import FRAME_SECONDS, Channel
from kv_transfer.wire import LINK_ID_BYTES, Code, LinkId, SlotRead, SlotStatus
from pdserve.engine.memory import PoolMemory
from pdserve.errors import DeadlineExceeded, ProtocolError, TransferError

SLOT_BYTES = 16 * 2**20
# A link that has not moved for so long has lost its peer.
PATIENCE_SECONDS = 30.0
SETUP_SECONDS = 30.0
SERVER_RANK = 0
READER_RANK = 1
_POLL_SECONDS = (50e-6, 1e-3)
_LOOK_EVERY = 0.02

Judge = Callable[[PoolMemory, Sequence[int], Sequence[int]], tuple[Code, int]]


class SlotLink(Protocol):
    """A link of two ranks. One owner thread; at most one slot moves at a time.

    Methods raise TransferError when the link is broken; then only ``abort`` may follow.
    """

    def stream(self) -> AbstractContextManager[object]:
        """Tensor work inside runs in the link's order: before what is started next."""
        ...

    def start_send(self, slot: torch.Tensor) -> None: ...

    def start_receive(self, slot: torch.Tensor) -> None: ...

    def done(self) -> bool:
        """Whether the slot started last has moved."""
        ...

    def synchronize(self) -> None:
        """Waits for the tensor work given to ``stream``."""
        ...

    def abort(self) -> None:
        """Ends the link and frees it, whatever moves. Idempotent."""
        ...


class LinkFactory(Protocol):
    def new_id(self) -> bytes:
        """LINK_ID_BYTES that name a link to both of its ranks."""
        ...

    def connect(
        self, link_id: bytes, rank: int, deadline: float, check_peer: Callable[[], None]
    ) -> SlotLink:
        """Returns when both ranks are there; TransferError or DeadlineExceeded otherwise.

        ``check_peer`` is called again and again meanwhile and raises when the peer is gone.
        """
        ...


def slot_blocks(span_bytes: int) -> int:
    """How many blocks one slot holds."""
    return max(1, SLOT_BYTES // span_bytes)


def new_slot(pool: PoolMemory, blocks: int) -> torch.Tensor:
    """uint8 [blocks, span_bytes] on the pool's device."""
    return torch.zeros((blocks, pool.span_bytes), dtype=torch.uint8, device=pool.blocks.device)


def index_of(blocks: Sequence[int], pool: PoolMemory) -> torch.Tensor:
    table = torch.from_numpy(np.asarray(blocks, dtype=np.int64))
    return table.to(pool.blocks.device)


def words(rows: torch.Tensor) -> torch.Tensor:
    """The same memory, eight bytes an element where they can be: single ones are slow on a device.

    rows: uint8 [n, span_bytes], contiguous.
    """
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


def wait_for_slot(link: SlotLink, channel: Channel, deadline: float) -> None:
    """Polls until the slot has moved, watching the control connection for the peer's end."""
    pause, longest = _POLL_SECONDS
    looked = time.monotonic()
    while not link.done():
        now = time.monotonic()
        if now > deadline:
            raise DeadlineExceeded("a slot did not move within the link's patience")
        if now - looked > _LOOK_EVERY:
            channel.check_alive()
            looked = now
        time.sleep(pause)
        pause = min(pause * 2, longest)


class SlotSender:
    """The serving end of one link."""

    def __init__(
        self, channel: Channel, pool: PoolMemory, links: LinkFactory, judge: Judge
    ) -> None:
        self._channel = channel
        self._pool = pool
        self._links = links
        self._judge = judge
        self._link: SlotLink | None = None
        self._slot: torch.Tensor | None = None
        self._next = 1

    def open(self, blocks: int) -> None:
        """Raises when the link cannot be set up; the peer has been told."""
        if blocks > slot_blocks(self._pool.span_bytes):
            raise ProtocolError(f"a slot of {blocks} blocks is longer than {SLOT_BYTES} bytes")
        try:
            link_id = self._links.new_id()
            assert len(link_id) == LINK_ID_BYTES
            self._channel.send(LinkId(link_id), time.monotonic() + FRAME_SECONDS)
            deadline = time.monotonic() + SETUP_SECONDS
            self._link = self._links.connect(
                link_id, SERVER_RANK, deadline, self._channel.check_alive
            )
        except (TransferError, DeadlineExceeded):
            self._status(0, Code.LINK)
            raise
        with self._link.stream():
            self._slot = new_slot(self._pool, blocks)
        self._status(0, Code.OK)

    def serve(self, request: SlotRead) -> int:
        """Sends one slot if its blocks are still there; returns the bytes sent."""
        link, slot = self._link, self._slot
        assert link is not None
        assert slot is not None
        if request.sequence != self._next or not 1 <= len(request.blocks) <= slot.shape[0]:
            raise ProtocolError(
                f"slot {request.sequence} of {len(request.blocks)} blocks, expected slot "
                f"{self._next} of 1 to {slot.shape[0]}"
            )
        self._next += 1
        code, position = self._judge(self._pool, request.blocks, request.generations)
        self._status(request.sequence, code, position)
        if code is not Code.OK:
            return 0
        count = len(request.blocks)
        with link.stream():
            index = index_of(request.blocks, self._pool)
            torch.index_select(words(self._pool.blocks), 0, index, out=words(slot[:count]))
        link.start_send(slot[:count])
        wait_for_slot(link, self._channel, time.monotonic() + PATIENCE_SECONDS)
        code, position = self._judge(self._pool, request.blocks, request.generations)
        self._status(request.sequence, code, position)
        return count * self._pool.span_bytes

    def close(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None

    def _status(self, sequence: int, code: Code, position: int = 0) -> None:
        deadline = time.monotonic() + FRAME_SECONDS
        self._channel.send(SlotStatus(sequence, code, position), deadline)
