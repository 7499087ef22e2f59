"""The reading end of a two-sided link (see slots.py): a queue of reads and one thread that owns it.

    OPENING -> READY -> (LOST | CLOSED)

A read is QUEUED -> RUNNING -> DONE; its deadline turns it CANCELLED, after which no local block is
written for it, while the owner thread still takes the slot in flight off the link.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence

import torch

from kv_transfer import session
from kv_transfer.base import BlockOffer, Endpoint, ReadReport
from kv_transfer.checksum import checksum_for
from kv_transfer.plan import check_offers, split_reads
from kv_transfer.slots import (
    PATIENCE_SECONDS,
    READER_RANK,
    LinkFactory,
    SlotLink,
    index_of,
    new_slot,
    slot_blocks,
    wait_for_slot,
    words,
)
from kv_transfer.wire import MAX_ENTRIES, Code, LinkId, LinkOpen, SlotRead, SlotStatus, error_of
from pdserve.engine.memory import PoolMemory
from pdserve.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    PdserveError,
    ProtocolError,
    TransferError,
)
from pdserve.types import Fingerprint, Transport

_log = logging.getLogger(__name__)


class _Read:
    """One read on its way through the owner thread."""

    def __init__(self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float) -> None:
        self.offers = offers
        self.into = into
        self.deadline = deadline
        self.done = threading.Event()
        # Held while local blocks are written; after ``cancel`` none of this read's is.
        self.writing = threading.Lock()
        self.cancelled = False
        self.error: PdserveError | None = None
        self.first_byte = self.last_byte = time.monotonic()

    def cancel(self) -> None:
        with self.writing:
            self.cancelled = True

    def fail(self, error: PdserveError) -> None:
        self.error = error
        self.done.set()


class SlotReader:
    """A BlockReader over a link of two ranks."""

    transport = Transport.NCCL

    def __init__(
        self,
        endpoint: Endpoint,
        pool: PoolMemory,
        fingerprint: Fingerprint,
        token: str,
        links: LinkFactory,
        deadline: float,
        patience_s: float = PATIENCE_SECONDS,
    ) -> None:
        self.usable = True
        self._endpoint = endpoint
        self._pool = pool
        self._checksum = checksum_for(endpoint.device_uuid)
        self._patience_s = patience_s
        self._sequence = 0
        self._lock = threading.Lock()  # usable and the queue change together
        self._reads: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        self._opened: queue.SimpleQueue[PdserveError | None] = queue.SimpleQueue()
        self._channel = session.connect(endpoint, fingerprint, token, deadline)
        # The link is set up by the thread that owns it.
        self._thread = threading.Thread(
            target=self._own, args=(links, deadline), name="kv-link", daemon=True
        )
        self._thread.start()
        error = self._opened.get()
        if error is not None:
            self._thread.join()
            raise error

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        check_offers(offers, into, self._endpoint.num_blocks)
        read = _Read(offers, into, deadline)
        with self._lock:
            if not self.usable:
                raise TransferError("the link to the peer is closed")
            self._reads.put(read)
        if not read.done.wait(max(0.0, deadline - time.monotonic())):
            read.cancel()
            raise DeadlineExceeded("the peer did not move within the transfer's deadline")
        if read.error is not None:
            raise read.error
        moved = len(offers) * self._pool.span_bytes
        return ReadReport(moved, read.first_byte, read.last_byte)

    def peer_alive(self) -> bool:
        try:
            self._channel.check_alive()
        except TransferError:
            return False
        return self.usable

    def interrupt(self) -> None:
        self._lose(TransferError("the link to the peer is closed"))
        self._channel.interrupt()

    def close(self) -> None:
        self.interrupt()
        self._thread.join()

    # ---- on the owner thread --------------------------------------------------------------------

    def _own(self, links: LinkFactory, deadline: float) -> None:
        link: SlotLink | None = None
        try:
            blocks = min(MAX_ENTRIES, slot_blocks(self._pool.span_bytes))
            link = self._open(links, blocks, deadline)
            with link.stream():
                slot = new_slot(self._pool, blocks)  # zeroed before anything is received into it
            self._opened.put(None)
            self._serve(link, slot)
        except Exception as error:
            # Whoever waits for this thread must hear of its end, whatever ended it.
            if not isinstance(error, PdserveError):
                _log.exception("the owner of a link failed")
            failure = _as_transfer_error(error)
            self._lose(failure)
            self._opened.put(failure)
        finally:
            if link is not None:
                link.abort()
            self._channel.close()

    def _open(self, links: LinkFactory, blocks: int, deadline: float) -> SlotLink:
        self._channel.send(LinkOpen(blocks), deadline)
        answer = self._channel.receive(deadline)
        if not isinstance(answer, LinkId):
            code = getattr(answer, "code", None)
            if isinstance(code, Code):
                raise error_of(code, 0)
            raise ProtocolError(f"expected a link's id, got {type(answer).__name__}")
        link = links.connect(answer.value, READER_RANK, deadline, self._channel.check_alive)
        try:
            status = self._receive_status(0, deadline)
            if status.code is not Code.OK:
                raise error_of(status.code, status.position)
        except (TransferError, DeadlineExceeded):
            link.abort()
            raise
        return link

    def _serve(self, link: SlotLink, slot: torch.Tensor) -> None:
        """Returns when the link is closed, raises when it is lost."""
        while (read := self._reads.get()) is not None:
            try:
                error = self._run(read, link, slot)
            except Exception as lost:
                read.fail(_as_transfer_error(lost))
                raise
            if error is not None:
                read.fail(error)
            read.done.set()

    def _run(self, read: _Read, link: SlotLink, slot: torch.Tensor) -> TransferError | None:
        """Moves one read; returns what is wrong with its blocks. Raises when the link is lost."""
        span = self._pool.span_bytes
        pieces = split_reads(len(read.offers), span, slot.shape[0] * span, slot.shape[0])
        for piece in pieces:
            if read.cancelled or not self.usable:
                return TransferError("the read was given up")
            error = self._run_slot(read, piece, link, slot)
            if error is not None:
                return error
        return None

    def _run_slot(
        self, read: _Read, piece: slice, link: SlotLink, slot: torch.Tensor
    ) -> TransferError | None:
        offers, into = read.offers[piece], read.into[piece]
        self._sequence += 1
        sequence = self._sequence
        blocks = tuple(offer.block for offer in offers)
        request = SlotRead(sequence, blocks, tuple(offer.generation for offer in offers))
        deadline = max(time.monotonic(), read.deadline) + self._patience_s
        self._channel.send(request, deadline)
        status = self._receive_status(sequence, deadline)
        if status.code is not Code.OK:
            return error_of(status.code, status.position)
        if piece.start == 0:
            read.first_byte = time.monotonic()
        rows = slot[: len(offers)]
        link.start_receive(rows)
        wait_for_slot(link, self._channel, deadline)
        read.last_byte = time.monotonic()
        status = self._receive_status(sequence, deadline)
        if status.code is not Code.OK:
            return error_of(status.code, status.position)
        with link.stream():
            sums = self._checksum.of_rows(rows)
        for offer, value in zip(offers, sums, strict=True):
            if value != offer.checksum:
                return ChecksumMismatch(
                    f"block {offer.block} of the peer arrived with another "
                    f"{self._checksum.name} checksum than it was offered with"
                )
        with read.writing:
            if not read.cancelled:
                with link.stream():
                    index = index_of(into, self._pool)
                    words(self._pool.blocks).index_copy_(0, index, words(rows))
                link.synchronize()
        return None

    def _receive_status(self, sequence: int, deadline: float) -> SlotStatus:
        message = self._channel.receive(deadline)
        if not isinstance(message, SlotStatus) or message.sequence != sequence:
            raise ProtocolError(f"expected the status of slot {sequence}, got {message}")
        return message

    def _lose(self, error: PdserveError) -> None:
        """No read is taken from now on, and those in the queue fail."""
        with self._lock:
            if not self.usable:
                return
            self.usable = False
            while True:
                try:
                    waiting = self._reads.get_nowait()
                except queue.Empty:
                    break
                if waiting is not None:
                    waiting.fail(error)
            self._reads.put(None)


def _as_transfer_error(error: Exception) -> PdserveError:
    if isinstance(error, TransferError | DeadlineExceeded):
        return error
    return TransferError(f"the link to the peer is lost: {error}")
