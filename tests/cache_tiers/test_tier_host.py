"""The host tier keeps within its bytes, forgets the oldest first, and never mixes values up."""

from __future__ import annotations

import random
import threading

import pytest
from real_redis import WRITER, blank, new_keys, new_spans

from cache_tiers.host import HostTier
from pdserve.errors import TierError
from pdserve.types import BlockKey, Incarnation

SPAN = 512


def host(spans: int) -> HostTier:
    return HostTier(spans * SPAN + SPAN // 2, SPAN, WRITER)


def held(tier: HostTier, keys: list[BlockKey]) -> int:
    return tier.get(keys, blank(len(keys), SPAN), 0.0)


def test_a_prefix_comes_back() -> None:
    tier = host(8)
    keys, values, into = new_keys(5), new_spans(5, SPAN), blank(5, SPAN)
    tier.put(keys, values)
    tier.delete([keys[3]])
    assert tier.contains(keys) == [True, True, True, False, True]
    assert tier.get(keys, into, 0.0) == 3
    assert into[:3] == values[:3]
    tier.clear()
    assert held(tier, keys) == 0
    assert tier.stats().bytes_used == 0


def test_the_limit_holds_and_the_oldest_leaves_first() -> None:
    tier = host(4)
    assert tier.capacity == 4
    old, new = new_keys(3), new_keys(3)
    tier.put(old, new_spans(3, SPAN))
    assert held(tier, old[2:]) == 1  # the one that would leave first was used again
    tier.put(new, new_spans(3, SPAN))
    assert tier.contains(old) == [False, False, True]
    assert tier.contains(new) == [True] * 3
    assert tier.stats().bytes_used == 4 * SPAN
    assert tier.stats().evicted == 2


def test_a_child_leaves_before_its_parent() -> None:
    tier = host(4)
    chain = new_keys(4)
    tier.put(chain, new_spans(4, SPAN))
    held(tier, chain)
    tier.put(new_keys(1), new_spans(1, SPAN))
    assert tier.contains(chain) == [True, True, True, False]


def test_more_than_fits_keeps_the_beginning() -> None:
    tier = host(4)
    tier.put(new_keys(4), new_spans(4, SPAN))
    keys = new_keys(7)
    tier.put(keys, new_spans(7, SPAN))
    assert held(tier, keys) == 4
    # Again, with a part of it here: nothing of the beginning makes room for the end.
    tier.put(keys, new_spans(7, SPAN))
    assert held(tier, keys) == 4


def test_less_than_one_span_stores_nothing() -> None:
    tier = HostTier(SPAN - 1, SPAN, WRITER)
    keys = new_keys(2)
    tier.put(keys, new_spans(2, SPAN))
    assert held(tier, keys) == 0


def test_memory_that_the_kernel_refuses_is_a_tier_error() -> None:
    with pytest.raises(TierError):
        HostTier(1 << 60, SPAN, WRITER)


def test_a_revoked_writers_values_leave() -> None:
    tier = host(4)
    keys, other = new_keys(2), Incarnation(b"o" * 16)
    tier.put(keys, new_spans(2, SPAN), [WRITER, other])
    tier.revoke(other)
    assert tier.contains(keys) == [True, False]


def test_threads_never_see_a_value_of_another_key() -> None:
    """Each value is a function of its key; many threads fight over few slots."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    tier = host(12)
    keys = [BlockKey(bytes([i]) * 16) for i in range(40)]
    values = [memoryview(bytes([i]) * SPAN) for i in range(40)]
    wrong: list[str] = []
    hits = [0] * 4

    def work(worker: int) -> None:
        draw = random.Random(seed + worker)
        for _ in range(1500):
            start = draw.randrange(36)
            span = slice(start, start + draw.randrange(1, 5))
            action = draw.randrange(10)
            if action < 5:
                tier.put(keys[span], values[span])
            elif action < 9:
                into = blank(len(keys[span]), SPAN)
                count = tier.get(keys[span], into, 0.0)
                hits[worker] += count
                if into[:count] != values[span][:count]:
                    wrong.append(f"{worker} {span}")
            else:
                tier.delete(keys[span])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(hits) > 100
    assert tier.stats().bytes_used <= 12 * SPAN
    # No slot was lost or is used twice: as many values fit as at the beginning.
    tier.clear()
    fresh, spans = new_keys(12), new_spans(12, SPAN)
    tier.put(fresh, spans)
    into = blank(12, SPAN)
    assert tier.get(fresh, into, 0.0) == 12
    assert into == spans
