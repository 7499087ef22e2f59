"""Carries an engine's events from its thread to whoever waits for them.

    engine thread:  sink(events)  tier work -> tiers' threads, KV events -> publisher
                                  the rest  -> one hop to the event loop per engine step
    event loop:     _deliver      each event -> the listener of its sequence

A listener is registered before its Submit is posted and leaves after the sequence's ending, so that
no event of a live sequence is without one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from pdserve.engine import api
from pdserve.types import BlockKey

logger = logging.getLogger(__name__)

SequenceEvent = api.Admitted | api.Reserved | api.BlocksReady | api.Tokens | api.Failed
Listener = Callable[[SequenceEvent], None]
Post = Callable[[api.Command], None]


class TierPort(Protocol):
    """The slower cache tiers, seen from a worker. Each job ends with one call of ``done``."""

    def read(self, job: api.TierRead, done: Callable[[api.TierReadDone], None]) -> None: ...

    def write_back(self, job: api.WriteBack, done: Callable[[api.Unpin], None]) -> None: ...

    def forget(self, keys: Sequence[BlockKey]) -> None: ...


class KvEventPort(Protocol):
    """Where changes of the device index are published. Must not block."""

    def publish(self, events: Sequence[api.Stored | api.Removed | api.Cleared]) -> None: ...


class EngineBridge:
    """Owns the table of listeners; lives on the event loop given to ``attach``."""

    def __init__(self) -> None:
        self._listeners: dict[api.SeqId, Listener] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._post: Post | None = None
        self._tiers: TierPort | None = None
        self._kv_events: KvEventPort | None = None
        # Of attempts that were over, such as those of a router that gave this worker up.
        self.late_events = 0

    def attach(
        self,
        loop: asyncio.AbstractEventLoop,
        post: Post,
        tiers: TierPort | None,
        kv_events: KvEventPort | None,
    ) -> None:
        """Must come before the engine starts."""
        self._loop, self._post = loop, post
        self._tiers, self._kv_events = tiers, kv_events

    def sink(self, events: Sequence[api.Event]) -> None:
        """The engine's EventSink; runs on the engine's thread."""
        assert self._loop is not None
        assert self._post is not None
        to_loop: list[SequenceEvent] = []
        changes: list[api.Stored | api.Removed | api.Cleared] = []
        for event in events:
            if isinstance(event, api.TierRead):
                assert self._tiers is not None
                self._tiers.read(event, self._post)
            elif isinstance(event, api.WriteBack):
                assert self._tiers is not None
                self._tiers.write_back(event, self._post)
            elif isinstance(event, api.Forgotten):
                if self._tiers is not None:
                    self._tiers.forget(event.keys)
            elif isinstance(event, api.Stored | api.Removed | api.Cleared):
                changes.append(event)
            else:
                to_loop.append(event)
        if changes and self._kv_events is not None:
            self._kv_events.publish(changes)
        if to_loop:
            self._loop.call_soon_threadsafe(self._deliver, to_loop)

    def submit(self, command: api.Submit, listener: Listener) -> None:
        """Registers the listener, then posts. On the event loop."""
        assert command.seq not in self._listeners, "a sequence has one listener"
        self._listeners[command.seq] = listener
        self.post(command)

    def post(self, command: api.Command) -> None:
        assert self._post is not None
        self._post(command)

    def forget(self, seq: api.SeqId) -> None:
        """The listener wants no more events: the sequence's ending came."""
        self._listeners.pop(seq, None)

    @property
    def listening(self) -> int:
        """How many attempts still wait for their sequence's ending."""
        return len(self._listeners)

    def late(self, events: int) -> None:
        """So many events came after their attempt was over, and were dropped. On the event loop."""
        self.late_events += events

    async def inspect(self) -> api.EngineSnapshot:
        """A consistent snapshot, taken between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[api.EngineSnapshot] = loop.create_future()

        def hand_over(snapshot: api.EngineSnapshot) -> None:
            loop.call_soon_threadsafe(_resolve, future, snapshot)

        self.post(api.Inspect(hand_over))
        return await future

    def _deliver(self, events: Sequence[SequenceEvent]) -> None:
        for event in events:
            listener = self._listeners.get(event.seq)
            if listener is None:
                # Failed answers a cancel; whoever asked for that has left.
                self.late(not isinstance(event, api.Failed))
                continue
            try:
                listener(event)
            except Exception:
                # One attempt's bug must not cost the others of this step their events.
                logger.exception("listener of sequence %s failed", event.seq.hex())


def _resolve(future: asyncio.Future[api.EngineSnapshot], snapshot: api.EngineSnapshot) -> None:
    if not future.done():
        future.set_result(snapshot)
