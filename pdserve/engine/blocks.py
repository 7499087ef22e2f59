"""Which block holds what: reference counts, the prefix index, and eviction. Torch-free.

Life of a block:

    FREE --allocate--> USED --release--> FREE                         (no key: nobody can find it)
                       USED --commit---> USED, indexed
                                         --release--> CACHED --acquire--> USED, indexed
                                                      CACHED --evict, forget, flush--> FREE

The index is a forest: a block's parent holds the tokens before its own. What is indexed can be
reached from a root, so a block never leaves the index before its children do: eviction takes
leaves, least recently used first, and ``forget`` takes whole subtrees.

An indexed block is *live* while it or any of its descendants is referenced; cached blocks that are
not live are what eviction can reach. Owners hold whole prefixes, so a parent is nearly always live
by its own reference and keeping the count costs O(1) per change; a walk up the parents happens
only where a block outlives its parent's last reference (a pin, for example).

``generations[block]`` is raised whenever a block's content is given up, before anyone can write to
it again: a peer that copied the block compares the number before and after.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdserve.types import BlockKey

NO_BLOCK = -1


class CommitOutcome(enum.Enum):
    INDEXED = "indexed"
    DUPLICATE = "duplicate"  # another block has the key; this one stays private
    ORPHAN = "orphan"  # the parent is not indexed (it was forgotten); this one stays private


@dataclass(frozen=True, slots=True)
class Allocation:
    blocks: list[int]
    evicted: list[BlockKey]  # left the index to make room


class BlockAllocator:
    """All blocks of one pool. Owned by the engine's thread.

    ``generations``: uint64 [num_blocks], written in place.
    """

    def __init__(self, num_blocks: int, generations: npt.NDArray[np.uint64]) -> None:
        assert num_blocks > 0
        assert len(generations) >= num_blocks
        self.num_blocks = num_blocks
        self.generations = generations
        # Counts whatever may have made room; lets a caller skip a retry that cannot succeed.
        self.version = 0
        self._refs = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._parents = [NO_BLOCK] * num_blocks
        self._live_children = [0] * num_blocks
        self._last_used = [0] * num_blocks
        self._children: dict[int, set[int]] = {}  # indexed children; no entry when there are none
        self._index: dict[BlockKey, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached = 0
        self._evictable = 0
        # (last used, block) of every cached leaf, and entries that are true no longer.
        self._leaves: list[tuple[int, int]] = []
        self._clock = 0

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        """Blocks in the index that nothing refers to."""
        return self._cached

    @property
    def used(self) -> int:
        return self.num_blocks - len(self._free) - self._cached

    @property
    def available(self) -> int:
        """How many blocks ``allocate`` can give."""
        return len(self._free) + self._evictable

    def lookup(self, key: BlockKey) -> int | None:
        return self._index.get(key)

    def is_indexed(self, block: int) -> bool:
        return self._keys[block] is not None

    def references(self, block: int) -> int:
        return self._refs[block]

    def match_prefix(self, keys: Iterable[BlockKey]) -> list[int]:
        """Blocks of the longest prefix of ``keys`` that is indexed. Takes no reference."""
        blocks = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    # ---- references ------------------------------------------------------------------------------

    def allocate(self, count: int) -> Allocation | None:
        """``count`` private blocks with one reference each, or None and nothing changed."""
        if count > self.available:
            return None
        evicted = [self._evict() for _ in range(count - len(self._free))]
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return Allocation(blocks, evicted)

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each (indexed or used) block; first to last of a prefix."""
        for block in blocks:
            self._refs[block] += 1
            if self._refs[block] == 1:
                assert self._keys[block] is not None, "a free block has no content to refer to"
                self._cached -= 1
                if not self._live_children[block]:
                    self._became_live(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference of each; the last of a prefix goes first, so it is evicted first."""
        self.version += 1
        for block in reversed(blocks):
            assert self._refs[block] > 0, "released more often than acquired"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._keys[block] is None:
                self._to_free(block)
                continue
            self._cached += 1
            self._clock += 1
            self._last_used[block] = self._clock
            if not self._live_children[block]:
                self._became_evictable(block)
            self._offer_leaf(block)

    # ---- index -----------------------------------------------------------------------------------

    def commit(self, block: int, key: BlockKey, parent: int | None) -> CommitOutcome:
        """Makes a used private block findable. ``parent``: the block before it, None at the root.

        A block whose parent is not indexed could not be found, and one that was computed on top of
        a forgotten block is as suspect as that one; it stays private.
        """
        assert self._refs[block] > 0, "only an owner commits"
        assert self._keys[block] is None, "committed twice"
        if parent is not None and self._keys[parent] is None:
            return CommitOutcome.ORPHAN
        if key in self._index:
            return CommitOutcome.DUPLICATE
        self._index[key] = block
        self._keys[block] = key
        if parent is not None:
            self._parents[block] = parent
            self._children.setdefault(parent, set()).add(block)
            self._add_live_child(parent)
        return CommitOutcome.INDEXED

    def forget(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Takes ``keys`` and all their descendants out of the index; returns what left it.

        A block that is still referenced stays with its owners; the others become free.
        """
        removed: list[BlockKey] = []
        for key in keys:
            block = self._index.get(key)
            if block is not None:
                removed += [self._unindex(each) for each in self._subtree(block)]
        self.version += 1
        return removed

    def flush(self) -> list[BlockKey]:
        """Frees every cached block that has no referenced descendant; returns their keys."""
        self.version += 1
        return [self._evict() for _ in range(self._evictable)]

    @property
    def indexed(self) -> int:
        return len(self._index)

    # ---- inside ----------------------------------------------------------------------------------

    def _subtree(self, root: int) -> list[int]:
        """A block and its indexed descendants, children before parents."""
        order = [root]
        for block in order:  # grows while it is walked
            order.extend(self._children.get(block, ()))
        order.reverse()
        return order

    def _unindex(self, block: int) -> BlockKey:
        """Takes a block without indexed children out of the index."""
        key = self._keys[block]
        assert key is not None
        assert block not in self._children
        del self._index[key]
        self._keys[block] = None
        parent = self._parents[block]
        self._parents[block] = NO_BLOCK
        used = self._refs[block] > 0
        if not used:
            self._evictable -= 1
            self._cached -= 1
            self._to_free(block)
        if parent != NO_BLOCK:
            siblings = self._children[parent]
            siblings.remove(block)
            if not siblings:
                del self._children[parent]
            if used:
                self._drop_live_child(parent)
            self._offer_leaf(parent)
        return key

    def _evict(self) -> BlockKey:
        while True:
            last_used, block = heapq.heappop(self._leaves)
            if self._last_used[block] == last_used and self._is_cached_leaf(block):
                return self._unindex(block)

    def _is_cached_leaf(self, block: int) -> bool:
        return (
            self._refs[block] == 0 and self._keys[block] is not None and block not in self._children
        )

    def _offer_leaf(self, block: int) -> None:
        if not self._is_cached_leaf(block):
            return
        if len(self._leaves) > 2 * self.num_blocks + 64:
            # Mostly outdated entries: keep the true ones, one each.
            self._leaves = [
                (self._last_used[each], each)
                for each in range(self.num_blocks)
                if each != block and self._is_cached_leaf(each)
            ]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (self._last_used[block], block))

    def _to_free(self, block: int) -> None:
        self.generations[block] += np.uint64(1)
        self._free.append(block)

    def _became_live(self, block: int) -> None:
        self._evictable -= 1
        if self._parents[block] != NO_BLOCK:
            self._add_live_child(self._parents[block])

    def _became_evictable(self, block: int) -> None:
        self._evictable += 1
        if self._parents[block] != NO_BLOCK:
            self._drop_live_child(self._parents[block])

    def _add_live_child(self, block: int) -> None:
        while block != NO_BLOCK:
            was_live = self._refs[block] > 0 or self._live_children[block] > 0
            self._live_children[block] += 1
            if was_live:
                return
            self._evictable -= 1
            block = self._parents[block]

    def _drop_live_child(self, block: int) -> None:
        while block != NO_BLOCK:
            self._live_children[block] -= 1
            if self._refs[block] > 0 or self._live_children[block] > 0:
                return
            self._evictable += 1
            block = self._parents[block]

    # ---- self-check ------------------------------------------------------------------------------

    def violations(self) -> tuple[str, ...]:
        """Every broken invariant, in words; O(blocks), meant for idle moments and tests."""
        found: list[str] = []
        free = set(self._free)
        if len(free) != len(self._free):
            found.append("a block is in the free list twice")
        leaves = set(self._leaves)
        live = self._recount_live(found)
        cached = evictable = 0
        for block in range(self.num_blocks):
            key, refs = self._keys[block], self._refs[block]
            if refs < 0:
                found.append(f"block {block} has {refs} references")
            if (block in free) != (refs == 0 and key is None):
                found.append(f"block {block} is lost: refs {refs}, free {block in free}")
            if key is None:
                if block in self._children or self._parents[block] != NO_BLOCK:
                    found.append(f"block {block} has relatives without being indexed")
                continue
            if self._index.get(key) != block:
                found.append(f"block {block} has a key that the index gives to another")
            if refs == 0:
                cached += 1
                evictable += not live[block]
                leaf = block not in self._children
                if leaf and (self._last_used[block], block) not in leaves:
                    found.append(f"cached leaf {block} is unknown to eviction")
        if len(self._index) != sum(key is not None for key in self._keys):
            found.append("the index and the blocks' keys differ in number")
        if (cached, evictable) != (self._cached, self._evictable):
            found.append(
                f"counted {self._cached} cached, {self._evictable} evictable; "
                f"there are {cached}, {evictable}"
            )
        return tuple(found)

    def _recount_live(self, found: list[str]) -> list[int]:
        """How many live children each block has, counted anew; compares them and the links."""
        counts = [0] * self.num_blocks
        roots = [
            block
            for block in range(self.num_blocks)
            if self._keys[block] is not None and self._parents[block] == NO_BLOCK
        ]
        for root in roots:
            for block in self._subtree(root):
                for child in self._children.get(block, ()):
                    if self._parents[child] != block:
                        found.append(f"block {child} does not know its parent {block}")
                    counts[block] += self._refs[child] > 0 or counts[child] > 0
        if counts != self._live_children:
            found.append("the counts of live children are wrong")
        return counts
