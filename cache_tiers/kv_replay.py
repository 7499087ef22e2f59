"""What a publisher of KV events can repeat: its last batches, and the state before them.

    batch n published -> kept -> (too many, or too many bytes) -> folded into the base

The *base* is what the pool held after all folded batches. A subscriber that wants more than is kept
gets the base first, as one batch (cleared, then stored) that bears the number of the last folded
one; then the kept batches follow without a gap. So a router that starts late, or was away for long,
still learns of blocks that were stored hours ago and never left. Pure; one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache_tiers.kv_wire import KvEvent, encode_batch
from pdserve.engine.api import Cleared, Removed, Stored
from pdserve.types import BlockKey


@dataclass(frozen=True, slots=True)
class _Held:
    """One block of the base."""

    parent: BlockKey | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Kept:
    seq: int
    events: tuple[KvEvent, ...]
    payload: bytes


class ReplayLog:
    def __init__(self, batches_max: int, bytes_max: int) -> None:
        self._batches_max = batches_max
        self._bytes_max = bytes_max
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._base: dict[BlockKey, _Held] = {}
        self._folded = -1  # number of the last folded batch

    @property
    def base_keys(self) -> int:
        return len(self._base)

    def append(self, seq: int, events: Sequence[KvEvent], payload: bytes) -> None:
        """Numbers are consecutive from 0."""
        assert seq == self._folded + len(self._kept) + 1
        self._kept.append(_Kept(seq, tuple(events), payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self._batches_max or self._kept_bytes > self._bytes_max:
            oldest = self._kept.popleft()
            self._kept_bytes -= len(oldest.payload)
            self._folded = oldest.seq
            for event in oldest.events:
                self._fold(event)

    def since(self, seq: int, now: float) -> Iterator[tuple[int, bytes]]:
        """Number and payload of every batch from ``seq`` on, the base in place of folded ones."""
        if seq <= self._folded:
            yield self._folded, encode_batch(self._base_events(), now)
        for kept in self._kept:
            if kept.seq >= seq:
                yield kept.seq, kept.payload

    def _fold(self, event: KvEvent) -> None:
        if isinstance(event, Stored):
            parent = event.parent
            for i, key in enumerate(event.keys):
                tokens = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
                self._base[key] = _Held(parent, tokens)
                parent = key
        elif isinstance(event, Removed):
            for key in event.keys:
                self._base.pop(key, None)
        else:
            self._base.clear()

    def _base_events(self) -> list[KvEvent]:
        """Cleared, then the base with each run of consecutive blocks in one event."""
        events: list[KvEvent] = [Cleared()]
        keys: list[BlockKey] = []
        tokens: list[int] = []
        parent: BlockKey | None = None
        size = 0
        for key, held in self._base.items():
            if keys and (held.parent != keys[-1] or len(held.token_ids) != size):
                events.append(Stored(tuple(keys), parent, tuple(tokens), size))
                keys, tokens = [], []
            if not keys:
                parent, size = held.parent, len(held.token_ids)
            keys.append(key)
            tokens += held.token_ids
        if keys:
            events.append(Stored(tuple(keys), parent, tuple(tokens), size))
        return events
