"""A suspect block leaves the pool's index and every slower tier, with all that builds on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from engine_world import KEYS, ROOT, World, prompt

from pdserve.engine import api
from pdserve.types import BlockKey
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
