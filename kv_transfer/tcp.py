"""Reading a peer's blocks over its transfer server: the bytes land in the local blocks directly.

    open -> read* -> closed       a lost, stalled or misbehaving peer closes the connection at once

The read runs on the caller's thread, so when it returns, nothing receives into local blocks any
more. Each span is checksummed as soon as it is complete, while the kernel receives the next one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kv_transfer import session, wire
from kv_transfer.base import BlockOffer, Endpoint, ReadReport
from kv_transfer.checksum import checksum_for
from kv_transfer.plan import check_offers, split_reads
from kv_transfer.session import Channel
from kv_transfer.spans import spans_of
from kv_transfer.wire import Code, Read, Status
from pdserve.engine.memory import PoolMemory
from pdserve.errors import ChecksumMismatch, DeadlineExceeded, ProtocolError, TransferError
from pdserve.types import Fingerprint, Transport

_LONGEST_MS = 2**32 - 1


class TcpReader:
    """A BlockReader. ``usable`` turns False once the connection is closed."""

    transport = Transport.TCP

    def __init__(
        self,
        endpoint: Endpoint,
        pool: PoolMemory,
        fingerprint: Fingerprint,
        token: str,
        message_bytes: int,
        deadline: float,
        relay: str = "",
    ) -> None:
        self.usable = True
        self._endpoint = endpoint
        self._checksum = checksum_for(endpoint.device_uuid)
        self._sink = spans_of(pool)
        self._message_bytes = message_bytes
        self._channel = session.connect(endpoint, fingerprint, token, deadline, relay)

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        check_offers(offers, into, self._endpoint.num_blocks)
        if not self.usable:
            raise TransferError("the transfer connection is closed")
        blocks_max = min(wire.MAX_ENTRIES, self._sink.max_blocks())
        span = self._endpoint.span_bytes
        first = last = time.monotonic()
        for part in split_reads(len(offers), span, self._message_bytes, blocks_max):
            try:
                outcome = self._read_part(offers[part], into[part], deadline)
            except (TransferError, DeadlineExceeded):
                # Bytes may still be on their way; only a new connection starts clean.
                self.close()
                raise
            if isinstance(outcome, TransferError):
                raise outcome
            begun, last = outcome
            first = begun if part.start == 0 else first
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

    def _read_part(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> tuple[float, float] | TransferError:
        """One request: times of its first and last byte, or what is wrong with the blocks.

        Raises when the connection is no longer in step.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the transfer's deadline passed")
        request = Read(
            min(_LONGEST_MS, int(remaining * 1000) + 1),
            tuple(offer.block for offer in offers),
            tuple(offer.generation for offer in offers),
        )
        self._channel.send(request, deadline)
        status = receive_status(self._channel, deadline)
        if status.code is not Code.OK:
            return wire.error_of(status.code, status.position)
        first, wrong = self._receive_spans(offers, into, deadline)
        last = time.monotonic()
        status = receive_status(self._channel, deadline)
        # Generations first: what a freed block was overwritten with fails its checksum, too.
        if status.code is not Code.OK:
            return wire.error_of(status.code, status.position)
        if wrong is not None:
            return ChecksumMismatch(
                f"block {offers[wrong].block} of the peer arrived with another "
                f"{self._checksum.name} checksum than it was offered with"
            )
        self._sink.commit(into)
        return first, last

    def _receive_spans(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> tuple[float, int | None]:
        """Time of the first byte, and the position of the first span with a wrong checksum."""
        first = 0.0
        wrong: int | None = None
        for i, span in enumerate(self._sink.buffers(into)):
            if i == 0:
                first = self._channel.wait_readable(deadline)
            self._channel.receive_into(span, deadline)
            if wrong is None and self._checksum.of_span(span) != offers[i].checksum:
                wrong = i
        return first, wrong


def receive_status(channel: Channel, deadline: float) -> Status:
    message = channel.receive(deadline)
    if not isinstance(message, Status):
        raise ProtocolError(f"expected a status, got {type(message).__name__}")
    return message
