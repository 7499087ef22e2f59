"""RESP2, the protocol of Redis, over a connected socket, under one deadline for the whole exchange.

Written for spans: a value goes out from the caller's buffer and comes in straight to where it
belongs, without a copy in between; only headers pass through a small buffer. Every length that
the server names is checked before it is believed. An exchange ends in one of three ways: all
replies were read and the socket can be used again; ServerRefused, which is the same with an error
among the replies; or another TierError (or ``abandon``), after which the socket is out of step and
must be closed.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.errors import TierError

_BUFFER_BYTES = 4096
_SMALL_BULK_MAX = 1 << 16
_ARRAY_MAX = 1 << 16
_NESTING_MAX = 2
BULK_MAX = 512 << 20  # Redis' own limit of one value


class WireTimeout(TierError):
    """The deadline of the exchange passed."""


class WireClosed(TierError):
    """The server closed the connection."""


class WireProtocol(TierError):
    """The server's bytes are not RESP2, or larger than anything we asked for."""


class ServerRefused(TierError):
    """The server answered with an error (no memory, read-only, no permission, still loading)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error reply; in a pipeline the replies after it still come."""

    text: str


Reply = int | bytes | Refusal | None | list["Reply"]


def command(*args: bytes) -> bytes:
    """One command as Redis reads it."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        parts.append(b"$%d\r\n%b\r\n" % (len(arg), arg))
    return b"".join(parts)


class Wire:
    """One exchange (requests out, replies in) on ``sock``. ``deadline``: time.monotonic()."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # unread bytes are [start, end)
        self._end = 0
        self.abandoned = False

    def abandon(self) -> None:
        """Replies stay unread: the socket cannot be used again."""
        self.abandoned = True

    def send(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        for part in parts:
            self._limit()
            try:
                self._sock.sendall(part)
            except TimeoutError:
                raise WireTimeout("sending took too long") from None

    def reply(self, nesting: int = 0) -> Reply:
        """One small reply of any type."""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return Refusal(rest.decode("utf-8", "replace"))
        if kind == b":":
            return _number(rest)
        if kind == b"_":
            return None
        if kind == b"$":
            return self._small_bulk(_number(rest))
        if kind == b"*":
            length = _number(rest)
            if length < 0:
                return None
            if length > _ARRAY_MAX or nesting >= _NESTING_MAX:
                raise WireProtocol("a reply is longer or deeper than anything we ask for")
            return [self.reply(nesting + 1) for _ in range(length)]
        raise WireProtocol("a reply is of no known type")

    def array_header(self, length: int) -> None:
        """The start of an array of exactly ``length`` replies. Raises ServerRefused on an error."""
        line = self._line()
        if line[:1] == b"-":
            raise ServerRefused(line[1:].decode("utf-8", "replace"))
        if line[:1] != b"*" or _number(line[1:]) != length:
            raise WireProtocol("a reply is not the array that was asked for")

    def bulk_header(self) -> int | None:
        """Length of the value that follows; None for a value that is not there."""
        line = self._line()
        if line[:1] == b"_":
            return None
        if line[:1] != b"$":
            raise WireProtocol("a reply is not a value")
        length = _number(line[1:])
        if length == -1:
            return None
        if not 0 <= length <= BULK_MAX:
            raise WireProtocol("a value has an impossible length")
        return length

    def bulk_end(self) -> None:
        end = bytearray(2)
        self.read_into(memoryview(end))
        if end != b"\r\n":
            raise WireProtocol("a value is longer than its length")

    def read_into(self, view: memoryview) -> None:
        """Fills ``view``; what is buffered first, the rest straight from the socket."""
        done = min(len(view), self._end - self._start)
        view[:done] = self._view[self._start : self._start + done]
        self._start += done
        while len(view) - done >= _BUFFER_BYTES:
            done += self._receive(view[done:])
        while done < len(view):
            # A short rest comes together with what follows it: one call instead of two.
            self._fill()
            part = min(len(view) - done, self._end - self._start)
            view[done : done + part] = self._view[self._start : self._start + part]
            self._start += part
            done += part

    def _small_bulk(self, length: int) -> bytes | None:
        if length == -1:
            return None
        if not 0 <= length <= _SMALL_BULK_MAX:
            raise WireProtocol("a reply is longer than anything we ask for")
        data = bytearray(length)
        self.read_into(memoryview(data))
        self.bulk_end()
        return bytes(data)

    def _line(self) -> bytes:
        while True:
            stop = self._buffer.find(b"\r\n", self._start, self._end)
            if stop >= 0:
                line = bytes(self._view[self._start : stop])
                self._start = stop + 2
                return line
            if self._end - self._start == _BUFFER_BYTES:
                raise WireProtocol("a line of a reply does not end")
            self._fill()

    def _fill(self) -> None:
        """Receives at least one byte into the buffer, which is not full."""
        rest = self._end - self._start
        if self._start:
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        self._end += self._receive(self._view[self._end :])

    def _receive(self, view: memoryview) -> int:
        self._limit()
        try:
            received = self._sock.recv_into(view)
        except TimeoutError:
            raise WireTimeout("the answer took too long") from None
        if received == 0:
            raise WireClosed("the server closed the connection")
        return received

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise WireTimeout("the exchange took too long")
        self._sock.settimeout(left)


def _number(text: bytes) -> int:
    """A decimal number; int() alone would also take spaces, underscores and other digits."""
    digits = text[1:] if text[:1] == b"-" else text
    if not digits.isdigit() or len(digits) > 19:
        raise WireProtocol("a reply has no number where one belongs")
    return int(text)


def raise_refusals(replies: Sequence[Reply]) -> None:
    """Raises ServerRefused for the first error among ``replies``."""
    for reply in replies:
        if isinstance(reply, Refusal):
            raise ServerRefused(reply.text)
