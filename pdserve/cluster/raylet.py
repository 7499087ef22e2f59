"""Notices the end of the raylet beside us: Ray's process on this host, which starts its workers.

connected -end of file-> asked again -refused-> gone, told once
                                     -answered-> connected ...

Ray itself is told by its control plane, after a quarter of a minute. The kernel knows at once: it
closes the connections of a process that ended.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

_READ_BYTES = 4096
_PAUSE_S = 0.2


class RayletWatch:
    """Owns a connection on which nothing is ever said, and a thread that waits for its end."""

    def __init__(self, path: str, on_end: Callable[[], None]) -> None:
        """``path``: the raylet's socket. OSError when nobody listens there."""
        self._path = path
        self._on_end = on_end
        self._lock = threading.Lock()  # of the connection, which both threads close
        self._stopping = threading.Event()
        self._connection = _connect(path)
        self._thread = threading.Thread(target=self._run, name="raylet-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing is told from here on."""
        self._stopping.set()
        with self._lock:
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while True:
            _await_end(self._connection)
            with self._lock:
                if self._stopping.is_set():
                    return
                try:
                    again = _connect(self._path)
                except OSError:
                    break
                self._connection.close()
                self._connection = again
            self._stopping.wait(_PAUSE_S)
        self._on_end()


def _connect(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.connect(path)
    except OSError:
        made.close()
        raise
    return made


def _await_end(connection: socket.socket) -> None:
    try:
        while connection.recv(_READ_BYTES):
            pass
    except ConnectionResetError:
        return
