"""Random jobs for the tier manager, against a plain dictionary, and with an eye on the memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from real_redis import RealRedis, new_keys
from tier_world import SPAN, World, open_world

from cache_tiers import device_spans
from cache_tiers.write_jobs import WriteLimits
from pdserve.engine.api import PinTicket, TierReadDone, Unpin
from pdserve.types import BlockKey, Tier

H, R = Tier.HOST, Tier.REDIS
# What is there is compared, not how fast it comes: a machine that stands still for a moment is no
# failure of Redis, which would rightly read as a miss.
PATIENT_S = 5.0


@pytest.fixture(params=["host", "device"])
def as_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Where the pool lies; one on a device receives three blocks of Redis at a time."""
    monkeypatch.setattr(device_spans, "STAGING_BYTES", 3 * SPAN)
    return bool(request.param == "device")


def limits_of(as_device: bool) -> WriteLimits:
    """Where the pool is the host's, Redis gets two blocks at a time, when nobody computes."""
    return WriteLimits(piece_bytes=2 * SPAN, pause_s=0.0 if as_device else 0.002, patience_s=0.01)


def busy_half_the_time(seed: int) -> Callable[[], bool]:
    """For one thread."""
    draw = random.Random(seed ^ 1)
    return lambda: draw.random() < 0.5


def test_random_steps_agree_with_a_plain_dictionary(
    real_redis: RealRedis, worlds: list[World], as_device: bool
) -> None:
    """One step after another; two sets of keys say what each tier must hold."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    chains = [[BlockKey(draw.randbytes(16)) for _ in range(8)] for _ in range(3)]
    world = open_world(
        worlds,
        real_redis.url,
        host=24,
        limits=limits_of(as_device),
        timeout_s=PATIENT_S,
        as_device=as_device,
        computing=busy_half_the_time(seed),
    )
    in_host: set[BlockKey] = set()
    in_redis: set[BlockKey] = set()
    for _ in range(200):
        keys = draw.choice(chains)[: draw.randrange(1, 9)]
        action = draw.randrange(12)
        if action < 4:
            start = draw.randrange(len(keys))
            world.write(keys[start:])
            in_host.update(keys[start:])
            in_redis.update(keys[start:])
        elif action < 9:
            expected: list[Tier] = []
            for key in keys:
                if key not in in_host | in_redis:
                    break
                expected.append(H if key in in_host else R)
            assert world.read(keys) == expected
            in_host.update(keys[: len(expected)])
        elif action == 9:
            suspect = draw.sample(keys, 1)
            world.manager.forget(suspect)
            assert world.manager.quiesce(10)
            in_host.difference_update(suspect)
            in_redis.difference_update(suspect)
        elif action == 10:
            world.manager.clear([H])
            in_host.clear()
        elif draw.randrange(3) == 0:
            world.manager.clear([R])
            in_redis.clear()


def test_random_jobs_agree_with_what_was_written(
    real_redis: RealRedis, worlds: list[World], as_device: bool
) -> None:
    """Chains over 30 keys, small tiers, a Redis that dies and returns; memory is watched."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    chains = [[BlockKey(draw.randbytes(16)) for _ in range(10)] for _ in range(3)]
    world = open_world(
        worlds,
        real_redis.url,
        host=9,
        blocks=2020,
        limits=replace(limits_of(as_device), aside_bytes=12 * SPAN),  # often scarce, or too few
        breaker_open_s=0.05,
        timeout_s=PATIENT_S,
        as_device=as_device,
        computing=busy_half_the_time(seed),
    )
    written: set[BlockKey] = set()
    reads: list[tuple[object, list[BlockKey], int]] = []
    writes: list[PinTicket] = []
    block = 0
    for turn in range(250):
        keys = draw.choice(chains)[: draw.randrange(1, 11)]
        action = draw.randrange(20)
        if turn in (50, 200):
            # Once all is quiet, what was written is found to the last block.
            assert world.manager.quiesce(20)
            world.write(chains[0], 2000)
            written.update(chains[0])
            assert len(world.read(chains[0], 2010)) == 10
        if block + len(keys) > 2000:
            break
        if action < 8:
            written.update(keys)
            writes.append(world.start_write(keys, block))
        elif action < 17:
            reads.append((world.start_read(keys, block), keys, block))
        elif action == 17:
            world.manager.forget(draw.sample(keys, 1))
        elif action == 18 and not 100 < turn <= 150:  # it would rightly raise
            world.manager.clear([draw.choice([H, R])])
        block += len(keys)
        if turn == 100:
            real_redis.kill()
        elif turn == 150:
            real_redis.start()
            time.sleep(0.1)
    assert world.manager.quiesce(20)
    assert world.manager.stats().writes.waiting_blocks == 0, "rows of copies were not given back"
    for ticket in writes:
        assert world.ends[ticket] == [Unpin(ticket)]
    total = 0
    for job, keys, first in reads:
        (answer,) = world.ends[job]
        assert isinstance(answer, TierReadDone)
        hits = world.checked(keys, answer, first)
        assert written.issuperset(keys[: len(hits)])
        total += len(hits)
    # How much is found depends on the draw and on who comes first; that something was compared not.
    assert total > 0
    assert world.manager.stats().failures == 0
    # With the dust settled, both tiers agree with the truth once more.
    for chain in chains:
        world.write(chain)
        assert len(world.read(chain)) == 10


def test_no_block_is_touched_after_its_job_ended(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    """Each block is painted in its done callback; the paint must still be there at the end."""
    world = open_world(worlds, real_redis.url, host=4, blocks=600, timeout_s=0.05)
    keys = new_keys(20)
    world.write(keys)
    painted: list[int] = []
    end = world._end

    def paint(job: object, answer: object) -> None:
        if isinstance(answer, TierReadDone):
            first = 20 + 20 * (int.from_bytes(answer.seq, "big") - 2)
            world.pool[first : first + 20] = 0x5A
            painted.append(first)
        end(job, answer)

    world._end = paint  # type: ignore[method-assign]
    for i in range(25):
        if i % 5 == 2:
            real_redis.pause()
        world.start_read(keys, 20 + 20 * i)
        if i % 5 == 4:
            time.sleep(0.08)
            real_redis.resume()
    real_redis.resume()
    assert world.manager.quiesce(20)
    time.sleep(0.05)
    assert len(painted) == 25
    for first in painted:
        assert (world.pool[first : first + 20] == 0x5A).all()
