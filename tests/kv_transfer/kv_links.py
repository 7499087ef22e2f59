"""Two-rank links over a plain socket: stands in for NCCL, so that the order of slots, their
cancellation and the loss of a peer are tested between two processes where there is no GPU."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

import torch

from kv_transfer.wire import LINK_ID_BYTES
from pdserve.errors import DeadlineExceeded, TransferError

# So small that a slot never fits: a sender is done only when the receiver has taken it.
_BUFFER = 16 * 1024


class SocketLinks:
    def __init__(self) -> None:
        self._listeners: dict[bytes, socket.socket] = {}

    def new_id(self) -> bytes:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        link_id = port.to_bytes(4, "little") + os.urandom(LINK_ID_BYTES - 4)
        self._listeners[link_id] = listener
        return link_id

    def connect(
        self, link_id: bytes, rank: int, deadline: float, check_peer: Callable[[], None]
    ) -> SocketLink:
        left = max(0.01, deadline - time.monotonic())
        try:
            if rank == 0:
                with self._listeners.pop(link_id) as listener:
                    listener.settimeout(0.01)
                    sock = self._accept(listener, deadline, check_peer)
            else:
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
                sock.settimeout(left)
                sock.connect(("127.0.0.1", int.from_bytes(link_id[:4], "little")))
        except TimeoutError as error:
            raise DeadlineExceeded("the other rank did not come") from error
        except OSError as error:
            raise TransferError(f"no link: {error}") from error
        return SocketLink(sock)

    def _accept(
        self, listener: socket.socket, deadline: float, check_peer: Callable[[], None]
    ) -> socket.socket:
        while True:
            check_peer()
            try:
                return listener.accept()[0]
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise


class SocketLink:
    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._sending = False
        self._left = memoryview(b"")

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def start_send(self, slot: torch.Tensor) -> None:
        self._start(slot, sending=True)

    def start_receive(self, slot: torch.Tensor) -> None:
        self._start(slot, sending=False)

    def done(self) -> bool:
        try:
            while self._left:
                if self._sending:
                    moved = self._sock.send(self._left)
                else:
                    moved = self._sock.recv_into(self._left)
                if moved == 0:
                    raise TransferError("the other rank is gone")
                self._left = self._left[moved:]
        except BlockingIOError:
            return False
        except OSError as error:
            raise TransferError(f"the link broke: {error}") from error
        return True

    def synchronize(self) -> None:
        pass

    def abort(self) -> None:
        self._sock.close()

    def _start(self, slot: torch.Tensor, sending: bool) -> None:
        assert not self._left, "one slot at a time"
        self._sending = sending
        self._left = slot.view(-1).numpy().data
