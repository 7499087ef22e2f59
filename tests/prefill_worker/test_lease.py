"""A silent decode worker: its lease ends, and the blocks come back. Without a lease, never."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hand_off_world import SEQ, HandOff

import prefill_worker.service as service
from pdserve.engine import api
from pdserve.errors import WorkerLost

LEASE_S = 0.2


async def a_silent_peer(wait_s: float) -> list[api.Command]:
    """What the engine was told, ``wait_s`` seconds after the peer's only message."""
    async with HandOff(LEASE_S) as it:
        assert await it.hear() == "accepted"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(it.hear(), wait_s)
        return list(it.posted)


def gives_back(posted: list[api.Command]) -> bool:
    return any(isinstance(command, api.Release) for command in posted)


def test_the_lease_ends_and_blocks_come_back() -> None:
    posted = asyncio.run(a_silent_peer(20 * LEASE_S))
    assert isinstance(posted[0], api.Submit)
    assert gives_back(posted)


def test_an_engine_that_goes_on_is_no_word_of_the_peer() -> None:
    """A stopped decode worker's prompt is not computed to its end, however long that is."""

    rounds_s = service.LAST_WORDS_S / 5

    async def story() -> int:
        async with HandOff(LEASE_S) as it:
            assert await it.hear() == "accepted"
            it.happens(api.Admitted(SEQ, 0))
            over = asyncio.create_task(it.over())
            block = 0
            while not over.done():
                it.happens(api.BlocksReady(SEQ, block, (api.BlockId(block),), None))
                block += 1
                assert block < 200
                await asyncio.sleep(rounds_s)
            assert await over
            assert isinstance(it.ended, WorkerLost)
            assert it.gave_back()
            return block

    # Rounds, not seconds: a machine that stands still does so for one round.
    assert asyncio.run(story()) < 2 * (LEASE_S + service.LAST_WORDS_S) / rounds_s


def test_without_a_lease_a_silent_peer_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.PrefillService, "lease_s", property(lambda self: 3600.0))
    assert not gives_back(asyncio.run(a_silent_peer(20 * LEASE_S)))
