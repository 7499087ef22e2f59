from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from real_redis import RealRedis
    from tier_world import World


@pytest.fixture
def real_redis() -> Iterator[RealRedis]:
    # Here: what needs no Redis runs where the package is not installed.
    from real_redis import RealRedis

    # Not tmp_path: a unix socket's path must stay short.
    with tempfile.TemporaryDirectory(prefix="pdr-") as folder:
        server = RealRedis(Path(folder))
        server.start()
        yield server
        server.kill()


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    opened: list[World] = []
    yield opened
    for world in opened:
        world.manager.close(drain_s=0.0)
