"""What a worker's caches are opened with."""

from __future__ import annotations

import os
from dataclasses import replace

from cache_tiers.attach import limits_of
from pdserve.engine.memory import MemoryKind, allocate_shared
from pdserve.types import Incarnation


def test_only_who_computes_on_the_cores_that_send_to_redis_sends_slowly() -> None:
    memory = allocate_shared(2, 4096, Incarnation(os.urandom(16)))
    assert limits_of(memory).pause_s > 0
    assert limits_of(replace(memory, kind=MemoryKind.CUDA)).pause_s == 0
    memory.close()
