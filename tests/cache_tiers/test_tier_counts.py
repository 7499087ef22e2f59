"""What Redis was to get and did not, and what it gave wrongly: each cause reaches the heartbeat."""

from __future__ import annotations

import logging
import threading

import pytest
from real_redis import RealRedis, new_keys
from tier_world import SPAN, World, open_world

from cache_tiers.write_jobs import WriteLimits
from pdserve.types import Tier, TierBlocks

H, R = Tier.HOST, Tier.REDIS


def test_too_many_pinned_blocks(real_redis: RealRedis, worlds: list[World]) -> None:
    gate = threading.Event()
    limits = WriteLimits(pinned_blocks=4)
    world = open_world(worlds, real_redis.url, limits=limits, on_span=lambda _: gate.wait(10))
    keys = new_keys(9)
    taken = [world.start_write(keys[:2], 0), world.start_write(keys[2:4], 2)]
    world.start_write(keys[4:], 4)
    assert world.manager.blocks() == TierBlocks(redis_unsent=5)
    gate.set()
    for ticket in taken:
        world.wait(ticket)
    assert world.manager.quiesce(10)
    assert world.manager.blocks() == TierBlocks(redis_written=4, redis_unsent=5)


def test_no_room_for_copies(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, limits=WriteLimits(aside_bytes=3 * SPAN))
    world.write(new_keys(8))
    assert world.manager.blocks() == TierBlocks(redis_written=3, redis_unsent=5)
    assert world.manager.stats().writes.waiting_blocks == 0


@pytest.mark.parametrize("host", [0, 4])
def test_a_pool_that_breaks(real_redis: RealRedis, worlds: list[World], host: int) -> None:
    def broken(block: int) -> None:
        if block >= 50:
            raise ValueError("no such block")

    world = open_world(worlds, real_redis.url, host=host, on_span=broken)
    world.write(new_keys(3), first_block=49)
    found = world.manager.blocks()
    assert (found.redis_written, found.redis_unsent) == (0, 3)
    assert world.manager.stats().writes.waiting_blocks == 0
    assert world.manager.stats().failures == 1


def test_what_a_peer_writes_there_is_not_ours_to_count(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    limits = WriteLimits(aside_bytes=0)
    world = open_world(worlds, real_redis.url, host=4, limits=limits)
    world.wait(world.start_write(new_keys(3), from_peer=True))
    assert world.manager.quiesce(10)
    assert world.manager.blocks().redis_unsent == 0


def test_a_redis_that_does_not_answer(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, timeout_s=0.05)
    world.write(new_keys(2))
    real_redis.pause()
    world.write(new_keys(3))
    real_redis.resume()
    assert world.manager.blocks() == TierBlocks(redis_written=2, redis_unsent=3)


def test_a_value_that_is_not_what_was_asked_for(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url)
    keys = new_keys(2)
    world.write(keys)
    for name in list(real_redis.client().scan_iter(f"*{keys[1].hex()}")):
        real_redis.client().set(name, b"poison")
    assert world.read(keys) == [R]
    assert world.manager.blocks() == TierBlocks(redis_written=2, redis_rejected=1)


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_a_worker_loses_at_its_end_is_in_its_log(
    real_redis: RealRedis, caplog: pytest.LogCaptureFixture, jobs: int
) -> None:
    """Whether it was not begun, or broke on its way."""
    world = World(real_redis.url, timeout_s=60.0)
    world.write(new_keys(1))
    real_redis.pause()
    for job in range(jobs):
        world.wait(world.start_write(new_keys(2), 2 * job))
    with caplog.at_level(logging.WARNING):
        world.manager.close(drain_s=0.2)
    real_redis.resume()
    told = [record.getMessage() for record in caplog.records if "closed before" in record.msg]
    assert told == [f"closed before Redis got {2 * jobs} more blocks"]
