"""Which worker holds which prefix, as far as the router knows.

    a worker joined with KV events    a subscriber feeds the index
    a request finished                its blocks are noted for its workers at once (kv_notes.py)
    a worker is gone, or is another   everything about it is forgotten

Hints only: what a worker does not hold after all, it computes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cache_tiers.kv_subscriber import KvEventSubscriber
from cache_tiers.prefix_index import PrefixIndex
from pdserve.config import CacheConfig
from pdserve.types import BlockKey, Incarnation, WorkerFacts, WorkerId
from router.kv_notes import KvNotes
from router.registry import Registry

log = logging.getLogger(__name__)

# Events follow their cause within this; a note that they do not confirm was wrong.
NOTE_TTL_S = 10.0


@dataclass(frozen=True, slots=True)
class _Source:
    """What is known of one incarnation, and from where."""

    facts: WorkerFacts
    # In the index an incarnation has a name of its own, so that the last event of a worker's
    # former life cannot be taken for its present one's.
    name: WorkerId
    notes: KvNotes
    subscriber: KvEventSubscriber | None


class KvView:
    """Follows the registry. Event loop only."""

    def __init__(
        self, registry: Registry, cache: CacheConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._events = cache.kv_events
        self._index = PrefixIndex()
        self._sources: dict[Incarnation, _Source] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unlisten = registry.listen(self._follow)

    def known(self, keys: Sequence[BlockKey]) -> Mapping[WorkerId, int]:
        """How many blocks of this chain, from its first, each worker is believed to hold."""
        now = self._clock()
        told = self._index.longest_all(keys)
        found: dict[WorkerId, int] = {}
        for source in self._sources.values():
            have = source.notes.extend(keys, told.get(source.name, 0), now)
            if have:
                found[source.facts.id] = have
        return found

    def unheard_s(self, *, patient: bool) -> Mapping[WorkerId, float]:
        """Seconds since each worker's events were last known to be complete; see KvEventSubscriber.

        Infinity for one that publishes none though it should, and unless ``patient`` for one whose
        events have never been complete; empty where events are off.
        """
        if not self._events:
            return {}
        return {
            source.facts.id: _unsure_s(source.subscriber, patient=patient)
            for source in self._sources.values()
        }

    def note(self, facts: WorkerFacts, keys: Sequence[BlockKey]) -> None:
        """This incarnation finished a request with these blocks."""
        source = self._sources.get(facts.incarnation)
        if source is not None:
            source.notes.add(keys, self._clock())

    async def close(self) -> None:
        self._unlisten()
        for incarnation in list(self._sources):
            self._forget(incarnation)
        await asyncio.gather(*self._closing)

    def _follow(self) -> None:
        live = {facts.incarnation: facts for facts in self._registry.live()}
        for incarnation in self._sources.keys() - live.keys():
            self._forget(incarnation)
        for incarnation in live.keys() - self._sources.keys():
            self._sources[incarnation] = self._open(live[incarnation])

    def _open(self, facts: WorkerFacts) -> _Source:
        name = WorkerId(f"{facts.id}/{facts.incarnation.hex()}")
        if not (self._events and facts.kv_events_address and facts.kv_replay_address):
            return _Source(facts, name, KvNotes(facts.blocks_total, math.inf), None)
        subscriber = KvEventSubscriber(
            name, facts.kv_events_address, facts.kv_replay_address, self._index
        )
        subscriber.start()
        return _Source(facts, name, KvNotes(facts.blocks_total, NOTE_TTL_S), subscriber)

    def _forget(self, incarnation: Incarnation) -> None:
        task = asyncio.create_task(self._end(self._sources.pop(incarnation)))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _end(self, source: _Source) -> None:
        if source.subscriber is not None:
            await source.subscriber.close()
        self._index.drop(source.name)


def _unsure_s(subscriber: KvEventSubscriber | None, *, patient: bool) -> float:
    if subscriber is None or not (patient or subscriber.learned):
        return math.inf
    return subscriber.unsure_s()
