"""The readers of a receiving worker: one for each peer incarnation, opened once and kept.

    absent -> kept (see pooled_reader.py) -> closed      by revocation, or by our end

Which transport a reader opens, and by which one it goes on when that fails, is decided here.
"""

from __future__ import annotations

import logging
import threading

from kv_transfer.base import Endpoint
from kv_transfer.cuda_ipc import CudaIpcReader
from kv_transfer.host import local_capabilities
from kv_transfer.nccl import links_on_one_device, nccl_links
from kv_transfer.plan import Choice, check_pairing, choose_transport
from kv_transfer.pooled_reader import PooledReader, TransportReader
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
_READERS_MAX = 4096


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
        self._local = local_capabilities(
            pool,
            links=self._links is not None,
            links_on_one_device=self._links is not None and links_on_one_device(),
        )
        self._lock = threading.Lock()
        self._readers: dict[Incarnation, PooledReader] = {}
        self._revoked: dict[Incarnation, None] = {}
        self._closed = False

    def choose(self, endpoint: Endpoint) -> Choice:
        """Which transport a pair would use, and why."""
        check_pairing(endpoint, self._fingerprint, self._pool.span_bytes)
        return choose_transport(self._local, endpoint, self._order)

    def reader_for(self, endpoint: Endpoint) -> PooledReader:
        """The open reader of that incarnation; opens it within the set-up time if there is none."""
        check_pairing(endpoint, self._fingerprint, self._pool.span_bytes)
        reader = self._reader_of(endpoint)
        reader.open()
        return reader

    def fence(self, incarnation: Incarnation) -> PooledReader | None:
        """That peer is gone: nothing is read from it or opened to it from now on. Does not block.

        Returns what is still to be closed, for whoever may wait for the read that runs.
        """
        with self._lock:
            self._revoked[incarnation] = None
            while len(self._revoked) > _REVOKED_MAX:
                del self._revoked[next(iter(self._revoked))]
            reader = self._readers.pop(incarnation, None)
        if reader is not None:
            reader.fence()
        return reader

    def close_lost(self) -> int:
        """Closes connections whose peer has ended (a mapping would keep its memory). How many."""
        with self._lock:
            readers = list(self._readers.values())
        return sum(reader.let_go() for reader in readers)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            readers = list(self._readers.values())
            self._readers.clear()
        for reader in readers:
            reader.close()

    def _reader_of(self, endpoint: Endpoint) -> PooledReader:
        with self._lock:
            if self._closed:
                raise TransferError("this worker's readers are closed")
            if endpoint.incarnation in self._revoked:
                raise StaleBlock("the peer's incarnation was revoked")
            reader = self._readers.get(endpoint.incarnation)
            if reader is None:
                self._make_room()
                reader = self._readers[endpoint.incarnation] = self._new_reader(endpoint)
            return reader

    def _make_room(self) -> None:
        """Forgets the oldest reader with nothing open, if there are too many to keep."""
        if len(self._readers) < _READERS_MAX:
            return
        for incarnation, reader in self._readers.items():
            if not reader.is_open:
                del self._readers[incarnation]
                return

    def _new_reader(self, endpoint: Endpoint) -> PooledReader:
        # What could not be set up with this peer and is not tried again.
        failed: set[Transport] = set()
        config = self._config
        return PooledReader(
            lambda deadline: self._open(failed, endpoint, deadline),
            config.setup_timeout_s,
            config.deadline_s,
        )

    def _open(self, failed: set[Transport], endpoint: Endpoint, deadline: float) -> TransportReader:
        """By the best transport; by the next one when that cannot be set up."""
        self.close_lost()
        while True:
            order = tuple(transport for transport in self._order if transport not in failed)
            choice = choose_transport(self._local, endpoint, order)
            try:
                reader = self._open_by(choice.transport, endpoint, deadline)
            except (LayoutMismatch, StaleBlock, ProtocolError):
                raise  # about the peer, not about the way to it
            except (TransferError, DeadlineExceeded) as error:
                others = set(order) - {choice.transport}
                if not others & set(endpoint.transports):
                    raise
                failed.add(choice.transport)
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
