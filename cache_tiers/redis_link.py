"""How the Redis tier talks to its server: pooled connections, one deadline, one circuit breaker.

    ask the breaker -> connection of the pool -> one operation on its socket -> report
    insist:            connection of the pool -> the same, again after a time-out

Reads and writes have a breaker each: a server that is full refuses writes while its reads are as
good as ever. redis-py connects, authenticates, encrypts and pools; the operation itself speaks
cache_tiers/resp.py over the socket. A connection that is out of step is closed, never reused.
"""

from __future__ import annotations

import enum
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis

from cache_tiers.breaker import Breaker, BreakerState, Permit
from cache_tiers.resp import Reply, ServerRefused, Wire, WireTimeout, raise_refusals
from pdserve.config import RedisTierConfig
from pdserve.errors import ConfigError, TierError

_CONNECTIONS_MAX = 8
# Of one try, where somebody insists.
_TRY_S = 5.0

T = TypeVar("T")


class TierUnavailable(TierError):
    """The breaker is open: nothing was tried."""


class Direction(enum.Enum):
    READ = "read"
    WRITE = "write"


class RedisLink:
    """Thread-safe. ConfigError for a URL that can never work; a server that is down is no error."""

    def __init__(self, url: str, config: RedisTierConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pool = _connection_pool(url, config)
        self._lock = threading.Lock()
        self._breakers = {
            direction: Breaker(config.breaker_failures, config.breaker_open_s)
            for direction in Direction
        }
        self._errors = 0
        self._closed = threading.Event()
        # As of the last exchange:
        self._reachable = True
        self._writes_refused = False

    @property
    def errors(self) -> int:
        with self._lock:
            return self._errors

    @property
    def reachable(self) -> bool:
        with self._lock:
            return self._reachable

    def health(self) -> str:
        """What does not work, in words; empty when all does."""
        with self._lock:
            reads = self._breakers[Direction.READ].state
            writes = self._breakers[Direction.WRITE].state
            if not self._reachable or reads is not BreakerState.CLOSED:
                return "redis unreachable"
            if self._writes_refused or writes is not BreakerState.CLOSED:
                return "redis refuses writes"
            return ""

    def writes_in_doubt(self) -> bool:
        """Whether the last write was refused, or none has worked since the breaker opened."""
        with self._lock:
            writes = self._breakers[Direction.WRITE].state
            return self._writes_refused or writes is not BreakerState.CLOSED

    def would_refuse(self, direction: Direction) -> bool:
        """Whether an exchange right now would be refused without being tried."""
        with self._lock:
            return self._breakers[direction].would_refuse(self._clock())

    def exchange(
        self,
        direction: Direction,
        request: Sequence[bytes | memoryview],
        replies: int,
        limit: float,
    ) -> list[Reply]:
        """Sends ``request`` and reads so many small replies; an error among them is raised."""
        return self.run(direction, limit, partial(_exchange, request=request, replies=replies))

    def insist(self, request: bytes, deadline: float) -> Reply:
        """The one reply to what an operator waits for; tried again after each time-out.

        The breaker keeps requests from waiting, so it is neither asked nor told. ``request`` may
        be carried out more than once. ``deadline``: time.monotonic(). Raises TierError.
        """
        operation = partial(_exchange, request=[request], replies=1)
        while True:
            try:
                limit = min(_TRY_S, deadline - time.monotonic())
                return self._on_connection(limit, operation)[0]
            except (WireTimeout, TimeoutError, redis.TimeoutError) as error:
                if time.monotonic() >= deadline or self._closed.is_set():
                    self._count_error()
                    raise TierError("Redis did not answer in time") from error
            except TierError:
                self._count_error()
                raise
            except (redis.RedisError, OSError, UnicodeError) as error:
                self._count_error()
                raise TierError(f"Redis failed: {type(error).__name__}") from error

    def run(self, direction: Direction, limit: float, operation: Callable[[Wire], T]) -> T:
        """Runs ``operation`` on a connection, within ``limit`` seconds. Raises TierError."""
        with self._lock:
            permit = self._breakers[direction].ask(self._clock())
        if permit is Permit.REFUSED:
            raise TierUnavailable("Redis failed too often; it is left alone for a while")
        worked, refused = False, False
        try:
            result = self._on_connection(limit, operation)
            worked = True
            return result
        except ServerRefused:
            refused = True
            raise
        except (redis.RedisError, OSError, UnicodeError) as error:
            raise TierError(f"Redis failed: {type(error).__name__}") from error
        finally:
            self._report(direction, permit, worked=worked, refused=refused)

    def close(self) -> None:
        self._closed.set()
        self._pool.disconnect()

    def _count_error(self) -> None:
        with self._lock:
            self._errors += 1

    def _report(self, direction: Direction, permit: Permit, *, worked: bool, refused: bool) -> None:
        writing = direction is Direction.WRITE
        with self._lock:
            self._breakers[direction].report(permit, worked, self._clock())
            self._errors += not worked
            # A server that refuses reads is no better than one that is gone.
            self._reachable = worked or (refused and writing)
            if writing:
                self._writes_refused = refused

    def _connected(self) -> Any:
        try:
            return self._pool.get_connection()
        except Exception as error:
            # One that ``close`` takes away while redis-py sets it up fails in any way.
            if self._closed.is_set():
                raise TierError("the connection to Redis was closed") from error
            raise

    def _on_connection(self, limit: float, operation: Callable[[Wire], T]) -> T:
        deadline = time.monotonic() + limit
        connection = self._connected()
        in_step = False
        try:
            wire = Wire(_socket(connection), deadline)
            result = operation(wire)
            in_step = not wire.abandoned
            return result
        except ServerRefused:
            in_step = True
            raise
        finally:
            if not in_step:
                connection.disconnect()
            self._pool.release(connection)


def _exchange(wire: Wire, request: Sequence[bytes | memoryview], replies: int) -> list[Reply]:
    wire.send(request)
    answers = [wire.reply() for _ in range(replies)]
    raise_refusals(answers)
    return answers


def _connection_pool(url: str, config: RedisTierConfig) -> redis.ConnectionPool:
    """Connects to nothing yet."""
    timeout_s = config.timeout_s
    try:
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            max_connections=_CONNECTIONS_MAX,
        )
        # The URL's own settings would win over arguments.
        pool.connection_kwargs.update(_access(config))
        pool.connection_class(**pool.connection_kwargs)  # an unknown option raises here
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ConfigError(f"cache.redis.url cannot be used: {type(error).__name__}") from error
    return pool


def _access(config: RedisTierConfig) -> dict[str, str]:
    """Who we are to the server, and whose certificate it must show. ConfigError."""
    settings: dict[str, str] = {}
    if config.username:
        settings["username"] = config.username
    if config.password_file:
        settings["password"] = _first_line(config.password_file, "cache.redis.password_file")
    if config.ca_file:
        _first_line(config.ca_file, "cache.redis.ca_file")
        settings["ssl_ca_certs"] = str(Path(config.ca_file).expanduser())
    return settings


def _first_line(path: str, key: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {path!r} cannot be read", param=key) from error
    line = text.partition("\n")[0].strip()
    if not line:
        raise ConfigError(f"{key} = {path!r}: the file is empty", param=key)
    return line


def _socket(connection: Any) -> socket.socket:
    """The connected socket of one of redis-py's connections, whose own buffer is empty.

    The pool hands a connection out only after it found that nothing is waiting to be read.
    """
    sock = getattr(connection, "_sock", None)
    if not isinstance(sock, socket.socket):
        raise TierError("a connection to Redis has no socket")
    return sock
