"""The block allocator: who may have a block, who can find it, and which one goes first."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pdserve.engine.blocks import BlockAllocator, CommitOutcome
from pdserve.types import BlockKey


def make(num_blocks: int) -> BlockAllocator:
    return BlockAllocator(num_blocks, np.zeros(num_blocks, dtype=np.uint64))


def key(name: int) -> BlockKey:
    return BlockKey(name.to_bytes(16, "big"))


def chain(pool: BlockAllocator, names: list[int], parent: int | None = None) -> list[int]:
    """Allocates and commits a chain of blocks under these keys."""
    allocation = pool.allocate(len(names))
    assert allocation is not None
    for name, block in zip(names, allocation.blocks, strict=True):
        assert pool.commit(block, key(name), parent) is CommitOutcome.INDEXED
        parent = block
    return allocation.blocks


def test_allocation_is_all_or_nothing() -> None:
    pool = make(4)
    first = pool.allocate(3)
    assert first is not None
    assert pool.allocate(2) is None
    assert (pool.free, pool.used) == (1, 3)
    pool.release(first.blocks)
    assert (pool.free, pool.used, pool.cached) == (4, 0, 0)
    assert pool.violations() == ()


def test_released_blocks_stay_findable_until_room_is_needed() -> None:
    pool = make(4)
    blocks = chain(pool, [1, 2, 3])
    pool.release(blocks)
    assert pool.cached == 3
    assert pool.match_prefix([key(1), key(2), key(9)]) == blocks[:2]
    allocation = pool.allocate(2)
    assert allocation is not None
    # One block was free; of the chain the leaf goes, not its root.
    assert allocation.evicted == [key(3)]
    assert pool.match_prefix([key(1), key(2), key(3)]) == blocks[:2]


def test_among_leaves_the_least_recently_used_goes_first() -> None:
    pool = make(4)
    old, young = chain(pool, [1, 2]), chain(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    pool.acquire(old)
    pool.release(old)  # used again: now the other chain is older
    evicted = [pool.allocate(1).evicted for _ in range(4)]  # type: ignore[union-attr]
    assert evicted == [[key(4)], [key(3)], [key(2)], [key(1)]]


def test_a_referenced_block_keeps_its_cached_parents() -> None:
    """A pin on the last block alone: its parents are cached, but cannot be evicted before it."""
    pool = make(3)
    blocks = chain(pool, [1, 2, 3])
    pool.acquire(blocks[2:])
    pool.release(blocks)
    assert (pool.cached, pool.available) == (2, 0)
    assert pool.allocate(1) is None
    assert pool.violations() == ()
    pool.release(blocks[2:])
    assert pool.available == 3
    assert pool.allocate(3) is not None


def test_a_key_has_one_block() -> None:
    pool = make(4)
    first = chain(pool, [1])
    second = pool.allocate(1)
    assert second is not None
    assert pool.commit(second.blocks[0], key(1), None) is CommitOutcome.DUPLICATE
    pool.release(second.blocks)  # private: free at once
    assert (pool.free, pool.match_prefix([key(1)])) == (3, first)


def test_generations_rise_when_content_is_given_up() -> None:
    pool = make(2)
    blocks = chain(pool, [1])
    other = pool.allocate(1)
    assert other is not None
    before = pool.generations.copy()
    pool.release(blocks)  # cached: its content stays
    assert pool.generations.tolist() == before.tolist()
    pool.release(other.blocks)  # private: given up
    assert pool.generations[other.blocks[0]] == before[other.blocks[0]] + 1
    pool.allocate(2)  # evicts the cached one
    assert pool.generations[blocks[0]] == before[blocks[0]] + 1


def test_forgetting_takes_descendants_and_leaves_owners_alone() -> None:
    pool = make(6)
    trunk = chain(pool, [1, 2])
    branch = chain(pool, [3], parent=trunk[1])
    other = chain(pool, [4], parent=trunk[0])
    pool.release(trunk + branch)
    generation = int(pool.generations[branch[0]])
    pool.release(other)
    pool.acquire([*trunk, *branch])
    assert set(pool.forget([key(2), key(9)])) == {key(2), key(3)}
    assert pool.match_prefix([key(1), key(2)]) == trunk[:1]
    assert pool.match_prefix([key(1), key(4)]) == [trunk[0], other[0]]
    assert pool.generations[branch[0]] == generation  # still owned
    assert pool.violations() == ()
    # What is computed on top of a forgotten block is not findable either.
    more = pool.allocate(1)
    assert more is not None
    assert pool.commit(more.blocks[0], key(5), trunk[1]) is CommitOutcome.ORPHAN
    pool.release(trunk + branch + more.blocks)
    assert pool.generations[branch[0]] == generation + 1
    assert (pool.used, pool.cached) == (0, 2)
    assert pool.violations() == ()


def test_flush_keeps_what_is_in_use() -> None:
    pool = make(6)
    used, idle = chain(pool, [1, 2]), chain(pool, [3, 4])
    pool.release(idle)
    assert sorted(pool.flush()) == [key(3), key(4)]
    assert pool.match_prefix([key(1), key(2)]) == used
    assert (pool.free, pool.indexed) == (4, 2)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_breaks_no_invariant(seed: int) -> None:
    """Owners take prefixes, extend them, pin, forget and release, in any order."""
    print("seed", seed)
    rng = random.Random(seed)
    pool = make(rng.randrange(3, 24))
    owners: list[tuple[list[int], list[BlockKey]]] = []
    pins: list[list[int]] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.4:
            path = [rng.randrange(2) for _ in range(rng.randrange(1, 7))]
            keys = [key(int("1" + "".join(map(str, path[: i + 1])), 2)) for i in range(len(path))]
            hits = pool.match_prefix(keys)
            pool.acquire(hits)
            available = pool.available
            allocation = pool.allocate(len(keys) - len(hits))
            assert (allocation is not None) == (available >= len(keys) - len(hits))
            if allocation is None:
                pool.release(hits)
                continue
            blocks = hits + allocation.blocks
            for i in range(len(hits), rng.randrange(len(hits), len(keys) + 1)):
                pool.commit(blocks[i], keys[i], blocks[i - 1] if i else None)
            owners.append((blocks, keys))
        elif action < 0.7 and owners:
            pool.release(owners.pop(rng.randrange(len(owners)))[0])
        elif action < 0.8 and owners:
            block = rng.choice(rng.choice(owners)[0])
            pool.acquire([block])
            pins.append([block])
        elif action < 0.9 and pins:
            pool.release(pins.pop(rng.randrange(len(pins))))
        elif action < 0.96 and owners:
            forgotten = rng.choice(rng.choice(owners)[1])
            pool.forget([forgotten])
            assert pool.lookup(forgotten) is None
        elif action > 0.99:
            pool.flush()
        assert pool.violations() == ()
    for blocks, _ in owners:
        pool.release(blocks)
    for pin in pins:
        pool.release(pin)
    assert pool.available == pool.num_blocks
    assert pool.allocate(pool.num_blocks) is not None
    assert pool.violations() == ()


def test_many_uses_of_the_same_blocks_do_not_pile_up() -> None:
    pool = make(4)
    blocks = chain(pool, [1, 2])
    pool.release(blocks)
    for _ in range(2000):
        pool.acquire(blocks)
        pool.release(blocks)
    assert len(pool._leaves) < 200
    assert pool.violations() == ()
