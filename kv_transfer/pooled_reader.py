"""The way to one peer incarnation that many reads share, one after another.

    IDLE -> OPEN -> IDLE       IDLE again when the connection breaks, or when it is let go
      any of them -> FENCED    revoked, or the worker ends: nothing is opened or read any more
      FENCED -> CLOSED         and nothing is open

A read that breaks the connection fails alone: the next in the queue opens a new one. What a read
waits for its turn does not count towards the time that a read may take, only towards its deadline.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kv_transfer.base import BlockOffer, BlockReader, ReadReport
from pdserve.errors import DeadlineExceeded, TransferError
from pdserve.types import Transport

# A read is not to blame for one loss of the connection before its turn; a peer that is lost again
# is in trouble itself, and whoever waits for it has something better to do.
_LOSSES_FORGIVEN = 1


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
    """A BlockReader that many threads may use. ``open_by`` connects by a deadline, or raises."""

    def __init__(
        self, open_by: Callable[[float], TransportReader], setup_s: float, read_s: float
    ) -> None:
        self._open_by = open_by
        self._setup_s = setup_s
        self._read_s = read_s
        # Held while the connection is opened, read from or closed; ``_inner`` changes under it.
        self._turn = threading.Lock()
        self._inner: TransportReader | None = None
        self._transport: Transport | None = None
        self._losses = 0  # connections that broke or could not be opened
        self._fenced = False

    @property
    def transport(self) -> Transport:
        """Of the connection that was opened last."""
        assert self._transport is not None, "asked for once ``open`` has succeeded"
        return self._transport

    @property
    def is_open(self) -> bool:
        return self._inner is not None

    def open(self) -> None:
        """Opens the connection, unless it is open, within the set-up time."""
        inner = self._inner
        if inner is not None and inner.usable:
            return
        deadline = time.monotonic() + self._setup_s
        with self._my_turn(deadline, "another thread is setting up the connection to this peer"):
            self._opened(deadline)

    def read(
        self, offers: Sequence[BlockOffer], into: Sequence[int], deadline: float
    ) -> ReadReport:
        losses = self._losses
        with self._my_turn(deadline, "the reads before this one took all its time"):
            if self._losses - losses > _LOSSES_FORGIVEN:
                raise TransferError("the peer was lost more than once before this read's turn")
            inner = self._opened(min(deadline, time.monotonic() + self._setup_s))
            bound = min(deadline, time.monotonic() + self._read_s)
            try:
                return inner.read(offers, into, bound)
            finally:
                if not inner.usable:
                    self._losses += 1

    def let_go(self) -> bool:
        """Closes a connection that broke or whose peer has ended, if nobody uses it now."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            inner = self._inner
            if inner is None or (inner.usable and inner.peer_alive()):
                return False
            self._drop()
            return True
        finally:
            self._turn.release()

    def fence(self) -> None:
        """From now on no read begins, and one that runs fails soon. Does not block."""
        self._fenced = True
        inner = self._inner
        if inner is not None:
            inner.interrupt()

    def close(self) -> None:
        """Returns when no read touches local blocks any more; those that wait fail."""
        self.fence()
        with self._turn:
            self._drop()

    @contextlib.contextmanager
    def _my_turn(self, deadline: float, late: str) -> Iterator[None]:
        if not self._turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineExceeded(late)
        try:
            yield
        finally:
            self._turn.release()

    def _opened(self, deadline: float) -> TransportReader:
        """The connection, a new one if need be. Within a turn."""
        if self._fenced:
            raise TransferError("what was open to this peer is closed")
        inner = self._inner
        if inner is not None and inner.usable:
            return inner
        self._drop()
        try:
            inner = self._open_by(deadline)
        except (TransferError, DeadlineExceeded):
            self._losses += 1
            raise
        self._inner, self._transport = inner, inner.transport
        if self._fenced:
            # Whoever closed us found nothing to interrupt, and waits for this turn.
            self._drop()
            raise TransferError("the peer was given up while the connection was set up")
        return inner

    def _drop(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.close()
