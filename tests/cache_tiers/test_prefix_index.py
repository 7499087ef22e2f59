"""The router's index says for each worker how long a prefix it holds, within its bounds."""

from __future__ import annotations

import random
import subprocess
import sys
import time

from cache_tiers.prefix_index import PrefixIndex
from pdserve.engine.api import Cleared, Removed, Stored
from pdserve.types import BlockKey, WorkerId

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def keys(*numbers: int) -> tuple[BlockKey, ...]:
    return tuple(key(n) for n in numbers)


def stored(*numbers: int) -> Stored:
    return Stored(keys(*numbers), None, tuple(range(2 * len(numbers))), 2)


def test_longest_prefix_of_each_worker() -> None:
    index = PrefixIndex()
    index.apply(A, stored(1, 2, 3))
    index.apply(B, stored(1, 2))
    index.apply(B, stored(4))
    index.apply(C, stored(2, 3))
    wanted = keys(1, 2, 3, 4)
    assert index.longest_all(wanted) == {A: 3, B: 2}
    assert (index.longest(A, wanted), index.longest(C, wanted)) == (3, 0)
    assert index.longest(WorkerId("nobody"), wanted) == 0
    assert index.longest_all(()) == {}


def test_events_take_away_again() -> None:
    index = PrefixIndex()
    index.apply(A, stored(1, 2, 3))
    index.apply(B, stored(1, 2, 3))
    index.apply(A, Removed(keys(2, 99)))
    assert index.longest_all(keys(1, 2, 3)) == {A: 1, B: 3}
    index.apply(A, stored(2))
    assert index.longest(A, keys(1, 2, 3)) == 3
    index.apply(B, Cleared())
    assert index.longest_all(keys(1)) == {A: 1}
    index.drop(A)
    index.apply(C, Removed(keys(1)))
    assert index.longest_all(keys(1)) == {}
    assert index.keys == 0
    assert dict(index.held_by()) == {}


def test_random_events_agree_with_plain_sets() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    index = PrefixIndex()
    model: dict[WorkerId, set[int]] = {A: set(), B: set(), C: set()}
    for _ in range(2000):
        worker = draw.choice((A, B, C))
        numbers = draw.sample(range(12), draw.randrange(1, 6))
        action = draw.randrange(20)
        if action < 10:
            index.apply(worker, stored(*numbers))
            model[worker].update(numbers)
        elif action < 18:
            index.apply(worker, Removed(keys(*numbers)))
            model[worker].difference_update(numbers)
        else:
            index.apply(worker, Cleared())
            model[worker].clear()
        wanted = draw.sample(range(12), 6)
        for name, held in model.items():
            length = next((i for i, n in enumerate(wanted) if n not in held), len(wanted))
            assert index.longest(name, keys(*wanted)) == length
            assert index.longest_all(keys(*wanted)).get(name, 0) == length
        assert index.keys == sum(map(len, model.values()))


def test_a_full_index_takes_no_more_and_counts_it() -> None:
    index = PrefixIndex(max_keys=5)
    index.apply(A, stored(1, 2, 3))
    index.apply(B, stored(1, 2, 3, 4))
    assert index.keys == 5
    assert index.overflow == 2
    assert index.longest_all(keys(1, 2, 3, 4)) == {A: 3, B: 2}
    index.apply(A, stored(1, 2, 3))  # known already: takes no room
    assert index.overflow == 2
    index.drop(A)
    index.apply(B, stored(3))
    assert index.longest(B, keys(1, 2, 3, 4)) == 3


def test_a_million_keys_are_looked_up_fast() -> None:
    index = PrefixIndex()
    workers = [WorkerId(f"w{i}") for i in range(20)]
    for i, worker in enumerate(workers):
        index.stored(worker, [key(n) for n in range(i * 50_000, (i + 1) * 50_000)])
    assert index.keys == 1_000_000
    wanted = [key(n) for n in range(50_000, 50_512)]
    start = time.thread_time()
    for _ in range(20):
        assert index.longest_all(wanted) == {workers[1]: 512}
    assert (time.thread_time() - start) / 20 < 0.005
    start = time.thread_time()
    index.drop(workers[1])
    assert time.thread_time() - start < 0.1


def test_the_router_needs_no_torch_for_it() -> None:
    code = (
        "import sys, cache_tiers.kv_events, cache_tiers.prefix_index, cache_tiers.keys;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'kv_transfer')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
