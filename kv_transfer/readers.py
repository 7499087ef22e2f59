"""The readers of a receiving worker: one for each peer incarnation, opened once and kept.

    absent -> OPENING -> OPEN -> CLOSED     closed on error, revocation, the peer's end, or ours

A reader serves one thread at a time; others wait for it within their deadlines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from kv_transfer.base import BlockOffer, BlockReader, Endpoint, ReadReport
from kv_transfer.cuda_ipc import CudaIpcReader
from kv_transfer.host import local_capabilities
from kv_transfer.nccl import nccl_links
from kv_transfer.plan import Choice, check_pairing, choose_transport
from kv_transfer.shm import ShmReader
from kv_transfer.slot_reader import SlotReader
from kv_transfer.slots import LinkFactory
from kv_transfer.tcp import TcpReader
from pdserve.config import TransferConfig
from pdserve.engine.memory import PoolMemory
from pdserve.errors import (
    DeadlineExceeded,
    LayoutMismatch,
    ProtocolError,
    StaleBlock,
    TransferError,
)
from pdserve.types import Fingerprint, Incarnation, Transport

_log = logging.getLogger(__name__)
# More peers than a cluster replaces while one of its workers lives.
_REVOKED_MAX = 4096


class TransportReader(BlockReader, Protocol):
    """What each transport gives the pool of readers."""

    usable: bool  # False: closed, or no longer in step with the peer

    def peer_alive(self) -> bool:
        """Asked only while nobody reads."""
        ...

    def interrupt(self) -> None:
        """Makes a read that waits for the peer fail soon. Any thread."""
        ...


class PooledReader:
    """A BlockReader that many threads may use, one after another."""

    def __init__(self, inner: TransportReader) -> None:
        self._inner = inner
        self._turn = threading.Lock()
        self.transport: Transport = inner.transport

    @property
    def usable(self) -> bool:
        return self._inner.usable

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded("the reads before this one took all its time")
        try:
            return self._inner.read(offers, into, deadline)
        finally:
            self._turn.release()

    def lost(self) -> bool:
        """Whether the reader is of no more use; one that reads just now is."""
        if not self._inner.usable:
            return True
        if not self._turn.acquire(blocking=False):
            return False
        try:
            return not self._inner.peer_alive()
        finally:
            self._turn.release()

    def close(self) -> None:
        """Returns when no read touches local blocks any more."""
        self._inner.interrupt()
        with self._turn:
            self._inner.close()


class _Slot:
    """The place of one peer: its lock is held while its reader is opened."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        self.reader: PooledReader | None = None
        # What could not be set up with this peer and is not tried again.
        self.failed: set[Transport] = set()


class ReaderPool:
    """Thread-safe. Every error is a TransferError (of some kind) or DeadlineExceeded."""

    def __init__(
        self,
        pool: PoolMemory,
        fingerprint: Fingerprint,
        config: TransferConfig,
        cluster_token: str,
        *,
        links: LinkFactory | None = None,
        relay: str = "",
    ) -> None:
        self._pool = pool
        self._fingerprint = fingerprint
        self._config = config
        self._token = cluster_token
        self._links = links or nccl_links(pool)
        self._relay = relay
        self._order = tuple(Transport(name) for name in config.transports)
        self._local = local_capabilities(pool, links=self._links is not None)
        self._lock = threading.Lock()
        self._slots: dict[Incarnation, _Slot] = {}
        self._revoked: dict[Incarnation, None] = {}
        self._closed = False

    def choose(self, endpoint: Endpoint) -> Choice:
        """Which transport a pair would use, and why."""
        check_pairing(endpoint, self._fingerprint, self._pool.span_bytes)
        return choose_transport(self._local, endpoint, self._order)

    def reader_for(self, endpoint: Endpoint) -> PooledReader:
        """The open reader of that incarnation; opens it within the set-up time if there is none."""
        check_pairing(endpoint, self._fingerprint, self._pool.span_bytes)
        deadline = time.monotonic() + self._config.setup_timeout_s
        slot = self._slot_of(endpoint.incarnation)
        if not slot.opening.acquire(timeout=self._config.setup_timeout_s):
            raise DeadlineExceeded("another read is still setting up the connection to this peer")
        try:
            if slot.reader is not None and slot.reader.usable:
                return slot.reader
            if slot.reader is not None:
                slot.reader.close()
                slot.reader = None
            reader = PooledReader(self._open(slot, endpoint, deadline))
            if not self._keep(endpoint.incarnation, slot, reader):
                reader.close()
                raise StaleBlock("the peer was revoked while the connection was set up")
            return reader
        finally:
            slot.opening.release()

    def revoke(self, incarnation: Incarnation) -> None:
        """Closes the reader of a peer that is gone or fenced; it is never opened again."""
        with self._lock:
            self._revoked[incarnation] = None
            while len(self._revoked) > _REVOKED_MAX:
                del self._revoked[next(iter(self._revoked))]
            slot = self._slots.pop(incarnation, None)
            reader = slot.reader if slot else None
        if reader is not None:
            reader.close()

    def close_lost(self) -> int:
        """Closes readers whose peer has ended (a mapping would keep its memory). How many."""
        with self._lock:
            slots = list(self._slots.items())
        lost = [(key, slot) for key, slot in slots if slot.reader and slot.reader.lost()]
        for key, slot in lost:
            with self._lock:
                if self._slots.get(key) is slot:
                    del self._slots[key]
            if slot.reader is not None:
                slot.reader.close()
        return len(lost)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            if slot.reader is not None:
                slot.reader.close()

    def _slot_of(self, incarnation: Incarnation) -> _Slot:
        with self._lock:
            if self._closed:
                raise TransferError("this worker's readers are closed")
            if incarnation in self._revoked:
                raise StaleBlock("the peer's incarnation was revoked")
            return self._slots.setdefault(incarnation, _Slot())

    def _keep(self, incarnation: Incarnation, slot: _Slot, reader: PooledReader) -> bool:
        """False when the peer was revoked, or the pool closed, while the reader was opened."""
        with self._lock:
            if self._slots.get(incarnation) is not slot:
                return False
            slot.reader = reader
            return True

    def _open(self, slot: _Slot, endpoint: Endpoint, deadline: float) -> TransportReader:
        """By the best transport; by the next one when that cannot be set up."""
        self.close_lost()
        while True:
            order = tuple(transport for transport in self._order if transport not in slot.failed)
            choice = choose_transport(self._local, endpoint, order)
            try:
                reader = self._open_by(choice.transport, endpoint, deadline)
            except (LayoutMismatch, StaleBlock, ProtocolError):
                raise  # about the peer, not about the way to it
            except (TransferError, DeadlineExceeded) as error:
                others = set(order) - {choice.transport}
                if not others & set(endpoint.transports):
                    raise
                slot.failed.add(choice.transport)
                name = choice.transport.value
                _log.warning("%s to a peer failed, the next is taken: %s", name, error)
                if isinstance(error, DeadlineExceeded):
                    raise
                continue
            _log.info(
                "blocks of peer %s move by %s: %s",
                endpoint.incarnation[:4].hex(),
                choice.transport.value,
                choice.reason,
            )
            return reader

    def _open_by(
        self, transport: Transport, endpoint: Endpoint, deadline: float
    ) -> TransportReader:
        pool, fingerprint, token = self._pool, self._fingerprint, self._token
        if transport is Transport.SHM:
            return ShmReader(endpoint, pool)
        if transport is Transport.CUDA_IPC:
            return CudaIpcReader(endpoint, pool, fingerprint, token, deadline)
        if transport is Transport.NCCL:
            assert self._links is not None
            return SlotReader(endpoint, pool, fingerprint, token, self._links, deadline)
        limit = self._config.max_message_bytes
        return TcpReader(endpoint, pool, fingerprint, token, limit, deadline, self._relay)
