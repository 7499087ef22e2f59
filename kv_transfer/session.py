"""One authenticated transfer connection: the socket, its frames, and the handshake of both ends.

    connected -> challenged -> (welcomed | refused) -> requests and replies ... -> closed

Each end proves that it knows the cluster's token by an HMAC over both nonces and over whom the
client means; the token itself never travels. The proof authenticates the peers, it encrypts
nothing. Deadlines are seconds of time.monotonic(); None waits as long as the connection lives.
After any error the connection is of no more use and its owner closes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kv_transfer import wire
from kv_transfer.base import Endpoint
from kv_transfer.wire import Challenge, Code, Hello, Message, Status, Welcome
from pdserve.errors import DeadlineExceeded, PdserveError, ProtocolError, TransferError
from pdserve.types import Fingerprint, Incarnation

# Once its first byte is here, the rest of a frame must follow within this time.
FRAME_SECONDS = 5.0
_BUFFER_BYTES = 4 * 2**20
_IOV_MAX = 1024  # buffers that the kernel takes in one sendmsg


@dataclass(frozen=True, slots=True)
class Identity:
    """The pool that a server speaks for."""

    incarnation: Incarnation
    fingerprint: Fingerprint
    num_blocks: int
    span_bytes: int


class Channel:
    """A connected socket that moves frames and raw spans. Used by one thread at a time.

    Errors: DeadlineExceeded when time is up, ProtocolError for a bad frame, TransferError when the
    connection is lost.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        _tune(sock)

    def send(self, message: Message, deadline: float | None) -> None:
        self.send_views([memoryview(wire.encode(message))], deadline)

    def send_views(self, views: Sequence[memoryview], deadline: float | None) -> None:
        """Sends byte views one after another, straight from the memory that they show."""
        pending = list(views)
        at = 0
        while at < len(pending):
            with _lost_peer():
                self._set_timeout(deadline)
                sent = self._sock.sendmsg(pending[at : at + _IOV_MAX])
            while at < len(pending) and sent >= len(pending[at]):
                sent -= len(pending[at])
                at += 1
            if sent:
                pending[at] = pending[at][sent:]

    def receive(self, deadline: float | None) -> Message:
        """The next frame; its first byte by ``deadline``, the rest soon after."""
        header = bytearray(wire.HEADER.size)
        view = memoryview(header)
        got = self._receive_some(view, deadline)
        soon = time.monotonic() + FRAME_SECONDS
        rest = soon if deadline is None else min(soon, deadline)
        self.receive_into(view[got:], rest)
        parsed = wire.decode_header(bytes(header))
        payload = bytearray(parsed.length)
        self.receive_into(memoryview(payload), rest)
        return wire.decode_payload(parsed.kind, bytes(payload))

    def receive_into(self, view: memoryview, deadline: float | None) -> None:
        """Fills the whole view."""
        at = 0
        while at < len(view):
            at += self._receive_some(view[at:], deadline)

    def wait_readable(self, deadline: float) -> float:
        """Waits for the next byte without taking it; the time when it was here."""
        with _lost_peer():
            self._set_timeout(deadline)
            self._sock.recv(1, socket.MSG_PEEK)
        return time.monotonic()

    def check_alive(self) -> None:
        """Raises TransferError when the peer has closed the connection. Any thread."""
        number = self._sock.fileno()
        poll = select.poll()
        if number >= 0:
            poll.register(number, select.POLLRDHUP)
        if number < 0 or poll.poll(0):
            raise TransferError("the peer closed the transfer connection")

    def interrupt(self) -> None:
        """Makes whatever waits on the connection fail at once. Any thread."""
        # Already disconnected: then nothing waits.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.interrupt()
        self._sock.close()

    def _receive_some(self, view: memoryview, deadline: float | None) -> int:
        with _lost_peer():
            self._set_timeout(deadline)
            got = self._sock.recv_into(view)
        if got == 0 and len(view):
            raise TransferError("the peer closed the transfer connection")
        return got

    def _set_timeout(self, deadline: float | None) -> None:
        if deadline is None:
            self._sock.settimeout(None)
            return
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded("the transfer's deadline passed")
        self._sock.settimeout(remaining)


def connect(
    endpoint: Endpoint, fingerprint: Fingerprint, token: str, deadline: float, relay: str = ""
) -> Channel:
    """An authenticated connection to that very incarnation; bounded by ``deadline``.

    A ``relay`` is connected to in the peer's place, and reads the peer's address as a first line.
    """
    host, port = parse_address(relay or endpoint.tcp_address)
    timeout = deadline - time.monotonic()
    if timeout <= 0:
        raise DeadlineExceeded("no time left to connect to the peer's transfer server")
    with _lost_peer():
        sock = socket.create_connection((host, port), timeout=timeout)
        if relay:
            sock.sendall(endpoint.tcp_address.encode() + b"\n")
        channel = Channel(sock)
    try:
        _greet(channel, endpoint, fingerprint, token, deadline)
    except PdserveError:
        channel.close()
        raise
    return channel


def _greet(
    channel: Channel, endpoint: Endpoint, fingerprint: Fingerprint, token: str, deadline: float
) -> None:
    first = channel.receive(deadline)
    if isinstance(first, Status):
        raise wire.error_of(first.code, first.position)
    if not isinstance(first, Challenge):
        raise ProtocolError(f"expected a challenge, got {type(first).__name__}")
    nonce = os.urandom(wire.NONCE_BYTES)
    whom = Identity(endpoint.incarnation, fingerprint, endpoint.num_blocks, endpoint.span_bytes)
    hello = Hello(
        nonce,
        _proof(token, b"client", first.nonce, nonce, whom),
        whom.incarnation,
        whom.fingerprint,
        whom.num_blocks,
        whom.span_bytes,
    )
    channel.send(hello, deadline)
    answer = channel.receive(deadline)
    if isinstance(answer, Status):
        raise wire.error_of(answer.code, answer.position)
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"expected a welcome, got {type(answer).__name__}")
    if not hmac.compare_digest(answer.proof, _proof(token, b"server", first.nonce, nonce, whom)):
        raise ProtocolError("the peer does not know the cluster's token")
    if (answer.num_blocks, answer.span_bytes) != (whom.num_blocks, whom.span_bytes):
        raise ProtocolError("the peer welcomed us to a pool of another size than it announced")


def welcome(channel: Channel, identity: Identity, token: str, deadline: float) -> Code:
    """The server's side of the handshake; a refusal has been sent when the code is not OK."""
    challenge = os.urandom(wire.NONCE_BYTES)
    channel.send(Challenge(challenge), deadline)
    hello = channel.receive(deadline)
    if not isinstance(hello, Hello):
        raise ProtocolError(f"expected a hello, got {type(hello).__name__}")
    meant = Identity(hello.incarnation, hello.fingerprint, hello.num_blocks, hello.span_bytes)
    code = _judge(hello, meant, identity, _proof(token, b"client", challenge, hello.nonce, meant))
    if code is not Code.OK:
        channel.send(Status(code), deadline)
        return code
    proof = _proof(token, b"server", challenge, hello.nonce, meant)
    channel.send(Welcome(proof, identity.num_blocks, identity.span_bytes), deadline)
    return code


def _judge(hello: Hello, meant: Identity, ours: Identity, proof: bytes) -> Code:
    """The token comes first: a stranger learns nothing about the pool."""
    if not hmac.compare_digest(hello.proof, proof):
        return Code.AUTH
    if meant.incarnation != ours.incarnation:
        return Code.INCARNATION
    return Code.OK if meant == ours else Code.LAYOUT


def _proof(token: str, role: bytes, server: bytes, client: bytes, whom: Identity) -> bytes:
    numbers = struct.pack("<QQ", whom.num_blocks, whom.span_bytes)
    text = b"pdserve transfer 1 " + role + server + client
    message = text + whom.incarnation + whom.fingerprint + numbers
    return hmac.digest(token.encode(), message, hashlib.sha256)


def parse_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[ipv6]:port``. Raises ProtocolError."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ProtocolError("a transfer address is host:port or [ipv6]:port")
    number = int(port[:6])
    if not 0 < number < 65536:
        raise ProtocolError(f"a transfer address with port {number}")
    return host, number


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _lost_peer() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise DeadlineExceeded("the peer did not move within the transfer's deadline") from error
    except OSError as error:
        raise TransferError(f"the transfer connection failed: {error.strerror or error}") from error


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A fixed size turns the kernel's own tuning off, so it must be one that the kernel grants.
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        if int(Path(f"/proc/sys/net/core/{limit}").read_text(encoding="ascii")) >= _BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
