"""The Redis tier's writes and reads beside raw pipelined redis-py, on values of the same size.

Both talk to one server on a unix socket, in batches of the same length, in turns. The yardstick
keeps what it reads as redis-py hands it over; the tier verifies every value and leaves it where a
worker's pool wants it.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import redis

from bench.handoff import SPAN
from bench.record import Goal, Record, interleaved
from cache_tiers.codec import HEADER_BYTES
from cache_tiers.redis_tier import RedisTier
from pdserve.cluster.redis_server import find_binary, redis_command
from pdserve.config import RedisTierConfig
from pdserve.types import BlockKey, Fingerprint, Incarnation

BLOCKS = 128
REPEATS = 9
_FINGERPRINT = Fingerprint(b"f" * 32)
_CONFIG = RedisTierConfig(timeout_s=10.0)
_SERVER_BYTES = 512 * 2**20


def run() -> Record:
    record = Record("redis_values")
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "redis.sock"
        command = redis_command(find_binary(), socket, _SERVER_BYTES)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder) as server:
            try:
                found = _measure(_connected(socket), f"unix://{socket}")
            finally:
                server.terminate()
    for name, rates in found.items():
        record.value(name, "GB/s", rates)
    for what in ("write", "read"):
        record.ratio(
            f"Redis tier {what} / pipelined redis-py",
            found[f"tier {what}"],
            found[f"redis-py {what}"],
            Goal(0.8),
        )
    return record


def _measure(client: redis.Redis, url: str) -> dict[str, list[float]]:
    data = np.random.default_rng(0).integers(0, 256, (BLOCKS, SPAN), dtype=np.uint8)
    into = np.zeros((BLOCKS, SPAN), dtype=np.uint8)
    values = [row.data for row in data]
    targets = [row.data for row in into]
    keys = [BlockKey(i.to_bytes(16, "big")) for i in range(BLOCKS)]
    tier = RedisTier(url, _CONFIG, SPAN, _FINGERPRINT, Incarnation(b"i" * 16))

    def tier_read() -> None:
        assert len(tier.fetch(keys, targets, 60.0)) == BLOCKS

    batch = _CONFIG.batch_bytes // (SPAN + HEADER_BYTES)
    found = interleaved(
        {
            "tier write": lambda: _rate(lambda: tier.put(keys, values)),
            "redis-py write": lambda: _rate(lambda: _raw_write(client, values, batch)),
            "tier read": lambda: _rate(tier_read),
            "redis-py read": lambda: _rate(lambda: _raw_read(client, batch)),
        },
        REPEATS,
    )
    assert np.array_equal(data, into)
    tier.close()
    client.close()
    return found


def _raw_write(client: redis.Redis, values: list[memoryview], batch: int) -> None:
    for start in range(0, len(values), batch):
        pipe = client.pipeline(transaction=False)
        for i, value in enumerate(values[start : start + batch], start):
            pipe.set(f"raw:{i}", value, ex=_CONFIG.expiry_s)
        pipe.execute()


def _raw_read(client: redis.Redis, batch: int) -> None:
    for start in range(0, BLOCKS, batch):
        pipe = client.pipeline(transaction=False)
        for i in range(start, min(start + batch, BLOCKS)):
            pipe.get(f"raw:{i}")
        assert all(len(value) == SPAN for value in pipe.execute())


def _rate(move: Callable[[], object]) -> float:
    began = time.perf_counter()
    move()
    return BLOCKS * SPAN / (time.perf_counter() - began) / 1e9


def _connected(socket: Path) -> redis.Redis:
    client = redis.Redis.from_url(f"unix://{socket}")
    deadline = time.monotonic() + 20
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return client
