"""Everything at once, from a seed: any mix of jobs, lenders, failures and memory pressure.

Around one engine with a tiny pool stand scripted peers: they submit, cancel, fill imports and tier
reads (rightly, partly, or not at all), copy write-backs, hold prefilled blocks and read them late,
forget and flush. Blocks that nobody refers to are overwritten with garbage after every turn, and so
are blocks that the engine lent and has not got back. Every stream must still be the model's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from engine_world import KEYS, MODEL, ROOT, BrokenStep, World

from pdserve.engine.api import (
    BlocksReady,
    Cancel,
    Cleared,
    Event,
    Failed,
    FlushDevice,
    Forget,
    ImportDone,
    ImportFailed,
    Job,
    Release,
    Removed,
    Reserved,
    SeqId,
    Stored,
    TierRead,
    TierReadDone,
    Tokens,
    Unpin,
    WriteBack,
)
from pdserve.errors import Cancelled, ContextTooLong, DeadlineExceeded
from pdserve.types import BlockKey, FinishReason, Tier

GONE = Cancelled("changed its mind")


@dataclass
class Peers:
    """Plays every part around the engine. ``debts`` are answers that are still to be given."""

    world: World
    rng: random.Random
    seen: int = 0
    debts: list[TierRead | Reserved | WriteBack | SeqId] = field(default_factory=list)
    slow_tier: dict[BlockKey, tuple[Tier, np.ndarray]] = field(default_factory=dict)
    indexed: set[BlockKey] = field(default_factory=set)
    offered: dict[SeqId, list[int]] = field(default_factory=dict)
    gave_up: set[SeqId] = field(default_factory=set)
    damaged: set[tuple[SeqId, BlockKey]] = field(default_factory=set)
    ended: set[SeqId] = field(default_factory=set)
    families: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.families = [
            [self.rng.randrange(MODEL.vocab_size) for _ in range(60)] for _ in range(3)
        ]

    # ---- what comes out of the engine ------------------------------------------------------------

    def listen(self) -> None:
        new, self.seen = self.world.events[self.seen :], len(self.world.events)
        for event in new:
            self._hear(event)
        # What was offered must be right, unless the sequence was failed in the same turn.
        failed = {event.seq for event in new if isinstance(event, Failed)}
        for seq in {event.seq for event in new if isinstance(event, BlocksReady)} - failed:
            self._check_offer(seq)

    def _hear(self, event: Event) -> None:
        seq = getattr(event, "seq", None)
        assert seq not in self.ended, f"{event} after the ending"
        if isinstance(event, Failed) or (
            isinstance(event, Tokens)
            and (event.finish or self.world.submitted[event.seq].job is Job.PREFILL)
        ):
            self.ended.add(event.seq)
        match event:
            case TierRead() | WriteBack():
                self.debts.append(event)
            case Reserved(_, _, blocks, _):
                # One that crossed an early ImportFailed has been answered already.
                if seq not in self.gave_up:
                    self.debts.append(event)
                assert len(set(blocks)) == len(blocks)
            case BlocksReady(seq, first, blocks, _):
                known = self.offered.setdefault(seq, [])
                assert len(known) == first
                known += blocks
            case Tokens(seq) if self.world.submitted[seq].job is Job.PREFILL:
                if seq in self.offered:
                    self.debts.append(seq)
            case Stored(keys, parent, token_ids, size):
                assert parent is None or parent in self.indexed
                assert not self.indexed & set(keys)
                assert len(token_ids) == len(keys) * size
                assert KEYS.chain(parent or ROOT, token_ids, size) == keys
                self.indexed.update(keys)
            case Removed(keys):
                assert self.indexed >= set(keys)
                self.indexed -= set(keys)
            case Cleared():
                self.indexed.clear()
            case _:
                pass

    def _check_offer(self, seq: SeqId) -> None:
        tokens = self.world.submitted[seq].tokens.token_ids
        for index, block in enumerate(self.offered[seq]):
            assert self.world.holds(block, tokens, index), f"block {index} of an offer is wrong"

    # ---- what goes in ----------------------------------------------------------------------------

    def act(self) -> None:
        rng, world = self.rng, self.world
        if rng.random() < 0.35:
            self.submit()
        if rng.random() < 0.6 and self.debts:
            self.settle(self.debts.pop(rng.randrange(len(self.debts))))
        if rng.random() < 0.06 and world.submitted:
            seq = rng.choice(list(world.submitted))
            # A prefill whose ending came is released by its debt, after a last look at the blocks.
            if seq not in self.debts:
                world.post(Cancel(seq, GONE))
        if rng.random() < 0.03 and world.submitted:
            imports = [s for s, each in world.submitted.items() if each.job is Job.IMPORT]
            lent = {each.seq for each in self.debts if isinstance(each, Reserved)}
            early = [seq for seq in imports if seq not in lent]
            if early:
                seq = rng.choice(early)
                self.gave_up.add(seq)
                world.post(ImportFailed(seq, 0))
        if rng.random() < 0.03 and self.indexed:
            self.forget(rng.choice(sorted(self.indexed)))
        reads = [debt for debt in self.debts if isinstance(debt, TierRead)]
        if rng.random() < 0.1 and reads:
            self.forget(rng.choice(rng.choice(reads).keys))
        if rng.random() < 0.01:
            world.post(FlushDevice())
        world.now += rng.random()

    def submit(self) -> None:
        rng, world = self.rng, self.world
        family = rng.choice(self.families)
        tokens = family[: rng.randrange(1, 40)]
        if rng.random() < 0.3:
            tokens = tokens + [rng.randrange(MODEL.vocab_size) for _ in range(rng.randrange(4))]
        seq = world.submit(
            tokens,
            rng.choice([Job.GENERATE, Job.GENERATE, Job.IMPORT, Job.PREFILL]),
            max_tokens=rng.choice([1, 2, 5, 20, 60]),
            generated=min(rng.choice([0, 0, 0, 3]), len(tokens) - 1),
            priority=rng.choice([0, 0, 0, 1, -1]),
            deadline=world.now + rng.choice([5.0, 100.0, float("inf")]),
            bypass=rng.random() < 0.1,
            min_tokens=rng.choice([0, 0, 6]),
            stop_token_ids=tuple(rng.sample(range(MODEL.vocab_size), rng.choice([0, 2, 20]))),
            prompt_logprobs=1 if rng.random() < 0.1 else None,
        )
        assert world.submitted[seq]

    def forget(self, key: BlockKey) -> None:
        """The block is damaged everywhere. Whoever reads it already may still deliver it so."""
        self.world.post(Forget((key,)))
        if self.slow_tier.pop(key, None) is not None:
            reads = [debt for debt in self.debts if isinstance(debt, TierRead)]
            self.damaged |= {(read.seq, key) for read in reads if key in read.keys}

    def settle(self, debt: TierRead | Reserved | WriteBack | SeqId) -> None:
        match debt:
            case TierRead():
                self._read_tiers(debt)
            case Reserved():
                self._import(debt)
            case WriteBack(ticket, keys, blocks):
                for key, block in zip(keys, blocks, strict=True):
                    tier = self.rng.choice([Tier.HOST, Tier.REDIS])
                    self.slow_tier[key] = (tier, self.world.words[block].copy())
                self.world.post(Unpin(ticket))
            case _:
                self._check_offer(debt)
                self.world.post(Release(debt))

    def _read_tiers(self, read: TierRead) -> None:
        hits: list[Tier | None] = []
        for key, block in zip(read.keys, read.blocks, strict=True):
            stored = self.slow_tier.get(key) if self.rng.random() < 0.9 else None
            if (read.seq, key) in self.damaged and None not in hits:
                self.world.scribble(block, self.rng)
                hits.append(Tier.HOST)
            elif stored is None or None in hits:
                self.world.scribble(block, self.rng)
                hits.append(None)
            else:
                self.world.words[block] = stored[1]
                hits.append(stored[0])
        self.damaged -= {(read.seq, key) for key in read.keys}
        self.world.post(TierReadDone(read.seq, tuple(hits)))

    def _import(self, reserved: Reserved) -> None:
        submit = self.world.submitted[reserved.seq]
        tokens = submit.tokens.token_ids
        wanted = len(reserved.blocks)
        valid = wanted if self.rng.random() < 0.7 else self.rng.randrange(wanted + 1)
        for index, block in enumerate(reserved.blocks):
            if index < valid:
                self.world.fill(block, tokens, reserved.first_wanted + index)
            else:
                self.world.scribble(block, self.rng)
        if valid < wanted:
            self.world.post(ImportFailed(reserved.seq, valid))
            return
        token = MODEL.next_token(MODEL.context(tokens), submit.sampling, submit.tokens.generated)
        generated = submit.tokens.generated + 1
        finish = None
        if token.token_id in submit.sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif generated >= submit.sampling.max_tokens and self.rng.random() < 0.5:
            finish = FinishReason.LENGTH
        self.world.post(ImportDone(reserved.seq, token, finish))

    def scribble(self) -> None:
        """Garbage wherever nobody may rely on the content."""
        pool = self.world.engine._scheduler.kv.pool
        for block in range(self.world.num_blocks):
            if pool.references(block) == 0 and not pool.is_indexed(block):
                self.world.scribble(block, self.rng)
        for debt in self.debts:
            if isinstance(debt, TierRead | Reserved):
                for block in debt.blocks:
                    self.world.scribble(block, self.rng)

    def check(self) -> None:
        pool = self.world.engine._scheduler.kv.pool
        assert set(pool._index) == self.indexed
        for block in range(self.world.num_blocks):
            assert pool.references(block) >= 0
        assert self.world.engine._scheduler.board.violations() == ()


def play(seed: int, turns: int) -> Peers:
    rng = random.Random(seed)
    world = World(
        num_blocks=rng.choice([10, 12, 16, 24]),
        has_tiers=rng.random() < 0.6,
        max_model_len=rng.choice([50, 200]),
        step_tokens=rng.choice([5, 16, 64]),
        prefill_chunk=rng.choice([3, 8, 64]),
        max_running=rng.choice([2, 4, 8]),
    )
    world.runner.rng = rng
    world.runner.chance = rng.choice([0.0, 0.03])
    peers = Peers(world, rng)
    for _ in range(turns):
        peers.act()
        world.turn()
        peers.listen()
        peers.scribble()
        peers.check()
    for _ in range(3000):
        while peers.debts:
            peers.settle(peers.debts.pop())
        world.turn()
        peers.listen()
        counts = world.engine.snapshot()
        if counts.idle and not peers.debts:
            break
    return peers


def judge(peers: Peers) -> dict[str, int]:
    """Each submission ended once, with the right tokens; returns what came to pass."""
    world = peers.world
    story = dict.fromkeys(("finished", "failed", "preempted", "device", "host", "redis"), 0)
    for seq, submit in world.submitted.items():
        failed = world.of(Failed, seq)
        for event in failed:
            assert type(event.error) in {Cancelled, ContextTooLong, DeadlineExceeded} or isinstance(
                event.error.__cause__, BrokenStep
            ), event.error
        events = world.of(Tokens, seq)
        stream, expected = world.stream(seq), world.expected(seq)
        story["failed"] += len(failed)
        if submit.job is Job.PREFILL:
            assert len(failed) + len(events) == 1
            assert stream == expected[: len(stream)]
            continue
        assert len(world.endings(seq)) == 1
        if failed:
            assert stream == expected[: len(stream)]
            continue
        story["finished"] += 1
        assert stream == expected
        last = events[-1]
        stopped = bool(stream) and stream[-1] in submit.sampling.stop_token_ids
        assert last.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH) or not stream
        assert last.cached.total <= submit.tokens.prompt_len
        story["preempted"] += last.preemptions
        for tier in Tier:
            story[tier.value] += getattr(last.cached, tier.value) > 0
    return story


@pytest.mark.parametrize("seed", range(30))
def test_streams_stay_right_and_nothing_is_left_behind(seed: int) -> None:
    print("seed", seed)
    peers = play(seed, turns=150)
    print(judge(peers))
    peers.world.assert_quiet()
    assert peers.indexed == set(peers.world.engine._scheduler.kv.pool._index)


def test_the_random_stories_cover_what_they_are_for() -> None:
    total: dict[str, int] = {}
    for seed in range(100, 106):
        for name, count in judge(play(seed, turns=150)).items():
            total[name] = total.get(name, 0) + count
    print(total)
    assert all(count >= 3 for count in total.values()), total
