"""Who holds what: from real events over sockets, and from the router's own notes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from router_harness import drive, until
from scripted_worker import BLOCK, MODEL, facts

from cache_tiers.keys import KeyMaker
from cache_tiers.kv_events import KvEventPublisher
from pdserve.config import CacheConfig, TimersConfig
from pdserve.engine.api import Removed, Stored
from pdserve.types import Incarnation
from router.kv_notes import KvNotes
from router.kv_view import NOTE_TTL_S, KvView
from router.registry import Registry

MAKER = KeyMaker(b"k" * 16)
TOKENS = tuple(range(10 * BLOCK))
KEYS = MAKER.chain(MAKER.root(MODEL.fingerprint, b""), TOKENS, BLOCK)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_events_notes_and_a_new_incarnation() -> None:
    async def story() -> None:
        clock = Clock()
        registry = Registry(TimersConfig())
        view = KvView(registry, CacheConfig(), clock)
        publisher = KvEventPublisher("127.0.0.1")
        worker = replace(
            facts("d0"),
            kv_events_address=publisher.address,
            kv_replay_address=publisher.replay_address,
        )
        publisher.publish([Stored(KEYS[:3], None, TOKENS[: 3 * BLOCK], BLOCK)])
        registry.set_workers([worker])
        await until(lambda: view.known(KEYS) == {"d0": 3})

        view.note(worker, KEYS[:5])
        assert view.known(KEYS) == {"d0": 5}, "at once, before any event"
        clock.now += NOTE_TTL_S + 1
        assert view.known(KEYS) == {"d0": 3}, "no event confirmed the note"

        publisher.publish([Removed(KEYS[2:3])])
        await until(lambda: view.known(KEYS) == {"d0": 2})

        reborn = replace(
            worker,
            incarnation=Incarnation(b"n" * 16),
            kv_events_address="",
            kv_replay_address="",
        )
        registry.set_workers([reborn])
        assert view.known(KEYS) == {}
        view.note(worker, KEYS)
        assert view.known(KEYS) == {}, "a former life's note"
        view.note(reborn, KEYS[:1])
        assert view.known(KEYS) == {"d0": 1}
        await view.close()
        publisher.close()
        assert not [task for task in asyncio.all_tasks() if "kv-events" in task.get_name()]

    drive(story)


def test_notes_are_bounded_and_lose_the_leaves_of_the_oldest_chain_first() -> None:
    notes = KvNotes(capacity=4, ttl_s=10)
    other = MAKER.chain(MAKER.root(MODEL.fingerprint, b"x"), TOKENS, BLOCK)
    notes.add(KEYS[:3], now=0)
    notes.add(other[:2], now=1)
    assert notes.extend(other, 0, now=2) == 2
    assert notes.extend(KEYS, 0, now=2) == 2
    assert notes.extend(KEYS, 1, now=2) == 2
    assert notes.extend(KEYS, 3, now=2) == 3
    assert notes.extend(KEYS, 0, now=10.5) == 0
    assert notes.extend(other, 0, now=10.5) == 2
