"""The Redis tier: values that outlive workers and are shared by all with the same fingerprint.

The connection, its deadline and its circuit breakers are in cache_tiers/redis_link.py; spans are
received straight into the caller's buffers. Names are
``pdserve:<16 hex digits of the fingerprint>:<block key in hex>``; the form of a value is in
cache_tiers/codec.py. What Redis holds is never trusted: a value that is not exactly what was
asked for is deleted and reads as a miss.

Each batch (at most ``batch_bytes``) has a time-out of ``timeout_s`` + its bytes at
``bytes_per_second``. All failures are TierError.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cache_tiers.base import TierStats
from cache_tiers.codec import (
    HEADER_BYTES,
    BadValue,
    Expected,
    check_payload,
    decode_header,
    encode_header,
)
from cache_tiers.redis_link import Direction, RedisLink
from cache_tiers.resp import Wire, WireProtocol, command
from pdserve.config import RedisTierConfig
from pdserve.errors import ConfigError, TierError
from pdserve.types import BlockKey, Fingerprint, Incarnation, Reach, Tier

_CLEAR_S = 30.0
_NAMES_PER_COMMAND = 512

T = TypeVar("T")


@dataclass(slots=True)
class _Counts:
    queries: int = 0
    hits: int = 0
    stored: int = 0
    tried_writes: int = 0  # that would have stored something
    rejected_values: int = 0


class RedisTier:
    """Thread-safe. ConfigError for a URL that can never work; a server that is down is no error.

    ``url``: redis://, rediss:// or unix://. ``span_bytes``: size of every value's payload.
    """

    name = Tier.REDIS

    def __init__(
        self,
        url: str,
        config: RedisTierConfig,
        span_bytes: int,
        fingerprint: Fingerprint,
        incarnation: Incarnation,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if span_bytes + HEADER_BYTES > config.value_bytes_max:
            raise ConfigError(
                f"cache.redis.value_bytes_max = {config.value_bytes_max} is below the "
                f"{span_bytes + HEADER_BYTES} bytes of one block"
            )
        self._config = config
        self._span_bytes = span_bytes
        self._incarnation = incarnation
        self._expected = Expected(fingerprint, span_bytes)
        self._prefix = b"pdserve:%b:" % fingerprint[:8].hex().encode()
        self._link = RedisLink(url, config, clock)
        self._lock = threading.Lock()
        self._count = _Counts()

    # ---- the four calls, and what goes with them -------------------------------------------------

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        found: list[bool] = []
        for part in _split(keys, _NAMES_PER_COMMAND):
            request = b"".join(command(b"EXISTS", self._name(key)) for key in part)
            replies = self._link.exchange(Direction.READ, [request], len(part), self._timeout(0))
            found += [reply == 1 for reply in replies]
        return found

    def get(self, keys: Sequence[BlockKey], into: Sequence[memoryview], timeout: float) -> int:
        return len(self.fetch(keys, into, timeout))

    def fetch(
        self, keys: Sequence[BlockKey], into: Sequence[memoryview], timeout: float
    ) -> list[Incarnation]:
        """Like ``get``; returns who wrote each value of the prefix that was found.

        A failure after the first batch ends the prefix there and is counted.
        """
        deadline = time.monotonic() + timeout
        writers: list[Incarnation] = []
        with self._lock:
            self._count.queries += len(keys)
        for part in _split(keys, self.batch_blocks):
            limit = min(self._timeout(len(part)), deadline - time.monotonic())
            if limit <= 0:
                break
            views = into[len(writers) : len(writers) + len(part)]
            try:
                found = self._fetch_batch(part, views, limit)
            except TierError:
                if not writers:
                    raise
                break
            writers += found
            if len(found) < len(part):
                break
        return writers

    def _fetch_batch(
        self, keys: Sequence[BlockKey], views: Sequence[memoryview], limit: float
    ) -> list[Incarnation]:
        fetch = _Fetch(self._expected, keys, views)
        names = [self._name(key) for key in keys]
        self._link.run(Direction.READ, limit, partial(fetch.run, names=names))
        with self._lock:
            self._count.hits += len(fetch.writers)
            self._count.rejected_values += len(fetch.rejected)
        if fetch.rejected:
            # The good part of the prefix is worth more than a deletion that fails (and is
            # counted): whoever reads the value next tries again.
            with contextlib.suppress(TierError):
                self.delete(fetch.rejected)
        return fetch.writers

    def put(self, keys: Sequence[BlockKey], values: Sequence[memoryview]) -> None:
        """Stores every value, pipelined; what a failing batch already stored stays."""
        assert all(value.nbytes == self._span_bytes for value in values)
        done = 0
        for part in _split(keys, self.batch_blocks):
            spans = values[done : done + len(part)]
            parts = list(self._set_commands(part, spans))
            self._link.exchange(Direction.WRITE, parts, len(part), self._timeout(len(part)))
            done += len(part)
            with self._lock:
                self._count.stored += len(part)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        for part in _split(keys, _NAMES_PER_COMMAND):
            request = command(b"UNLINK", *(self._name(key) for key in part))
            self._link.exchange(Direction.WRITE, [request], 1, self._timeout(0))

    def clear(self) -> int:
        """Deletes every value of this fingerprint, and nothing else that the server holds.

        Returns how many that were. An operator waits for it, no request: a busy server gets the
        time that it takes.
        """
        count = 0
        deadline = time.monotonic() + _CLEAR_S
        cursor = b"0"
        while time.monotonic() < deadline:
            request = command(b"SCAN", cursor, b"MATCH", self._prefix + b"*", b"COUNT", b"1000")
            cursor, names = _scan_reply(self._link.insist(request, deadline))
            for part in _split(names, _NAMES_PER_COMMAND):
                gone = self._link.insist(command(b"UNLINK", *part), deadline)
                count += gone if isinstance(gone, int) else 0
            if cursor == b"0":
                return count
        raise TierError(f"clearing Redis took longer than {_CLEAR_S:g} s")

    def ping(self) -> None:
        """Raises TierError unless the server answers."""
        self._link.exchange(Direction.READ, [command(b"PING")], 1, self._timeout(0))

    def try_write(self) -> None:
        """Raises TierError unless the server takes writes. Leaves nothing there."""
        # To be set only if it exists, which no such name does; refused as any other SET would be.
        request = command(b"SET", self._prefix + b"try-write", b"", b"XX")
        self._link.exchange(Direction.WRITE, [request], 1, self._timeout(0))
        with self._lock:
            self._count.tried_writes += 1

    def writes_in_doubt(self) -> bool:
        """Whether only another write can tell if the server takes writes."""
        return self.reach() is not Reach.REACHED or self._link.writes_in_doubt()

    def revoke(self, incarnation: Incarnation) -> None:
        """From now on a value that ``incarnation`` wrote is deleted and reads as a miss."""
        with self._lock:
            known = self._expected
            self._expected = Expected(
                known.fingerprint, known.span_bytes, known.revoked | {incarnation}
            )

    def time_limit(self, blocks: int) -> float:
        """Seconds that a read of ``blocks`` may take altogether."""
        return self._timeout(blocks)

    def refuses_writes(self) -> bool:
        """Whether a put right now would be refused without being tried."""
        return self._link.would_refuse(Direction.WRITE)

    def reach(self) -> Reach:
        """Whether a value was ever stored, or could have been, or was read."""
        with self._lock:
            if self._count.stored or self._count.tried_writes or self._count.hits:
                return Reach.REACHED
        return Reach.NEVER if self._link.errors else Reach.UNTRIED

    def health(self) -> str:
        """What does not work, in words; empty when all does."""
        return self._link.health()

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                name=self.name,
                queries=self._count.queries,
                hits=self._count.hits,
                stored=self._count.stored,
                errors=self._link.errors,
                rejected_values=self._count.rejected_values,
                reachable=self._link.reachable,
            )

    def close(self) -> None:
        self._link.close()

    def _set_commands(
        self, keys: Sequence[BlockKey], values: Sequence[memoryview]
    ) -> Iterator[bytes | memoryview]:
        """SET name value EX expiry, with each span as a part of its own: it is not copied."""
        tail = b"\r\n$2\r\nEX\r\n" + command(b"%d" % self._config.expiry_s).split(b"\r\n", 1)[1]
        for key, value in zip(keys, values, strict=True):
            name = self._name(key)
            header = encode_header(self._expected.fingerprint, key, self._incarnation, value)
            size = len(header) + value.nbytes
            yield b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b" % (len(name), name, size, header)
            yield value
            yield tail

    def _name(self, key: BlockKey) -> bytes:
        return self._prefix + key.hex().encode()

    @property
    def batch_blocks(self) -> int:
        return max(1, self._config.batch_bytes // (self._span_bytes + HEADER_BYTES))

    def _timeout(self, blocks: int) -> float:
        """Seconds for ``blocks`` values."""
        size = blocks * (self._span_bytes + HEADER_BYTES)
        return self._config.timeout_s + size / self._config.bytes_per_second


class _Fetch:
    """One MGET: receives values into ``views`` until the first that is missing or wrong."""

    def __init__(
        self, expected: Expected, keys: Sequence[BlockKey], views: Sequence[memoryview]
    ) -> None:
        self.writers: list[Incarnation] = []
        self.rejected: list[BlockKey] = []
        self._expected = expected
        self._keys = keys
        self._views = views
        self._size = HEADER_BYTES + expected.span_bytes

    def run(self, wire: Wire, names: Sequence[bytes]) -> None:
        wire.send([command(b"MGET", *names)])
        wire.array_header(len(names))
        whole = True
        for key, view in zip(self._keys, self._views, strict=True):
            length = wire.bulk_header()
            if length is None:
                whole = False
            elif length == self._size:
                writer = self._value(wire, key, view)
                if writer is None:
                    self.rejected.append(key)
                    whole = False
                elif whole:
                    self.writers.append(writer)
            else:
                self.rejected.append(key)
                whole = False
                if length > self._size:
                    # Not worth the time: the value is deleted over another connection.
                    wire.abandon()
                    return
                wire.read_into(memoryview(bytearray(length)))
                wire.bulk_end()

    def _value(self, wire: Wire, key: BlockKey, view: memoryview) -> Incarnation | None:
        head = bytearray(HEADER_BYTES)
        wire.read_into(memoryview(head))
        wire.read_into(view)
        wire.bulk_end()
        try:
            header = decode_header(head, self._expected, key)
            check_payload(header, view)
        except BadValue:
            return None
        return header.writer


def _split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _scan_reply(reply: object) -> tuple[bytes, list[bytes]]:
    match reply:
        case [bytes() as cursor, list() as names] if all(isinstance(n, bytes) for n in names):
            return cursor, names
    raise WireProtocol("a reply is not SCAN's")
