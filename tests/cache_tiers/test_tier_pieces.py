"""How Redis gets a job where the engines compute on the same cores: in pieces, when none does."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from real_redis import FINGERPRINT, RealRedis, new_keys
from tier_world import SPAN, World, open_world

from cache_tiers import manager
from cache_tiers.attach import WorkerCaches
from cache_tiers.write_jobs import WriteLimits
from pdserve.config import CacheConfig
from pdserve.engine.api import BlockId, PinTicket, WriteBack
from pdserve.engine.memory import MemoryKind, PoolMemory, allocate_shared
from pdserve.engine.turns import Turn, open_turn
from pdserve.types import Incarnation, Tier
from tests.standstill import watched

R = Tier.REDIS


def paced(piece_blocks: int) -> WriteLimits:
    """Pauses that no test lasts for: what ends them is told by it."""
    return WriteLimits(piece_bytes=piece_blocks * SPAN, pause_s=600.0)


def patient(seconds: float) -> WriteLimits:
    """Waits so long for a moment in which nobody computes."""
    return WriteLimits(piece_bytes=SPAN, pause_s=0.001, patience_s=seconds)


def stored(redis: RealRedis, least: int) -> int:
    """How many values Redis holds, once it holds ``least``."""
    deadline = time.monotonic() + 10
    while (found := redis.client().dbsize()) < least:
        assert time.monotonic() < deadline, f"{found} values"
        time.sleep(0.001)
    return int(found)


def test_redis_gets_a_job_piece_by_piece(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, limits=paced(2))
    keys = new_keys(8)
    world.wait(world.start_write(keys[:5]))  # unpinned: no block waits for the pauses
    assert stored(real_redis, 2) == 2
    # More to be sent is no reason to hurry: it would come just when an answer begins.
    world.wait(world.start_write(keys[5:], 5))
    time.sleep(0.1)
    assert stored(real_redis, 2) == 2


def test_a_pause_follows_each_piece_also_the_last_of_a_job(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    limits = replace(paced(2), pause_s=0.05)
    world = open_world(worlds, real_redis.url, limits=limits)
    keys = new_keys(8)
    began = time.monotonic()
    for first, end in ((0, 5), (5, 8)):  # pieces of 2, 2, 1 and of 2, 1
        world.wait(world.start_write(keys[first:end], first))
    assert world.manager.quiesce(10)
    assert time.monotonic() - began >= 4 * limits.pause_s
    assert world.read(keys) == [R] * 8


@pytest.mark.parametrize("before", [0, 1])
def test_each_piece_waits_for_a_moment_in_which_nobody_computes(
    real_redis: RealRedis, worlds: list[World], before: int
) -> None:
    """``before``: pieces that go before somebody begins to compute."""
    ended = threading.Event()

    def computing() -> bool:
        return not ended.is_set() and real_redis.client().dbsize() >= before

    world = open_world(worlds, real_redis.url, limits=patient(600.0), computing=computing)
    keys = new_keys(3)
    world.wait(world.start_write(keys))
    assert stored(real_redis, before) == before
    assert not world.manager.quiesce(0.1)
    assert stored(real_redis, before) == before
    ended.set()
    assert world.manager.quiesce(10)
    assert world.read(keys) == [R] * 3


def test_for_such_a_moment_a_job_waits_only_so_long(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    world = open_world(worlds, real_redis.url, limits=patient(0.05), computing=lambda: True)
    keys = new_keys(3)
    world.write(keys)
    assert world.read(keys) == [R] * 3


def test_jobs_that_wait_use_up_their_patience_together(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    limits = patient(1.0)
    world = open_world(worlds, real_redis.url, limits=limits, computing=lambda: True)
    keys = new_keys(5)
    began = time.monotonic()
    with watched() as still:
        for i, key in enumerate(keys):
            world.wait(world.start_write([key], i))
        assert world.manager.quiesce(10)
        took = time.monotonic() - began
        assert limits.patience_s <= took < 3 * limits.patience_s + still.seconds
    assert world.read(keys) == [R] * 5


def test_what_comes_next_is_not_kept_waiting_for_a_moment(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    world = open_world(worlds, real_redis.url, limits=patient(600.0), computing=lambda: True)
    keys = new_keys(3)
    world.wait(world.start_write(keys))
    world.manager.clear([R])
    assert world.read(keys) == []
    stats = world.manager.stats().redis
    assert stats is not None
    assert stats.stored == 3


def test_a_forget_and_a_clear_wait_for_no_pause(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, limits=paced(1))
    keys = new_keys(6)
    world.wait(world.start_write(keys[:3]))
    assert stored(real_redis, 1) == 1
    world.manager.forget([keys[2]])
    assert world.manager.quiesce(10)
    assert world.read(keys[:3]) == [R] * 2
    stats = world.manager.stats().redis
    assert stats is not None
    assert stats.stored == 2, "a suspect block was sent after it had been forgotten"
    assert world.manager.blocks().redis_unsent == 0, "what was forgotten was not to be sent"
    # What comes later pauses again.
    world.wait(world.start_write(keys[3:], 3))
    time.sleep(0.1)
    assert stored(real_redis, 2) == 2
    world.manager.clear([R])
    assert stored(real_redis, 0) == 0
    stats = world.manager.stats().redis
    assert stats is not None
    assert stats.stored == 5


def test_while_more_than_half_the_room_is_taken_nothing_pauses(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    """Else what is computed meanwhile would be kept from Redis."""
    limits = replace(paced(1), aside_bytes=6 * SPAN)
    world = open_world(worlds, real_redis.url, limits=limits, timeout_s=5.0)
    keys = new_keys(9)
    world.write(keys[:1])
    real_redis.pause()  # no row comes back
    world.wait(world.start_write(keys[1:4], 1))
    world.wait(world.start_write(keys[4:5], 4))  # four of six: the first job is let go
    real_redis.resume()
    assert stored(real_redis, 4) == 4
    time.sleep(0.1)
    assert stored(real_redis, 4) == 4, "there is room again, and the last job waits for its pause"
    # A job may be too large by itself.
    world.wait(world.start_write(keys[5:], 5))
    assert stored(real_redis, 9) == 9


def test_what_a_failing_redis_did_not_take_is_counted(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    world = open_world(worlds, real_redis.url, limits=paced(2))
    keys = new_keys(16)
    world.wait(world.start_write(keys))
    assert stored(real_redis, 2) == 2
    real_redis.kill()
    world.manager.forget([keys[0]])  # ends the pause
    assert world.manager.quiesce(10)
    assert world.manager.stats().writes.unsent_blocks == 14


@pytest.mark.parametrize("drain_s", [0.0, 30.0])
def test_close_waits_for_no_pause(real_redis: RealRedis, drain_s: float) -> None:
    keys = new_keys(4)
    world = World(real_redis.url, limits=paced(1))
    world.wait(world.start_write(keys))
    stored(real_redis, 1)
    began = time.monotonic()
    with watched() as still:
        world.manager.close(drain_s)
        took = time.monotonic() - began
        assert took < manager.JOIN_S + still.seconds, "the sender was waited for in vain"
    if drain_s:
        assert stored(real_redis, 4) == 4


def caches_over(redis: RealRedis, memory: PoolMemory, turn: Turn | None) -> WorkerCaches:
    config = SimpleNamespace(cache=CacheConfig(kv_events=False))
    boot: Any = SimpleNamespace(config=config, redis_url=redis.url, host="127.0.0.1")
    built: Any = SimpleNamespace(
        memory=memory, turn=turn, facts=SimpleNamespace(fingerprint=FINGERPRINT)
    )
    return WorkerCaches(boot, built)


@pytest.mark.parametrize("kind", list(MemoryKind))
def test_a_worker_on_the_host_s_cores_waits_for_their_turn(
    real_redis: RealRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: MemoryKind
) -> None:
    """Another engine computes there. One on a device leaves the cores free: nothing waits."""
    monkeypatch.setattr("cache_tiers.attach.WRITE_LIMITS", patient(600.0))
    memory = replace(allocate_shared(2, SPAN, Incarnation(os.urandom(16))), kind=kind)
    turn = open_turn(0.1, tmp_path / "turns")
    caches = caches_over(real_redis, memory, turn)
    tiers = cast(manager.TierManager, caches.ports().tiers)
    turn._map[0] = 7  # another engine's place
    job = WriteBack(PinTicket(1), tuple(new_keys(2)), (BlockId(0), BlockId(1)), False)
    tiers.write_back(job, lambda unpin: None)
    if kind is MemoryKind.SHARED:
        assert not tiers.quiesce(0.2)
        assert stored(real_redis, 0) == 0
        turn._map[0] = 0
    assert tiers.quiesce(10)
    assert stored(real_redis, 2) == 2
    caches.close()
    turn.close()
    memory.close()


def test_a_worker_without_turns_waits_for_nobody(
    real_redis: RealRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether others compute cannot be told there."""
    monkeypatch.setattr("cache_tiers.attach.WRITE_LIMITS", patient(600.0))
    memory = allocate_shared(2, SPAN, Incarnation(os.urandom(16)))
    caches = caches_over(real_redis, memory, None)
    tiers = cast(manager.TierManager, caches.ports().tiers)
    job = WriteBack(PinTicket(1), tuple(new_keys(2)), (BlockId(0), BlockId(1)), False)
    tiers.write_back(job, lambda unpin: None)
    assert tiers.quiesce(10)
    assert stored(real_redis, 2) == 2
    caches.close()
    memory.close()
