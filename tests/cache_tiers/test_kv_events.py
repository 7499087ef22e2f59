"""Publisher and subscriber over real sockets: replay, gaps, blindness, and a plain vLLM client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq
from event_world import W, batch, chain, fake, following, key, run, stored, subscribed, until

from cache_tiers import kv_events, kv_subscriber
from cache_tiers.kv_events import KvEventPublisher
from cache_tiers.kv_wire import KvEvent, encode_batch, encode_seq
from cache_tiers.prefix_index import PrefixIndex
from pdserve.engine.api import Cleared, Removed, Stored
from pdserve.errors import ConfigError
from tests.standstill import watched


@pytest.fixture
def publisher() -> Iterator[KvEventPublisher]:
    made = KvEventPublisher("127.0.0.1")
    yield made
    made.close()


def test_a_subscriber_that_comes_late_learns_everything(publisher: KvEventPublisher) -> None:
    async def story() -> None:
        index = PrefixIndex()
        index.stored(W, [key(99)])  # from the worker's earlier life
        for i in range(5):
            publisher.publish([stored(i)])
        async with following(publisher, index) as subscriber:
            assert subscriber.blind
            await subscriber.wait_live()
            assert index.longest(W, chain(10)) == index.keys == 5
            publisher.publish([stored(5), stored(6)])
            await until(lambda: index.longest(W, chain(10)) == 7)
            publisher.publish([Removed((key(3),))])
            await until(lambda: index.longest(W, chain(10)) == 3)
            publisher.publish([Cleared()])
            await until(lambda: index.keys == 0)
            assert not subscriber.blind
            assert subscriber.stats().gaps == 0

    run(story)


def test_blocks_stored_long_ago_are_learned_though_their_batch_is_gone() -> None:
    async def story() -> None:
        publisher = KvEventPublisher("127.0.0.1", replay_batches=3)
        index = PrefixIndex()
        for i in range(4):
            publisher.publish([stored(i)])
        for i in range(100, 160):
            publisher.publish([stored(i)])
            publisher.publish([Removed((key(i),))])
        async with following(publisher, index) as subscriber:
            await subscriber.wait_live()
            assert index.longest(W, chain(10)) == 4
            assert index.keys == 4
        publisher.close()

    run(story)


def test_a_gap_is_filled_before_anything_later_is_applied() -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source:
            source.repeatable = {0: batch(0)}
            async with following(source, index, quiet_s=30.0) as subscriber:
                await subscribed(source, subscriber)
                # 1 and 2 are lost on the way; 2 takes back what 1 and 3 brought.
                source.repeatable |= {
                    1: encode_batch([stored(1), stored(3)], 0.0),
                    2: encode_batch([Removed((key(3),))], 0.0),
                    3: batch(2),
                }
                source.send(3, batch(2))
                await until(lambda: index.longest(W, chain(9)) == 3)
                assert source.requests[-1] == 1
                assert subscriber.stats().gaps == 1
                assert index.keys == 3
                # The same number again changes nothing.
                source.send(2, encode_batch([Cleared()], 0.0))
                source.send(4, batch(3))
                await until(lambda: index.longest(W, chain(9)) == 4)
                assert not subscriber.blind

    run(story)


@pytest.mark.parametrize("left", [{}, {7: batch(7)}, {0: batch(0), 7: batch(7)}])
def test_a_gap_that_nothing_fills_blinds_until_a_whole_replay(left: dict[int, bytes]) -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source:
            source.repeatable = {0: batch(0), 1: batch(1)}
            async with following(source, index, quiet_s=30.0) as subscriber:
                await subscribed(source, subscriber)
                assert index.keys == 2
                source.repeatable = left  # 2 to 6 are gone for good
                source.answers = bool(left)
                source.send(7, batch(7))
                await until(lambda: subscriber.stats().went_blind == 1)
                # Asked from 0 again and again; a replay with a hole does not count.
                await until(lambda: source.requests.count(0) >= 3)
                assert subscriber.blind
                source.answers = True
                whole = encode_batch([Cleared(), stored(0), stored(1), stored(2)], 0.0)
                source.repeatable = {6: whole, 7: batch(3)}
                await until(lambda: not subscriber.blind)
                assert index.longest(W, chain(9)) == 4
                assert index.keys == 4

    run(story)


def test_an_end_marker_without_what_was_missed_fills_no_gap() -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source:
            source.repeatable = {0: batch(0)}
            async with following(source, index, quiet_s=30.0) as subscriber:
                await subscribed(source, subscriber)
                source.send(2, batch(2))
                await until(lambda: subscriber.stats().went_blind == 1)
                assert subscriber.blind
                assert index.keys == 0, "nothing is believed past a gap"

    run(story)


def test_while_blind_nothing_is_believed_of_the_worker() -> None:
    async def story() -> None:
        index = PrefixIndex()
        index.stored(W, chain(5))  # from the worker's earlier life
        async with fake() as source:
            source.repeatable = {0: batch(7), 2: batch(9)}
            async with following(source, index, retry_s=0.5) as subscriber:
                await until(lambda: len(source.requests) == 1)
                await asyncio.sleep(0.2)  # the half replay is over, the next not begun
                assert subscriber.blind
                assert index.keys == 0
                source.repeatable[1] = batch(8)
                await subscriber.wait_live()
                assert index.keys == 3

    run(story)


def test_a_publisher_that_says_nothing_leaves_us_blind_and_answers_late() -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source:
            source.answers = False
            source.repeatable = {0: batch(0)}
            async with following(source, index, replay_timeout_s=0.05) as subscriber:
                await until(lambda: len(source.requests) >= 3)
                assert subscriber.blind
                source.answers = True
                await subscriber.wait_live()
                assert index.keys == 1

    run(story)


def test_a_lost_last_batch_is_found_when_it_is_quiet() -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source, following(source, index) as subscriber:
            await subscriber.wait_live()
            source.repeatable = {0: batch(0)}  # published, and lost
            await until(lambda: index.keys == 1)
            assert subscriber.stats().gaps == 0

    run(story)


def test_messages_that_are_no_batches_are_counted_and_passed_over() -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source:
            source.repeatable = {0: batch(0)}
            async with following(source, index, quiet_s=30.0) as subscriber:
                await subscribed(source, subscriber)
                source.pub.send_multipart([b"kv-events", b"odd", batch(1)])
                source.pub.send_multipart([b"kv-events", encode_seq(1)])
                source.pub.send_multipart([b"kv-events-and-more"])
                source.send(1, batch(1))
                await until(lambda: index.longest(W, chain(3)) == 2)
                assert subscriber.stats().bad_messages == 3
                assert not subscriber.blind

    run(story)


@pytest.mark.parametrize("later", [{}, {2: batch(1)}])
def test_a_batch_that_cannot_be_read_blinds_until_all_can(later: dict[int, bytes]) -> None:
    async def story() -> None:
        index = PrefixIndex()
        async with fake() as source:
            source.repeatable = {0: batch(0)}
            async with following(source, index, quiet_s=30.0) as subscriber:
                await subscribed(source, subscriber)
                sure = subscriber.unsure_s()
                source.repeatable |= {1: b"garbage"} | later
                for seq, payload in source.repeatable.items():
                    source.send(seq, payload)
                await until(lambda: subscriber.stats().went_blind == 1)
                asked = source.requests.count(0)
                await until(lambda: source.requests.count(0) >= asked + 3)
                assert subscriber.blind
                assert index.keys == 0
                assert subscriber.unsure_s() > sure + 0.1, "what was not understood is not known"
                source.repeatable[1] = batch(1)
                await until(lambda: not subscriber.blind)
                assert index.longest(W, chain(3)) == 2

    run(story)


def test_a_router_that_stood_still_fills_its_gap_by_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than all queues on the way hold, so that batches are really lost."""
    monkeypatch.setattr(kv_subscriber, "_QUEUE_MAX", 10)
    publisher = KvEventPublisher("127.0.0.1", queue_batches=100)
    blocks = 1000

    def bulk(number: int) -> Stored:
        keys = tuple(key(number * blocks + i) for i in range(blocks))
        return Stored(keys, None, (1, 2) * blocks, 2)

    async def story() -> None:
        index = PrefixIndex()
        async with following(publisher, index, quiet_s=30.0) as subscriber:
            await subscriber.wait_live()
            for number in range(600):  # nothing on this loop runs meanwhile
                publisher.publish([bulk(number)])
                while publisher.stats().batches <= number:
                    time.sleep(0.0002)  # noqa: ASYNC251
            while index.keys < 601 * blocks:
                # One of these gets through, and shows the gap before it.
                publisher.publish([bulk(600)])
                await asyncio.sleep(0.02)
            assert index.keys == 601 * blocks
            assert subscriber.stats().gaps >= 1
            assert subscriber.stats().went_blind == 0

    run(story)
    assert publisher.stats().overflows == 0
    publisher.close()


def test_an_overflowing_queue_makes_the_view_smaller_never_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, reached = threading.Event(), threading.Event()

    def late(events: Sequence[KvEvent], now: float) -> bytes:
        reached.set()
        gate.wait(10)
        return encode_batch(events, now)

    monkeypatch.setattr(kv_events, "encode_batch", late)
    publisher = KvEventPublisher("127.0.0.1", queue_batches=50)
    publisher.publish([stored(0)])
    assert reached.wait(10)  # the publisher's thread stands still with this one batch
    publisher.publish([Removed((key(0),))])
    for i in range(1, 120):
        publisher.publish([stored(i)])
    gate.set()

    async def story() -> None:
        index = PrefixIndex()
        async with following(publisher, index) as subscriber:
            await subscriber.wait_live()
            await until(lambda: index.longest(W, [key(119)]) == 1)
            # The removal of block 0 was among what was lost.
            assert index.longest(W, [key(0)]) == 0
            assert index.keys < 60

    run(story)
    assert publisher.stats().overflows == 2
    publisher.close()


def test_a_plain_vllm_client_follows_and_asks_for_what_it_missed(
    publisher: KvEventPublisher,
) -> None:
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    sub.connect(publisher.address)
    sub.subscribe(b"kv-events")
    deadline = time.monotonic() + 5
    published = 0
    while not sub.poll(20):
        publisher.publish([stored(0)])
        published += 1
        assert time.monotonic() < deadline
    while publisher.stats().batches < published:
        time.sleep(0.001)
    topic, seq, payload = sub.recv_multipart()
    assert topic == b"kv-events"
    ts, events, rank = msgspec.msgpack.decode(payload)
    assert abs(ts - time.time()) < 60
    assert rank == 0
    assert events[0]["type"] == "BlockStored"
    assert events[0]["block_hashes"] == [key(0)]
    replay = context.socket(zmq.DEALER)
    replay.connect(publisher.replay_address)
    replay.send_multipart([b"", b"bad"])
    replay.send_multipart([b"", (0).to_bytes(8, "big")])
    numbers = []
    while True:
        assert replay.poll(2000)
        empty, topic, seq, payload = replay.recv_multipart()
        assert empty == b""
        if seq == b"\xff" * 8:
            assert (topic, payload) == (b"", b"")
            break
        assert topic == b"kv-events"
        numbers.append(int.from_bytes(seq, "big"))
    assert numbers == list(range(published))
    assert publisher.stats().bad_requests == 1
    context.destroy(linger=0)


def test_publish_never_waits_and_close_is_final() -> None:
    publisher = KvEventPublisher("127.0.0.1")
    with watched() as still:
        start = time.monotonic()
        for i in range(1000):
            publisher.publish([stored(i)])
        assert time.monotonic() - start < 0.5 + still.seconds
    publisher.close()
    assert publisher.stats().batches == 1000
    publisher.publish([stored(0)])
    publisher.close()
    assert publisher.stats().batches == 1000


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError):
        KvEventPublisher("203.0.113.7")


def test_ipv6_addresses_work() -> None:
    try:
        publisher = KvEventPublisher("::1")
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    publisher.publish([stored(0)])

    index = PrefixIndex()

    async def story() -> None:
        async with following(publisher, index) as subscriber:
            await subscriber.wait_live()
            await until(lambda: index.keys == 1)

    run(story)
    publisher.close()
    assert index.keys == 1
