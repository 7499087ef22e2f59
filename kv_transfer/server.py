"""The transfer server of a pool: listens, gives each peer a thread, and outlives all of them.

LISTENING -> CLOSED     no peer, however it behaves, ends it
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from kv_transfer.serving import Connection, Counters, ServerStats
from kv_transfer.session import Channel, Identity, format_address
from kv_transfer.slots import LinkFactory
from kv_transfer.wire import Code, Status
from pdserve.engine.memory import PoolMemory
from pdserve.errors import ConfigError, DeadlineExceeded, TransferError

_log = logging.getLogger(__name__)
_BACKLOG = 128
_ACCEPT_PAUSE = 0.05
_CLOSE_SECONDS = 5.0
_REFUSAL_SECONDS = 0.2


class TransferServer:
    """Serves one pool. ``close`` returns when no thread of it touches the pool any more."""

    def __init__(
        self,
        pool: PoolMemory,
        identity: Identity,
        bind_host: str,
        token: str,
        links: LinkFactory | None = None,
        max_connections: int = 256,
    ) -> None:
        if not token:
            raise ConfigError("a transfer server needs the cluster's token")
        self._pool = pool
        self._identity = identity
        self._token = token
        self._links = links
        self._max_connections = max_connections
        self._counters = Counters()
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, Channel] = {}
        self._closing = False
        self._listener = _listen(bind_host)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="kv-transfer", daemon=True)
        self._thread.start()

    def address(self, host: str) -> str:
        return format_address(host, self.port)

    def stats(self) -> ServerStats:
        return self._counters.snapshot()

    def open_connections(self) -> int:
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            channels = list(self._open.values())
            threads = list(self._open)
        _shut(self._listener)
        for channel in channels:
            channel.interrupt()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in (self._thread, *threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _log.error("a thread of the transfer server did not end: %s", thread.name)

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    # Out of file descriptors, or the peer left before we looked: go on.
                    _log.warning("accepting a transfer connection failed: %s", error.strerror)
                    time.sleep(_ACCEPT_PAUSE)
                continue
            self._welcome(sock)
        self._listener.close()

    def _welcome(self, sock: socket.socket) -> None:
        try:
            channel = Channel(sock)
        except OSError:
            self._counters.add("lost")
            sock.close()
            return
        thread = threading.Thread(target=self._serve, args=(channel,), name="kv-peer", daemon=True)
        with self._lock:
            room = len(self._open) < self._max_connections and not self._closing
            if room:
                self._open[thread] = channel
        if room:
            thread.start()
        else:
            self._refuse(channel)

    def _refuse(self, channel: Channel) -> None:
        self._counters.add("refused")
        try:
            channel.send(Status(Code.BUSY), time.monotonic() + _REFUSAL_SECONDS)
        except (TransferError, DeadlineExceeded):
            self._counters.add("lost")
        channel.close()

    def _serve(self, channel: Channel) -> None:
        try:
            Connection(
                channel, self._pool, self._identity, self._token, self._links, self._counters
            ).run()
        except Exception:
            # A bug of ours ends this peer's connection, not the server.
            self._counters.add("failed")
            _log.exception("serving a transfer connection failed")
        finally:
            channel.close()
            with self._lock:
                del self._open[threading.current_thread()]


def _listen(host: str) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(
        host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=_BACKLOG)


def _shut(listener: socket.socket) -> None:
    """Wakes a thread that waits in accept."""
    try:
        listener.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("the transfer server's socket was not listening: %s", error.strerror)
