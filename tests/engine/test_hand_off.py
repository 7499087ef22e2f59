"""Stories of blocks that others fill or read: imports, tier reads, write-backs."""

from __future__ import annotations

import random

import pytest
from engine_world import KEYS, MODEL, ROOT, World, prompt

from pdserve.engine.api import (
    Admitted,
    Cancel,
    Failed,
    Forget,
    ImportDone,
    ImportFailed,
    Job,
    Reserved,
    SeqId,
    Stored,
    TierRead,
    TierReadDone,
    Tokens,
    Unpin,
    WriteBack,
)
from pdserve.errors import Cancelled, DeadlineExceeded, InternalError
from pdserve.types import BlockKey, CachedTokens, FinishReason, Sampling, Tier, TokenOut

GREEDY = Sampling(max_tokens=10, temperature=0.0)
GONE = Cancelled("the client went away")


def first_token(tokens: list[int]) -> TokenOut:
    return MODEL.next_token(MODEL.context(tokens), GREEDY, 0)


def receive(world: World, seq: SeqId, count: int | None = None) -> Reserved:
    """Writes the first ``count`` wanted blocks (None: all) as a peer would send them."""
    reserved = world.only(Reserved, seq)
    tokens = world.submitted[seq].tokens.token_ids
    for i, block in enumerate(reserved.blocks[:count]):
        world.fill(block, tokens, reserved.first_wanted + i)
    return reserved


@pytest.mark.parametrize("length", [1, 4, 7, 8, 21])
def test_an_import_goes_on_from_the_peers_first_token(length: int) -> None:
    world = World()
    tokens = prompt(length)
    seq = world.submit(tokens, Job.IMPORT, max_tokens=10)
    world.turn()
    reserved = receive(world, seq)
    assert (reserved.first_wanted, len(reserved.blocks)) == (0, -(-length // 4))
    assert world.inspect().receiving == 1
    world.post(ImportDone(seq, first_token(tokens)))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert world.of(Tokens, seq)[-1].cached == CachedTokens()
    world.assert_quiet()


def test_an_import_asks_for_what_is_missing_alone() -> None:
    world = World()
    tokens = prompt(16)
    for found in (0, 4):
        seq = world.submit(tokens, Job.IMPORT, max_tokens=3)
        world.turn()
        reserved = receive(world, seq)
        assert (reserved.first_wanted, len(reserved.blocks)) == (found, 4 - found)
        assert reserved.cached == CachedTokens(device=4 * found)
        world.post(ImportDone(seq, first_token(tokens)))
        world.run()
        assert world.stream(seq) == world.expected(seq)
        assert world.of(Tokens, seq)[-1].cached == CachedTokens(device=4 * found)
    world.assert_quiet()


@pytest.mark.parametrize("length", [16, 18])
@pytest.mark.parametrize("known", [0, 5, 16])
@pytest.mark.parametrize("valid", [0, 1, 4, 9])
def test_a_failed_import_is_computed_here(length: int, known: int, valid: int) -> None:
    world = World()
    rng = random.Random(1)
    tokens = prompt(length)
    if known:
        world.submit(tokens[:known], max_tokens=1)
        world.run()
    seq = world.submit(tokens, Job.IMPORT, max_tokens=6)
    world.turn()
    reserved = world.only(Reserved, seq)
    for block in reserved.blocks:
        world.scribble(block, rng)
    receive(world, seq, valid)
    world.post(ImportFailed(seq, valid))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    # What it computed is found by others, whose streams are right, too.
    again = world.submit(tokens, max_tokens=6)
    world.run()
    assert world.stream(again) == world.expected(again)
    world.assert_quiet()


def test_a_failed_import_of_a_prompt_found_whole_in_a_full_pool() -> None:
    """Its last token must be computed, and no private block is to be had for it at first."""
    world = World(num_blocks=4)
    tokens = prompt(16)
    first = world.submit(tokens, Job.IMPORT, max_tokens=1)
    world.turn()
    receive(world, first)
    world.post(ImportDone(first, first_token(tokens)))
    world.run()
    seq = world.submit(tokens, Job.IMPORT, max_tokens=5)
    world.turn()
    assert world.only(Reserved, seq).blocks == ()
    world.post(ImportFailed(seq, 0))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert len(world.stream(seq)) == 1  # the pool is full
    world.assert_quiet()


def test_a_hand_off_may_fail_or_end_before_blocks_are_reserved() -> None:
    world = World(num_blocks=6, has_tiers=True)
    blocker = world.submit(prompt(2), max_tokens=16)
    world.turn()
    failed = world.submit(prompt(18, 1), Job.IMPORT, max_tokens=2)
    ended = world.submit(prompt(18, 2), Job.IMPORT, max_tokens=1)
    fetching = world.submit(prompt(2, 3), Job.IMPORT, max_tokens=1)
    world.turn()
    assert world.of(Admitted, failed) == []
    world.post(ImportFailed(failed, 0))
    world.post(ImportDone(ended, first_token(prompt(18, 2)), FinishReason.LENGTH))
    world.post(ImportDone(fetching, TokenOut(3)))
    world.turn()
    assert world.only(Tokens, ended).finish is FinishReason.LENGTH
    assert type(world.only(Failed, fetching).error) is InternalError
    world.turn(40)
    world.post(TierReadDone(failed, (None,) * 4))
    world.run()
    for seq in (blocker, failed):
        assert world.stream(seq) == world.expected(seq)
    for event in world.of(WriteBack):
        world.post(Unpin(event.ticket))
    world.assert_quiet()


def test_blocks_that_are_written_to_are_not_freed_by_a_cancel() -> None:
    world = World(num_blocks=8)
    seq = world.submit(prompt(20), Job.IMPORT, deadline=9.0)
    world.turn()
    reserved = world.only(Reserved, seq)
    world.now = 9.0
    world.turn()
    assert type(world.only(Failed, seq).error) is DeadlineExceeded
    other = world.submit(prompt(30, 1), max_tokens=1)
    world.turn(5)
    assert world.of(Admitted, other) == []
    counts = world.inspect()
    assert (counts.blocks_used, counts.receiving, counts.idle) == (6, 0, False)
    rng = random.Random(2)
    for block in reserved.blocks:
        world.scribble(block, rng)
    world.post(TierReadDone(seq, (Tier.HOST,)))  # not the lender's word
    world.turn()
    assert world.of(Admitted, other) == []
    world.post(ImportFailed(seq, 0))
    world.run()
    assert world.stream(other) == world.expected(other)
    assert len(world.endings(seq)) == 1
    world.assert_quiet()


def test_a_tier_fills_a_prefix_and_the_rest_is_computed() -> None:
    world = World(has_tiers=True)
    rng = random.Random(3)
    tokens = prompt(18)
    seq = world.submit(tokens, max_tokens=4)
    world.turn()
    read = world.only(TierRead, seq)
    assert read.keys == KEYS.chain(ROOT, tokens, 4)
    assert len(read.blocks) == 4
    world.turn(3)
    assert world.of(Tokens, seq) == []
    for i in range(3):
        world.fill(read.blocks[i], tokens, i)
    world.scribble(read.blocks[3], rng)
    world.post(TierReadDone(seq, (Tier.HOST, Tier.HOST, Tier.REDIS, None)))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert world.of(Tokens, seq)[-1].cached == CachedTokens(host=8, redis=4)
    assert world.of(Stored)[0].keys == read.keys[:3]
    # What came from a tier is not written back to it; what was computed is, once.
    written = [key for event in world.of(WriteBack) for key in event.keys]
    assert written[:1] == [read.keys[3]]
    assert len(written) == len(set(written)) == 2
    assert world.inspect().pins == 2
    for event in world.of(WriteBack):
        world.post(Unpin(event.ticket))
    world.turn()
    world.assert_quiet()


def test_an_import_may_find_everything_in_a_tier() -> None:
    world = World(has_tiers=True)
    tokens = prompt(16)
    seq = world.submit(tokens, Job.IMPORT, max_tokens=3)
    world.turn()
    for i, block in enumerate(world.only(TierRead, seq).blocks):
        world.fill(block, tokens, i)
    world.post(TierReadDone(seq, (Tier.REDIS,) * 4))
    world.turn()
    reserved = world.only(Reserved, seq)
    assert (reserved.first_wanted, reserved.blocks) == (4, ())
    assert reserved.cached == CachedTokens(redis=16)
    world.post(ImportDone(seq, first_token(tokens)))
    world.run()
    assert world.stream(seq) == world.expected(seq)


def test_a_local_prompt_never_takes_its_last_token_from_a_tier() -> None:
    world = World(has_tiers=True)
    seq = world.submit(prompt(16), max_tokens=1)
    world.turn()
    assert len(world.only(TierRead, seq).keys) == 3
    world.post(Cancel(seq, GONE))
    world.turn()
    assert world.only(Failed, seq).error is GONE
    assert world.inspect().blocks_used == 4
    world.post(TierReadDone(seq, (Tier.HOST,) * 3))
    world.turn()
    world.assert_quiet()
    assert world.of(Stored) == []


def importing(tokens: list[int], max_tokens: int) -> tuple[World, SeqId]:
    """A prompt of four whole blocks that no tier has; blocks are reserved for all of it."""
    world = World(num_blocks=64, has_tiers=True)
    seq = world.submit(tokens, Job.IMPORT, max_tokens=max_tokens)
    world.turn()
    world.post(TierReadDone(seq, (None,) * 4))
    world.turn()
    return world, seq


def test_what_a_peer_computed_is_told_apart_from_what_was_computed_here() -> None:
    """Its peer writes it to what all workers share; writing it twice would cost both."""
    tokens = prompt(18)
    world, seq = importing(tokens, max_tokens=8)
    receive(world, seq)
    world.post(ImportDone(seq, first_token(tokens), from_cache=1))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    known = KEYS.chain(ROOT, (*tokens, *world.stream(seq)), 4)
    told = [(event.keys, event.from_peer) for event in world.of(WriteBack)]
    # The first block its peer had in a cache, whose owner may be long gone.
    assert told[:2] == [(known[:1], False), (known[1:4], True)]
    assert told[2:] == [((known[4],), False), ((known[5],), False)]
    for event in world.of(WriteBack):
        world.post(Unpin(event.ticket))
    world.assert_quiet()


@pytest.mark.parametrize("valid", [0, 1, 3])
def test_after_a_failed_hand_off_nothing_is_left_to_the_peer(valid: int) -> None:
    tokens = prompt(18)
    world, seq = importing(tokens, max_tokens=1)
    receive(world, seq, valid)
    world.post(ImportFailed(seq, valid))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    known = KEYS.chain(ROOT, tokens, 4)
    assert not any(event.from_peer for event in world.of(WriteBack))
    assert tuple(key for event in world.of(WriteBack) for key in event.keys) == known


def test_write_back_never_pins_much_of_the_pool() -> None:
    world = World(num_blocks=16, has_tiers=True, prefill_chunk=64)
    seq = world.submit(prompt(40), max_tokens=20)
    world.turn()
    world.post(TierReadDone(seq, (None,) * 9))
    world.run()
    pinned = [block for event in world.of(WriteBack) for block in event.blocks]
    assert len(pinned) == 4
    other = world.submit(prompt(44, 1), max_tokens=1)
    world.turn()
    world.post(TierReadDone(other, ()))
    world.run()
    assert world.stream(other) == world.expected(other)
    assert all(world.holds(block, prompt(40), i) for i, block in enumerate(pinned))
    world.post(Unpin(world.of(WriteBack)[0].ticket))
    world.post(Unpin(world.of(WriteBack)[0].ticket))
    world.turn()
    world.assert_quiet()


def test_what_there_was_no_room_for_is_written_when_it_is_found_again() -> None:
    """Else a prefix that never leaves the pool would never come to be in a slower tier."""
    world = World(num_blocks=32, has_tiers=True, prefill_chunk=64)
    tokens = prompt(64)
    known = KEYS.chain(ROOT, tokens, 4)

    def ask(end: int) -> list[tuple[BlockKey, ...]]:
        before = len(world.of(WriteBack))
        seq = world.submit(tokens[:end], max_tokens=1)
        world.turn()
        if any(event.seq == seq for event in world.of(TierRead)):
            world.post(TierReadDone(seq, (None,) * 16))
        world.run()
        assert world.stream(seq) == world.expected(seq)
        offered = world.of(WriteBack)[before:]
        for event in offered:
            world.post(Unpin(event.ticket))
        world.turn()
        return [event.keys for event in offered]

    assert ask(64) == [known[:8]], "a quarter of the pool"
    assert world.of(WriteBack)[1:] == [], "nobody asked for the rest"
    assert ask(49) == [known[8:12]]
    assert ask(49) == []
    assert ask(64) == [known[12:15]]
    world.assert_quiet()


def test_blocks_forgotten_while_they_are_fetched_stay_out_of_the_index() -> None:
    world = World(has_tiers=True)
    tokens = prompt(12)
    first = world.submit(tokens[:5], max_tokens=1)
    world.turn()
    world.post(TierReadDone(first, (None,)))
    world.run()
    seq = world.submit(tokens, max_tokens=3)
    world.turn()
    read = world.only(TierRead, seq)
    assert read.keys == KEYS.chain(ROOT, tokens, 4)[1:2]
    world.post(Forget(KEYS.chain(ROOT, tokens, 4)[:1]))
    world.fill(read.blocks[0], tokens, 1)
    world.post(TierReadDone(seq, (Tier.HOST,)))
    world.run()
    assert world.stream(seq) == world.expected(seq)
    assert len(world.of(Stored)) == 1
