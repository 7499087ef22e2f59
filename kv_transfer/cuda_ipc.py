"""Reading a peer's pool on the same device: its allocation, opened by handle, copied on the device.

    open -> read* -> closed

The peer's generations lie in its host memory, so they are asked for over its transfer server once
the copy is complete. Generations only grow: one that still is what was offered then, was so during
the whole copy. Copies go through a buffer, so that a local block only gets verified bytes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

import torch

from kv_transfer import cudart, session
from kv_transfer.base import BlockOffer, Endpoint, ReadReport
from kv_transfer.checksum import checksum_for
from kv_transfer.plan import check_offers, split_reads
from kv_transfer.slots import index_of, new_slot, slot_blocks, words
from kv_transfer.tcp import receive_status
from kv_transfer.wire import MAX_ENTRIES, Check, Code, error_of
from pdserve.engine.memory import PoolMemory
from pdserve.errors import ChecksumMismatch, DeadlineExceeded, PdserveError, TransferError
from pdserve.types import Fingerprint, Transport

_log = logging.getLogger(__name__)


class CudaIpcReader:
    """A BlockReader. ``usable`` turns False once the connection is closed."""

    transport = Transport.CUDA_IPC

    def __init__(
        self,
        endpoint: Endpoint,
        pool: PoolMemory,
        fingerprint: Fingerprint,
        token: str,
        deadline: float,
    ) -> None:
        self.usable = True
        self._endpoint = endpoint
        self._pool = pool
        self._device = pool.blocks.device
        self._checksum = checksum_for(endpoint.device_uuid)
        # The handshake first: a handle of another incarnation may mean other memory by now.
        self._channel = session.connect(endpoint, fingerprint, token, deadline)
        try:
            self._pointer = cudart.open_handle(endpoint.cuda_ipc_handle, self._device)
        except PdserveError:
            self._channel.close()
            raise
        size = endpoint.num_blocks * endpoint.span_bytes
        base = self._pointer + endpoint.cuda_ipc_offset
        try:
            flat = cudart.device_bytes(base, size, self._device)
            self._remote = flat.view(endpoint.num_blocks, endpoint.span_bytes)
            self._buffer = new_slot(pool, slot_blocks(pool.span_bytes))
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # torch's, of memory or of the device
            self._let_go()
            self._channel.close()
            raise TransferError(f"the peer's memory cannot be used: {error}") from error

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        check_offers(offers, into, self._endpoint.num_blocks)
        if not self.usable:
            raise TransferError("the peer's memory is closed")
        span, rows = self._endpoint.span_bytes, self._buffer.shape[0]
        first = time.monotonic()
        wrong: BlockOffer | None = None
        try:
            # Kernels of the engine that are still queued may use the local blocks' old contents.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for piece in split_reads(len(offers), span, rows * span, rows):
                if time.monotonic() >= deadline:
                    raise DeadlineExceeded("the transfer's deadline passed")
                wrong = wrong or self._copy(offers[piece], into[piece])
            self._stream.synchronize()
        except RuntimeError as error:
            raise TransferError(f"the device could not copy: {error}") from error
        finally:
            with contextlib.suppress(RuntimeError):  # it has been told
                self._stream.synchronize()
        last = time.monotonic()
        self._check_generations(offers, deadline)
        if wrong is not None:
            raise ChecksumMismatch(
                f"block {wrong.block} of the peer holds other bytes than it was offered with"
            )
        return ReadReport(len(offers) * span, first, last)

    def peer_alive(self) -> bool:
        try:
            self._channel.check_alive()
        except TransferError:
            return False
        return True

    def interrupt(self) -> None:
        self.usable = False
        self._channel.interrupt()

    def close(self) -> None:
        self.usable = False
        self._channel.close()
        if self._pointer:
            with contextlib.suppress(RuntimeError):  # nothing runs on a device that failed
                self._stream.synchronize()
            self._remote = self._buffer[:0]
            self._let_go()

    def _let_go(self) -> None:
        """Does not raise: a handle of a dead peer must not keep others from being opened."""
        pointer, self._pointer = self._pointer, 0
        try:
            cudart.close_handle(pointer, self._device)
        except (TransferError, RuntimeError) as error:
            _log.warning("the memory of a peer stays mapped: %s", error)

    def _copy(self, offers: Sequence[BlockOffer], into: Sequence[int]) -> BlockOffer | None:
        """At most one buffer full; returns an offer whose bytes are wrong."""
        rows = self._buffer[: len(offers)]
        with torch.cuda.stream(self._stream):
            source = index_of([offer.block for offer in offers], self._pool)
            torch.index_select(words(self._remote), 0, source, out=words(rows))
            sums = self._checksum.of_rows(rows)
            for offer, value in zip(offers, sums, strict=True):
                if value != offer.checksum:
                    return offer
            words(self._pool.blocks).index_copy_(0, index_of(into, self._pool), words(rows))
        return None

    def _check_generations(self, offers: Sequence[BlockOffer], deadline: float) -> None:
        for start in range(0, len(offers), MAX_ENTRIES):
            part = offers[start : start + MAX_ENTRIES]
            check = Check(
                tuple(offer.block for offer in part), tuple(offer.generation for offer in part)
            )
            try:
                self._channel.send(check, deadline)
                status = receive_status(self._channel, deadline)
            except (TransferError, DeadlineExceeded):
                # A late answer must not be taken for that of the next check.
                self.interrupt()
                raise
            if status.code is not Code.OK:
                raise error_of(status.code, start + status.position)
