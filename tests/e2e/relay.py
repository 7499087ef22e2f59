"""A bad link between decode workers and transfer servers, that a test can make worse at a byte.

Decode workers connect here (``testing.transfer_relay``) and name the server in a first line. What
the server sends passes in small pieces; when the armed byte comes by, the damage is done, once.

    calm --arm(damage, after)--> waiting for its byte --> struck --> calm
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
from collections.abc import Callable

from kv_transfer.wire import HEADER, MAGIC, Code, Status, encode

PIECE = 4096
_LINGER_NONE = struct.pack("ii", 1, 0)


class Damage(enum.Enum):
    RESET = "reset"
    STALL = "stall"  # the connection stays open, nothing passes any more
    TRUNCATE = "truncate"  # an orderly end in the middle
    DUPLICATE = "duplicate"  # a piece passes twice
    REORDER = "reorder"  # a piece passes after the one that follows it
    FLIP = "flip"  # one bit


class Impostor(enum.Enum):
    """What the server seems to be in the handshake of every new connection."""

    NONE = "none"
    OTHER_LAYOUT = "other layout"
    OTHER_VERSION = "other version"


class Relay:
    """Listens until ``close``. ``passed``: bytes from servers to workers, in all."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        self.passed = 0
        self.struck = 0
        self.impostor = Impostor.NONE
        self._armed: tuple[Damage, int] | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, damage: Damage, after: int) -> None:
        """Strikes the piece that holds the byte ``after`` bytes from now."""
        with self._lock:
            self.struck = 0
            self._armed = (damage, self.passed + after)

    def cut(self) -> None:
        """Closes every connection, so that new ones are opened."""
        with self._lock:
            sockets, self._open = self._open, set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        host, _, port = _line(near).rpartition(":")
        if not port:
            near.close()
            return
        far = socket.create_connection((host, int(port)))
        for sock in (near, far):
            # Each small piece would wait for the one before to be acknowledged.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {near, far}
        down = _Down(self, near)
        upward = threading.Thread(target=_pump, args=(near, far, far.sendall), daemon=True)
        upward.start()
        _pump(far, near, down.forward)
        upward.join()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def due(self, size: int) -> tuple[Damage, int] | None:
        """Counts ``size`` bytes; the damage to do within them, and where."""
        with self._lock:
            start, self.passed = self.passed, self.passed + size
            if self._armed is None or self._armed[1] >= self.passed:
                return None
            damage, at = self._armed
            self._armed, self.struck = None, self.struck + 1
            return damage, max(0, at - start)


class _Down:
    """One connection's bytes towards the worker."""

    def __init__(self, relay: Relay, near: socket.socket) -> None:
        self._relay = relay
        self._near = near
        self._impostor = relay.impostor
        self._frames = 0
        self._stalled = False
        self._held = b""

    def forward(self, piece: bytes) -> None:
        if self._impostor is not Impostor.NONE:
            piece = self._disguised(piece)
        due = self._relay.due(len(piece))
        if due is not None:
            piece = self._damaged(*due, piece)
        if self._stalled or not piece:
            return
        held, self._held = self._held, b""
        self._near.sendall(piece + held)

    def _damaged(self, damage: Damage, at: int, piece: bytes) -> bytes:
        match damage:
            case Damage.RESET:
                self._near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
                self._near.shutdown(socket.SHUT_RD)
                raise ConnectionResetError
            case Damage.STALL:
                self._stalled = True
                return b""
            case Damage.TRUNCATE:
                self._near.sendall(piece[:at])
                raise ConnectionAbortedError
            case Damage.DUPLICATE:
                return piece + piece
            case Damage.REORDER:
                self._held = piece
                return b""
            case Damage.FLIP:
                bent = bytearray(piece)
                bent[at] ^= 1 << (at % 8)
                return bytes(bent)

    def _disguised(self, piece: bytes) -> bytes:
        """The challenge speaks another version, or the welcome is a refusal."""
        self._frames += 1
        if self._impostor is Impostor.OTHER_VERSION and self._frames == 1:
            magic, version, kind, flags, length = HEADER.unpack(piece[: HEADER.size])
            assert magic == MAGIC
            return HEADER.pack(magic, version + 1, kind, flags, length) + piece[HEADER.size :]
        if self._impostor is Impostor.OTHER_LAYOUT and self._frames == 2:
            return encode(Status(Code.LAYOUT))
        return piece


def _line(sock: socket.socket) -> str:
    got = bytearray()
    while not got.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            return ""
        got += byte
    return got.decode().strip()


def _pump(source: socket.socket, sink: socket.socket, forward: Callable[[bytes], None]) -> None:
    """Until either end closes; then the other end hears of it."""
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE):
            forward(piece)
    for sock in (sink, source):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
