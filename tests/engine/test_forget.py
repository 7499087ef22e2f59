"""A suspect block leaves the pool's index and every slower tier, with all that builds on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from engine_world import KEYS, MODEL, ROOT, World, prompt

from pdserve.engine import api
from pdserve.types import BlockKey, CachedTokens, Tier
from pdserve.worker.bridge import EngineBridge


class Tiers:
    """Remembers what it is to forget."""

    def __init__(self) -> None:
        self.forgotten: list[BlockKey] = []

    def read(self, job: api.TierRead, done: Callable[[api.TierReadDone], None]) -> None:
        raise AssertionError("nothing is read here")

    def write_back(self, job: api.WriteBack, done: Callable[[api.Unpin], None]) -> None:
        raise AssertionError("nothing is written here")

    def forget(self, keys: Sequence[BlockKey]) -> None:
        self.forgotten += keys


def test_keys_their_descendants_and_what_only_a_tier_may_hold() -> None:
    async def story() -> None:
        world, tiers, bridge = World(), Tiers(), EngineBridge()
        bridge.attach(asyncio.get_running_loop(), world.post, tiers, None)
        tokens = prompt(21)
        longer = [*tokens[:16], *prompt(9, 3)]
        for text in (tokens, longer):
            world.submit(text, max_tokens=1)
            world.run()
        keys = KEYS.chain(ROOT, tokens, world.block_size)
        branch = KEYS.chain(ROOT, longer, world.block_size)[len(keys) - 1 :]
        unknown = BlockKey(b"u" * 16)
        world.post(api.Forget((keys[1], unknown)))
        bridge.sink(world.turn())
        assert set(tiers.forgotten) == {*keys[1:], *branch, unknown}
        assert len(tiers.forgotten) == len(set(tiers.forgotten))
        again = world.submit(tokens, max_tokens=1)
        world.run()
        assert world.only(api.Tokens, again).cached.device == world.block_size, "one block is left"
        world.assert_quiet()

    asyncio.run(story())


def fetching(world: World, tokens: list[int], job: api.Job, max_tokens: int = 3) -> api.TierRead:
    """A sequence whose first block lies in the pool and whose others are lent to the tiers."""
    first = world.submit(tokens[: world.block_size + 1], max_tokens=1)
    world.turn()
    world.post(api.TierReadDone(first, (None,)))
    world.run()
    seq = world.submit(tokens, job, max_tokens=max_tokens)
    world.turn()
    return world.only(api.TierRead, seq)


def found_by_others(world: World, tokens: list[int], job: api.Job = api.Job.GENERATE) -> None:
    """The next one to ask for these tokens writes what the model writes."""
    again = world.submit(tokens, job, max_tokens=3)
    world.turn()
    for read in world.of(api.TierRead, again):
        world.post(api.TierReadDone(again, (None,) * len(read.keys)))
    world.run()
    assert world.stream(again) == world.expected(again)
    for event in world.of(api.WriteBack):
        world.post(api.Unpin(event.ticket))
    world.turn()
    world.assert_quiet()


@pytest.mark.parametrize("turns", [0, 1])
def test_a_read_that_was_over_before_the_tiers_heard_does_not_bring_it_back(turns: int) -> None:
    """The reader left with old bytes of the block, and says so when the block is forgotten."""
    world = World(has_tiers=True)
    tokens = prompt(22)
    read = fetching(world, tokens, api.Job.GENERATE)
    world.fill(read.blocks[0], tokens, 1)
    for block in read.blocks[1:]:
        world.words[block] = 0xBAD
    world.post(api.Forget((read.keys[2], read.keys[1])))
    world.turn(turns)
    world.post(api.TierReadDone(read.seq, (Tier.HOST,) * 4))
    world.run()
    assert world.stream(read.seq) == world.expected(read.seq)
    said = world.of(api.Tokens, read.seq)[-1].cached
    assert said == CachedTokens(device=4, host=4), "only what lies before it came from a tier"
    found_by_others(world, tokens)


def test_a_read_that_begins_after_the_forgetting_is_believed() -> None:
    world = World(has_tiers=True)
    tokens = prompt(22)
    keys = KEYS.chain(ROOT, tokens, world.block_size)
    world.post(api.Forget(keys[1:]))
    read = fetching(world, tokens, api.Job.GENERATE)
    for i, block in enumerate(read.blocks, start=1):
        world.fill(block, tokens, i)
    world.post(api.TierReadDone(read.seq, (Tier.HOST,) * 4))
    world.run()
    assert world.of(api.Tokens, read.seq)[-1].cached == CachedTokens(device=4, host=16)


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_peer_sends_of_it_is_not_found_by_others(whole: bool) -> None:
    """The peer computed the checksum over the damaged bytes: the block looks right on arrival."""
    world = World(has_tiers=True)
    tokens = prompt(22)
    read = fetching(world, tokens, api.Job.IMPORT)
    world.post(api.TierReadDone(read.seq, (None,) * 4))
    world.turn()
    reserved = world.only(api.Reserved, read.seq)
    for i, block in enumerate(reserved.blocks, start=reserved.first_wanted):
        world.fill(block, tokens, i)
    world.words[reserved.blocks[1]] = 0xBAD
    world.post(api.Forget(read.keys[1:2]))
    if whole:
        token = MODEL.next_token(MODEL.context(tokens), world.submitted[read.seq].sampling, 0)
        world.post(api.ImportDone(read.seq, token))
    else:
        world.post(api.ImportFailed(read.seq, 3))
    world.run()
    assert len(world.stream(read.seq)) == 3
    if not whole:
        assert world.stream(read.seq) == world.expected(read.seq), "it was computed here instead"
    found_by_others(world, tokens)
