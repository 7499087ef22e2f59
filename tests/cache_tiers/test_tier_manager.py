"""Every job of the tier manager ends once; what it reads is a true prefix; failures are misses."""

from __future__ import annotations

import threading
import time

import pytest
from real_redis import RealRedis, new_keys
from tier_world import SPAN, World, open_world

from cache_tiers import device_spans, manager, send_path
from cache_tiers.aside import Aside
from cache_tiers.fence import ForgetFence
from cache_tiers.write_jobs import WriteLimits
from pdserve.engine.api import TierReadDone, Unpin
from pdserve.errors import TierError
from pdserve.types import Incarnation, Reach, Tier, TierBlocks, TierReach
from tests.standstill import watched

H, R = Tier.HOST, Tier.REDIS


# ---- reading and writing ------------------------------------------------------------------------


def test_host_first_then_redis_and_redis_hits_become_host_hits(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(6)
    first = open_world(worlds, real_redis.url, host=16)
    assert first.read(keys) == []
    first.write(keys)
    assert first.read(keys) == [H] * 6
    # Another process, as after a restart of every worker.
    second = open_world(worlds, real_redis.url, host=16, writer=Incarnation(b"2" * 16))
    assert second.read(keys[:4]) == [R] * 4
    assert second.read(keys) == [H] * 4 + [R] * 2
    assert second.manager.stats().hit_blocks == {H: 4, R: 6}
    assert second.manager.stats().wanted_blocks == 10
    assert first.manager.blocks() == TierBlocks(host=6, host_total=16, redis_written=6)
    assert second.manager.blocks() == TierBlocks(host=6, host_total=16)
    assert second.manager.degraded() == ""


def test_tiers_fill_each_others_holes_and_the_first_gap_ends_it(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(8)
    world = open_world(worlds, real_redis.url, host=16)
    world.write(keys)
    prefix = real_redis.client().keys("*")[0].rsplit(b":", 1)[0].decode()
    host = world.manager._host
    assert host is not None
    host.delete([keys[1], keys[2], keys[4], keys[6]])
    real_redis.client().delete(f"{prefix}:{keys[6].hex()}")
    assert world.read(keys) == [H, R, R, H, R, H]


@pytest.mark.parametrize("as_device", [False, True])
def test_a_prefix_larger_than_the_host_tier_leaves_its_front_there(
    real_redis: RealRedis,
    worlds: list[World],
    as_device: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_spans, "STAGING_BYTES", 3 * SPAN)
    keys = new_keys(12)
    open_world(worlds, real_redis.url, timeout_s=5.0).write(keys)
    world = open_world(worlds, real_redis.url, host=6, timeout_s=5.0, as_device=as_device)
    world.write(new_keys(5))
    assert world.read(keys) == [R] * 12
    assert world.read(keys) == [H] * 6 + [R] * 6


def test_without_memory_for_copies_there_is_no_redis_tier_and_it_says_so(
    real_redis: RealRedis, worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Aside):
        def __init__(self, bytes_max: int, *rest: object) -> None:
            if bytes_max:
                raise TierError("no memory")
            super().__init__(bytes_max, SPAN)

    monkeypatch.setattr(manager, "Aside", Refused)
    world = open_world(worlds, real_redis.url, host=8)
    keys = new_keys(3)
    world.write(keys)
    assert world.read(keys) == [H] * 3
    assert world.manager.degraded() == "redis tier off: no memory"
    assert world.manager.reach().redis is Reach.NEVER


def test_one_tier_alone_works(real_redis: RealRedis, worlds: list[World]) -> None:
    keys = new_keys(5)
    for world, tier in (
        (open_world(worlds, "", host=8), H),
        (open_world(worlds, real_redis.url, host=0), R),
    ):
        world.write(keys)
        assert world.read(keys) == [tier] * 5


def test_without_tiers_every_job_ends_at_once(worlds: list[World]) -> None:
    world = open_world(worlds)
    assert not world.manager.enabled
    assert world.read(new_keys(3)) == []
    world.write(new_keys(3))


def test_a_block_that_redis_holds_is_not_sent_again(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(5)
    world = open_world(worlds, real_redis.url)
    world.write(keys[:3])
    world.write(keys)
    stats = world.manager.stats().redis
    assert stats is not None
    assert stats.stored == 5


def test_what_a_peer_computed_goes_to_the_host_tier_alone(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(5)
    world, other = (open_world(worlds, real_redis.url, host=16) for _ in range(2))
    world.wait(world.start_write(keys, from_peer=True))
    assert world.manager.quiesce(5)
    assert world.read(keys) == [H] * 5
    assert other.read(keys) == []
    alone = open_world(worlds, real_redis.url, host=0)
    ticket = alone.start_write(keys, from_peer=True)
    assert alone.ends[ticket] == [Unpin(ticket)], "there is nothing to wait for"
    assert other.read(keys) == []
    world.write(keys)  # computed here after all
    assert world.manager.quiesce(5)
    assert other.read(keys) == [R] * 5


# ---- failures -----------------------------------------------------------------------------------


def test_a_dead_redis_is_a_miss_and_says_so_and_comes_back(
    real_redis: RealRedis, worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_path, "IDLE_S", 0.05)
    world = open_world(worlds, real_redis.url, host=2)
    keys = new_keys(5)
    world.write(keys)
    assert world.manager.quiesce(5)
    assert world.manager.reach().redis is Reach.REACHED
    real_redis.kill()
    for _ in range(5):
        assert world.read(keys) == [H] * 2
        world.write(new_keys(1))
        world.write(keys[:2])
    assert world.manager.degraded() == "redis unreachable"
    assert world.manager.reach().redis is Reach.REACHED, "once is enough"
    real_redis.start()
    deadline = time.monotonic() + 5
    while world.manager.degraded():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    world.write(keys)
    assert world.read(keys)[2:] == [R] * 3
    assert world.manager.stats().failures == 0


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["full", "read-only"],
)
def test_a_worker_with_nothing_to_write_hears_that_writes_are_taken_again(
    real_redis: RealRedis,
    worlds: list[World],
    monkeypatch: pytest.MonkeyPatch,
    refuse: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    monkeypatch.setattr(send_path, "IDLE_S", 0.05)
    world = open_world(worlds, real_redis.url, breaker_open_s=0.2)
    client = real_redis.client()
    client.config_set("maxmemory-policy", "noeviction")
    world.write(new_keys(1))
    assert world.manager.degraded() == ""
    client.execute_command(*refuse)
    world.write(new_keys(1))
    quiet = time.monotonic() + 0.6
    while time.monotonic() < quiet:
        assert world.manager.degraded() == "redis refuses writes"
        time.sleep(0.02)
    client.execute_command(*allow)
    limit = time.monotonic() + 5
    while world.manager.degraded():
        assert time.monotonic() < limit, "nothing was written, so nobody found out"
        time.sleep(0.02)
    stats = world.manager.stats().redis
    assert stats is not None
    assert stats.stored == 1, "it was tried with a value"


def test_a_redis_that_never_answered_is_told_from_one_that_did(
    real_redis: RealRedis, worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_path, "IDLE_S", 0.05)
    real_redis.kill()
    world = open_world(worlds, real_redis.url)
    world.read(new_keys(2))
    assert world.manager.reach() == TierReach(Reach.OFF, Reach.NEVER)
    real_redis.start()
    reached(world)  # nobody asked it for anything


def reached(world: World) -> None:
    limit = time.monotonic() + 5
    while world.manager.reach().redis is not Reach.REACHED:
        assert time.monotonic() < limit
        time.sleep(0.02)


ACL_NOTHING = ("ACL", "SETUSER", "default", "resetkeys")


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        (ACL_NOTHING, (*ACL_NOTHING[:3], "allkeys")),
    ],
    ids=["full", "read-only", "no right to a key"],
)
def test_a_redis_that_refuses_everything_was_never_reached(
    real_redis: RealRedis,
    worlds: list[World],
    monkeypatch: pytest.MonkeyPatch,
    refuse: tuple[str, ...],
    allow: tuple[str, ...],
) -> None:
    monkeypatch.setattr(send_path, "IDLE_S", 0.05)
    client = real_redis.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.execute_command(*refuse)
    world = open_world(worlds, real_redis.url, breaker_open_s=0.2)
    quiet = time.monotonic() + 0.6
    while time.monotonic() < quiet:
        world.read(new_keys(2))
        world.write(new_keys(2))
        world.manager.forget(new_keys(1))
        assert world.manager.reach().redis is not Reach.REACHED
        time.sleep(0.02)
    assert world.manager.reach().redis is Reach.NEVER
    client.execute_command(*allow)
    reached(world)


def test_what_a_read_only_redis_holds_is_worth_having(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(2)
    open_world(worlds, real_redis.url).write(keys)
    real_redis.client().execute_command("REPLICAOF", "127.0.0.1", "1")
    world = open_world(worlds, real_redis.url)
    assert world.read(keys) == [R, R]
    assert world.manager.reach().redis is Reach.REACHED


def test_a_stopped_redis_holds_no_block_and_no_read_for_long(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    patient = open_world(worlds, real_redis.url, timeout_s=60.0)
    patient.write(new_keys(2))
    world = open_world(worlds, real_redis.url, timeout_s=0.2, breaker_open_s=60.0)
    real_redis.pause()
    tickets = [patient.start_write(new_keys(2)) for _ in range(20)]
    for ticket in tickets:
        patient.wait(ticket, 2.0)  # far less than the bytes wait
    with watched() as still:
        start = time.monotonic()
        for _ in range(30):
            assert world.read(new_keys(2)) == []
        assert time.monotonic() - start < 3.0 + still.seconds
    real_redis.resume()


def test_a_block_too_large_for_redis_turns_that_tier_off_and_says_so(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    world = open_world(worlds, real_redis.url, host=4, value_bytes_max=SPAN)
    keys = new_keys(2)
    world.write(keys)
    assert world.read(keys) == [H, H]
    assert "redis tier off" in world.manager.degraded()
    assert world.manager.reach() == TierReach(Reach.REACHED, Reach.NEVER)


def test_a_pool_that_breaks_ends_the_job_all_the_same(worlds: list[World]) -> None:
    def broken(block: int) -> None:
        if block >= 50:
            raise ValueError("no such block")

    world = open_world(worlds, host=4, on_span=broken)
    keys = new_keys(2)
    ticket = world.start_write(keys, first_block=60)
    assert world.wait(ticket) == Unpin(ticket)
    assert world.read(keys, first_block=60) == []
    assert world.manager.quiesce(5)
    assert world.manager.stats().failures == 2
    world.write(keys)
    assert world.read(keys) == [H, H]


def test_a_full_queue_drops_the_newest_write_back_and_unpins_it(worlds: list[World]) -> None:
    gate = threading.Event()
    world = open_world(
        worlds, host=16, limits=WriteLimits(pinned_blocks=4), on_span=lambda _: gate.wait(10)
    )
    keys = new_keys(7)
    taken = [world.start_write(keys[:2], 0), world.start_write(keys[2:4], 2)]
    dropped = world.start_write(keys[4:], 4)
    assert world.ends[dropped] == [Unpin(dropped)]
    assert [world.ends[ticket] for ticket in taken] == [[], []]
    gate.set()
    for ticket in taken:
        world.wait(ticket)
    assert world.read(keys) == [H] * 4
    assert world.manager.stats().writes.dropped_jobs == 1
    # A job larger than the whole queue goes through when it is alone.
    world.write(keys)
    assert world.read(keys) == [H] * 7


def test_bytes_for_redis_are_bounded(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, limits=WriteLimits(aside_bytes=3 * SPAN))
    keys = new_keys(8)
    world.write(keys)
    assert world.read(keys) == [R] * 3
    assert world.manager.stats().writes.unsent_blocks == 5
    # What was sent makes room again.
    world.write(keys[3:6])
    assert world.read(keys) == [R] * 6


def test_close_delivers_what_was_written_and_ends_the_rest(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(20)
    world = World(real_redis.url, host=4)
    world.start_write(keys)
    world.manager.close()
    late = [world.start_write(keys), world.start_read(keys)]
    assert all(len(world.ends[job]) == 1 for job in late)
    with pytest.raises(TierError):
        world.manager.clear([H])
    assert open_world(worlds, real_redis.url).read(keys) == [R] * 20
    # With Redis stopped, closing still takes a bounded time and ends every job.
    stuck = World(real_redis.url, host=4, timeout_s=0.5)
    real_redis.pause()
    jobs = [stuck.start_read(new_keys(9)) for _ in range(40)]
    jobs += [stuck.start_write(new_keys(9)) for _ in range(40)]
    start = time.monotonic()
    stuck.manager.close(drain_s=0.1)
    assert time.monotonic() - start < 5
    real_redis.resume()
    assert all(len(stuck.ends[job]) == 1 for job in jobs)


# ---- forget, revoke, clear ----------------------------------------------------------------------


def test_forgotten_blocks_leave_every_tier(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, host=16)
    keys = new_keys(5)
    # The write-back is still on its way when its blocks turn out to be suspect.
    world.start_write(keys)
    world.manager.forget([keys[2], keys[2], keys[4]])
    assert H not in world.read(keys)[2:]
    assert world.manager.quiesce(10)
    assert len(world.read(keys)) == 2
    assert len(real_redis.client().keys("*")) == 3
    # They can be computed and kept anew.
    world.write(keys)
    assert world.read(keys) == [H] * 5


def test_a_suspect_block_that_waits_for_redis_is_not_sent(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    world = open_world(worlds, real_redis.url, timeout_s=5.0)
    keys = new_keys(3)
    world.write(new_keys(1))
    real_redis.pause()
    world.wait(world.start_write(keys))
    world.manager.forget([keys[1]])
    real_redis.resume()
    assert world.manager.quiesce(10)
    stats = world.manager.stats().redis
    assert stats is not None
    assert stats.stored == 3


def test_a_key_that_two_forgets_fence_stays_fenced_until_both_are_done() -> None:
    fence = ForgetFence()
    keys = new_keys(3)
    fence.begin(keys[1:2])
    fence.begin(keys[1:])
    fence.end(keys[1:])
    assert fence.enter(keys).usable == 1
    assert not fence.is_fenced(keys[2])
    fence.end(keys[1:2])
    assert fence.enter(keys).usable == 3


def test_a_read_under_way_takes_back_what_was_forgotten_meanwhile(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    keys = new_keys(4)
    open_world(worlds, real_redis.url).write(keys)
    world = open_world(worlds, real_redis.url, host=16, timeout_s=5.0)
    assert world.read(keys[:1]) == [R]  # connected
    real_redis.pause()
    job = world.start_read(keys)
    time.sleep(0.1)  # the request is with the server
    world.manager.forget([keys[2]])
    real_redis.resume()
    answer = world.wait(job)
    assert isinstance(answer, TierReadDone)
    assert answer.hits == (H, R, None, None)
    assert world.manager.quiesce(10)
    assert world.manager._host is not None
    assert world.manager._host.contains(keys) == [True, True, False, True]
    assert world.read(keys) == [H, H]


def test_what_redis_could_not_delete_stays_fenced_until_it_can(
    real_redis: RealRedis, worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send_path, "IDLE_S", 0.05)
    world = open_world(worlds, real_redis.url, breaker_failures=100)
    keys = new_keys(4)
    world.write(keys)
    client = real_redis.client()
    client.execute_command("ACL", "SETUSER", "default", "-unlink")
    world.manager.forget([keys[1], keys[2]])
    world.manager.forget([keys[2]])
    assert world.manager.quiesce(10)
    assert world.manager.stats().writes.undeleted_keys == 2
    assert world.read(keys) == [R]
    # A new value replaces a suspect one that is still there.
    world.write(keys[:2])
    assert world.read(keys) == [R, R]
    client.execute_command("ACL", "SETUSER", "default", "+unlink")
    deadline = time.monotonic() + 5
    while world.manager.stats().writes.undeleted_keys:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(client.keys("*")) == 3
    world.write(keys)
    assert world.read(keys) == [R] * 4


def test_a_revoked_incarnation_reads_as_a_miss_everywhere(
    real_redis: RealRedis, worlds: list[World]
) -> None:
    bad = Incarnation(b"B" * 16)
    keys = new_keys(4)
    world = open_world(worlds, real_redis.url, host=16)
    world.write(keys[:1])
    open_world(worlds, real_redis.url, writer=bad).write(keys)
    assert world.read(keys) == [H, R, R, R]
    world.manager.revoke(bad)
    assert world.read(keys) == [H]
    world.write(keys)
    assert world.read(keys) == [H] * 4


def test_clear_empties_the_named_tiers(real_redis: RealRedis, worlds: list[World]) -> None:
    world = open_world(worlds, real_redis.url, host=16)
    keys = new_keys(4)
    world.start_write(keys)
    world.manager.clear([Tier.DEVICE, H])
    world.manager.quiesce(10)
    assert world.read(keys) == [R] * 4
    world.manager.clear([R])
    assert world.read(keys) == [H] * 4
    world.manager.clear([H, R])
    assert world.read(keys) == []
    real_redis.kill()
    with pytest.raises(TierError):
        world.manager.clear([R])
