"""The blocks of sequences: reserve, commit, share, write back, release; and the events about them.

Every change of a sequence's blocks goes through here, so that the events (Stored, Removed,
WriteBack) come in the order of what happened, and references always add up.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdserve.engine.api import (
    BlockHasher,
    BlockId,
    Cleared,
    Event,
    Forgotten,
    Job,
    PinTicket,
    Removed,
    Stored,
    WriteBack,
)
from pdserve.engine.blocks import BlockAllocator, CommitOutcome
from pdserve.engine.limits import Limits
from pdserve.engine.sequence import Sequence
from pdserve.types import BlockKey, Tier

# Write-back may pin one block in so many of the pool, and only while as large a share is to be had.
PIN_SHARE = 4
SPARE_SHARE = 8


class Origin(enum.Enum):
    """Where a block's KV came from, which says which slower tiers may lack it."""

    NEW = "new"  # here
    PEER = "peer"  # a peer computed it just now, and writes it to what all workers share
    TIER = "tier"


@dataclass(frozen=True, slots=True)
class _Fresh:
    """A block that is to be offered to the slower tiers in this step, most often just committed."""

    key: BlockKey
    block: int
    origin: Origin


class KvBook:
    """Owns the allocator. Events are appended to ``events``, which the caller owns."""

    def __init__(
        self,
        limits: Limits,
        generations: npt.NDArray[np.uint64],
        hasher: BlockHasher,
        has_tiers: bool,
        events: list[Event],
    ) -> None:
        self.limits = limits
        self.pool = BlockAllocator(limits.num_blocks, generations)
        self.has_tiers = has_tiers
        self._hasher = hasher
        self._events = events
        self._pins: dict[PinTicket, list[int]] = {}
        self._pinned = 0
        self._tickets = 0
        self._fresh: list[_Fresh] = []
        # New ones for which there was no room. If they turn out to be of use they are offered then.
        self._passed_over: dict[int, _Fresh] = {}

    @property
    def pinned(self) -> int:
        return self._pinned

    # ---- reservations ----------------------------------------------------------------------------

    def cacheable(self, seq: Sequence) -> int:
        """How many of the first blocks may come from a cache.

        The last token is computed here, to know what follows it; a peer does that for an IMPORT.
        """
        if not seq.caches:
            return 0
        tokens = seq.known if seq.job is Job.IMPORT else seq.known - 1
        return tokens // self.limits.block_size

    def reserve(self, seq: Sequence, spare: int) -> bool:
        """Blocks for every known token, or none at all.

        ``spare``: so many blocks must stay available, for running sequences to grow into.
        """
        size = self.limits.block_size
        seq.extend_keys(self._hasher, size)
        total = self.limits.blocks_for(seq.known)
        if seq.job is Job.IMPORT:
            total = min(total + 1, self.limits.num_blocks)
        hits = self.pool.match_prefix(seq.keys[: self.cacheable(seq)])
        self.pool.acquire(hits)
        need = total - len(hits)
        allocation = self.pool.allocate(need) if self.pool.available >= need + spare else None
        if allocation is None:
            self.pool.release(hits)
            return False
        self._removed(allocation.evicted)
        self._offer_again(hits)
        seq.add_blocks(hits)
        seq.add_blocks(allocation.blocks)
        seq.committed = len(hits)
        seq.computed = len(hits) * size
        self._credit(seq, Tier.DEVICE, 0, len(hits))
        return True

    def grow(self, seq: Sequence) -> bool:
        """One more block; False when none is to be had."""
        allocation = self.pool.allocate(1)
        if allocation is None:
            return False
        self._removed(allocation.evicted)
        seq.add_blocks(allocation.blocks)
        return True

    def release(self, seq: Sequence) -> None:
        """All blocks of a sequence; what it committed stays cached."""
        self.pool.release(seq.drop_blocks())

    def own_next_block(self, seq: Sequence) -> bool:
        """Makes the block of the next token to compute private; False when none is to be had.

        It can be a shared one only for an IMPORT whose whole prompt was found here and whose last
        token must be computed here after all.
        """
        index = seq.computed // self.limits.block_size
        if not self.pool.is_indexed(seq.blocks[index]):
            return True
        seq.committed = min(seq.committed, index)
        seq.sources.pop(index, None)
        if index + 1 < len(seq.blocks):
            self.pool.release([seq.replace_block(index, seq.pop_block())])
            return True
        self.pool.release([seq.pop_block()])
        return self.grow(seq)

    # ---- sharing ---------------------------------------------------------------------------------

    def commit(self, seq: Sequence, upto: int, origin: Origin = Origin.NEW) -> None:
        """Indexes the blocks before ``upto``, which hold final KV; shares those already indexed."""
        if not seq.caches or not seq.chained:
            return
        seq.extend_keys(self._hasher, self.limits.block_size)
        first = seq.committed  # of the run that the next Stored names
        while seq.committed < upto:
            index = seq.committed
            block, key = seq.blocks[index], seq.keys[index]
            outcome = self.pool.commit(block, key, seq.blocks[index - 1] if index else None)
            if outcome is CommitOutcome.ORPHAN:
                seq.chained = False
                break
            if outcome is CommitOutcome.DUPLICATE:
                self._stored(seq, first, index)
                self._share(seq, index, key)
                first = index + 1
            elif self.has_tiers and origin is not Origin.TIER:
                self._fresh.append(_Fresh(key, block, origin))
            seq.committed += 1
        self._stored(seq, first, seq.committed)

    def adopt(self, seq: Sequence) -> int:
        """Takes over what another sequence computed since this one was admitted.

        Returns the number of blocks that need not be computed any more.
        """
        size = self.limits.block_size
        first = seq.committed
        if not seq.chained or seq.computed != first * size or first >= self.cacheable(seq):
            return 0
        if self.pool.lookup(seq.keys[first]) is None:
            return 0
        if first and not self.pool.is_indexed(seq.blocks[first - 1]):
            return 0  # forgotten meanwhile
        found = self.pool.match_prefix(seq.keys[first : self.cacheable(seq)])
        for key in seq.keys[first : first + len(found)]:
            self._share(seq, seq.committed, key)
            seq.committed += 1
            seq.computed += size
        self._credit(seq, Tier.DEVICE, first, len(found))
        return len(found)

    def fill_from_tiers(self, seq: Sequence, hits: Iterable[Tier | None]) -> None:
        """The lent blocks that a tier filled: the leading ones of ``hits`` that are not None.

        Those that were forgotten meanwhile are computed.
        """
        end = seq.trusted(self.cacheable(seq))
        index = seq.first_lent
        for tier in hits:
            if tier is None or index >= end:
                break
            self._credit(seq, tier, index, 1)
            index += 1
        seq.computed = index * self.limits.block_size
        self.commit(seq, index, Origin.TIER)

    def _share(self, seq: Sequence, index: int, key: BlockKey) -> None:
        """Swaps a private block for the indexed one of the same content."""
        block = self.pool.lookup(key)
        assert block is not None
        self.pool.acquire([block])
        self.pool.release([seq.replace_block(index, block)])

    def _credit(self, seq: Sequence, tier: Tier, first: int, count: int) -> None:
        # After a preemption the sequence finds its own blocks; that is no saving.
        if not seq.preemptions:
            seq.sources.update(dict.fromkeys(range(first, first + count), tier))

    # ---- write-back ------------------------------------------------------------------------------

    def write_back(self) -> None:
        """Offers what this step committed to the slower tiers, as far as pins are allowed."""
        if not self._fresh:
            return
        room = self.limits.num_blocks // PIN_SHARE - self._pinned
        if self.pool.available < self.limits.num_blocks // SPARE_SHARE:
            room = 0
        room = max(room, 0)
        # Nobody else writes what is new.
        self._fresh.sort(key=lambda each: each.origin is Origin.PEER)
        chosen = [each for each in self._fresh[:room] if self._holds(each)]
        rest = (each for each in self._fresh[room:] if each.origin is Origin.NEW)
        for each in chosen:
            self._passed_over.pop(each.block, None)
        self._passed_over.update((each.block, each) for each in rest)
        self._fresh.clear()
        for origin in (Origin.NEW, Origin.PEER):
            self._offer([each for each in chosen if each.origin is origin], origin)

    def _offer_again(self, hits: Iterable[int]) -> None:
        """A block that stays in use is committed once, and would never be offered otherwise."""
        if self._passed_over:
            found = (self._passed_over.pop(block, None) for block in hits)
            self._fresh += [fresh for fresh in found if fresh is not None]

    def _offer(self, chosen: list[_Fresh], origin: Origin) -> None:
        if not chosen:
            return
        blocks = [each.block for each in chosen]
        self.pool.acquire(blocks)
        self._tickets += 1
        ticket = PinTicket(self._tickets)
        self._pins[ticket] = blocks
        self._pinned += len(blocks)
        self._events.append(
            WriteBack(
                ticket,
                keys=tuple(each.key for each in chosen),
                blocks=tuple(BlockId(block) for block in blocks),
                from_peer=origin is Origin.PEER,
            )
        )

    def _holds(self, fresh: _Fresh) -> bool:
        """It may have been forgotten in this step, or evicted since it was passed over."""
        return self.pool.lookup(fresh.key) == fresh.block

    def unpin(self, ticket: PinTicket) -> bool:
        blocks = self._pins.pop(ticket, None)
        if blocks is None:
            return False
        self._pinned -= len(blocks)
        self.pool.release(blocks)
        return True

    # ---- the index as a whole --------------------------------------------------------------------

    def forget(self, keys: tuple[BlockKey, ...]) -> None:
        removed = self.pool.forget(keys)
        self._removed(removed)
        # A slower tier may hold what this pool never had or has evicted.
        self._events.append(Forgotten(tuple(dict.fromkeys((*keys, *removed)))))

    def flush(self) -> int:
        """How many blocks became free."""
        removed = self.pool.flush()
        if self.pool.indexed:
            self._removed(removed)
        else:
            self._events.append(Cleared())
        return len(removed)

    def _removed(self, keys: list[BlockKey]) -> None:
        if keys:
            self._events.append(Removed(tuple(keys)))

    def _stored(self, seq: Sequence, first: int, end: int) -> None:
        if end <= first:
            return
        size = self.limits.block_size
        self._events.append(
            Stored(
                keys=tuple(seq.keys[first:end]),
                parent=seq.keys[first - 1] if first else None,
                token_ids=tuple(seq.tokens[first * size : end * size]),
                block_size=size,
            )
        )

    def violations(self, sequences: Iterable[Sequence]) -> tuple[str, ...]:
        """The pool's own, and references that no sequence and no pin accounts for."""
        expected = [0] * self.limits.num_blocks
        for seq in sequences:
            for block in seq.blocks:
                expected[block] += 1
        for blocks in self._pins.values():
            for block in blocks:
                expected[block] += 1
        wrong = tuple(
            f"block {block} has {self.pool.references(block)} references, {count} are known"
            for block, count in enumerate(expected)
            if self.pool.references(block) != count
        )
        return self.pool.violations() + wrong
