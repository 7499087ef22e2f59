"""The host tier: spans in one arena of this process's memory, least recently used out first.

    slot: FREE -> FILLING (put copies into it) -> LISTED (in the index) -> FREE (evicted, deleted)

Copies run outside the lock and without the GIL. A slot that somebody copies from is *pinned*:
it may leave the index meanwhile, but becomes free only with its last pin. A prefix is touched from
its end, so that a child is always older than its parent and leaves first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cache_tiers.base import TierStats
from cache_tiers.spans import Adopt, HostSpans, Spans
from pdserve.errors import TierError
from pdserve.pages import arena
from pdserve.types import BlockKey, Incarnation, Tier


@dataclass(slots=True)
class _Entry:
    slot: int
    writer: Incarnation
    pins: int = 0
    listed: bool = True


@dataclass(slots=True)
class _Counts:
    queries: int = 0
    hits: int = 0
    stored: int = 0
    evicted: int = 0


class HostTier:
    """Thread-safe; never waits for anything but memory copies.

    ``bytes_max`` below one span is a tier that stores nothing. TierError when the kernel refuses
    the arena. ``adopt`` prepares the arena for copies, and gives what ends that.
    """

    name = Tier.HOST

    def __init__(
        self,
        bytes_max: int,
        span_bytes: int,
        incarnation: Incarnation,
        adopt: Adopt | None = None,
    ) -> None:
        self._span_bytes = span_bytes
        self._incarnation = incarnation
        self._slots = bytes_max // span_bytes
        try:
            self._arena = arena(self._slots, span_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise TierError(f"no memory for a host tier of {bytes_max} bytes: {error}") from error
        self._release = adopt(self._arena, True) if adopt and self._slots else None
        self._lock = threading.Lock()
        self._index: OrderedDict[BlockKey, _Entry] = OrderedDict()  # oldest first
        self._free = list(range(self._slots - 1, -1, -1))  # its end is used first
        self._count = _Counts()

    @property
    def capacity(self) -> int:
        """Spans that fit."""
        return self._slots

    @property
    def count(self) -> int:
        """Spans that can be found now."""
        with self._lock:
            return len(self._index)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        with self._lock:
            return [key in self._index for key in keys]

    def get(self, keys: Sequence[BlockKey], into: Sequence[memoryview], timeout: float) -> int:
        """Copies the longest prefix of ``keys`` that is here; nothing here can time out."""
        assert all(view.nbytes == self._span_bytes for view in into)
        return self.fill(keys, HostSpans(into))

    def fill(self, keys: Sequence[BlockKey], into: Spans) -> int:
        """The same into spans that may lie on a device."""
        entries: list[_Entry] = []
        with self._lock:
            self._count.queries += len(keys)
            for key in keys:
                entry = self._index.get(key)
                if entry is None:
                    break
                entry.pins += 1
                entries.append(entry)
            self._count.hits += len(entries)
            self._touch(keys[: len(entries)])
        try:
            into.write({i: self._arena[entry.slot] for i, entry in enumerate(entries)})
        finally:
            with self._lock:
                for entry in entries:
                    entry.pins -= 1
                    self._reclaim(entry)
        return len(entries)

    def put(
        self,
        keys: Sequence[BlockKey],
        values: Sequence[memoryview],
        writers: Sequence[Incarnation] = (),
    ) -> None:
        """Keeps as long a prefix as there is room for. ``writers``: default is this process.

        A key that is here already keeps its value: equal keys have equal values.
        """
        assert all(value.nbytes == self._span_bytes for value in values)
        self.keep(keys, HostSpans(values), writers)

    def keep(
        self,
        keys: Sequence[BlockKey],
        values: Spans,
        writers: Sequence[Incarnation] = (),
        before: Sequence[BlockKey] = (),
    ) -> None:
        """The same from spans that may lie on a device.

        ``before``: what comes before ``keys`` in their prefix. It stays the newer, and none of it
        makes room for them.
        """
        chain = (*before, *keys)
        filling: dict[int, tuple[BlockKey, _Entry]] = {}
        with self._lock:
            # The newest entries are now those of this prefix: room for a late block must not be
            # made at the cost of an early one.
            self._touch(chain)
            present = sum(key in self._index for key in chain)
            for i, key in enumerate(keys):
                if key in self._index:
                    continue
                slot = self._take_slot(keep=present)
                if slot is None:
                    break
                writer = writers[i] if writers else self._incarnation
                filling[i] = (key, _Entry(slot, writer, listed=False))
        try:
            values.read({i: self._arena[entry.slot] for i, (_, entry) in filling.items()})
        except BaseException:
            with self._lock:
                self._free.extend(entry.slot for _, entry in filling.values())
            raise
        with self._lock:
            for key, entry in filling.values():
                if key in self._index:  # another thread was faster
                    self._free.append(entry.slot)
                    continue
                entry.listed = True
                self._index[key] = entry
                self._count.stored += 1
            self._touch(chain)

    def delete(self, keys: Sequence[BlockKey]) -> None:
        with self._lock:
            for key in keys:
                self._unlist(key)

    def revoke(self, incarnation: Incarnation) -> None:
        """Drops every value that ``incarnation`` wrote."""
        with self._lock:
            gone = [key for key, entry in self._index.items() if entry.writer == incarnation]
            for key in gone:
                self._unlist(key)

    def clear(self) -> int:
        """How many spans were there."""
        with self._lock:
            count = len(self._index)
            for key in list(self._index):
                self._unlist(key)
            return count

    def stats(self) -> TierStats:
        with self._lock:
            return TierStats(
                name=self.name,
                queries=self._count.queries,
                hits=self._count.hits,
                stored=self._count.stored,
                evicted=self._count.evicted,
                bytes_used=len(self._index) * self._span_bytes,
            )

    def close(self) -> None:
        """Forgets everything; the memory goes with the last reference to the tier."""
        self.clear()
        if self._release is not None:
            self._release()
            self._release = None

    def _touch(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):
            if key in self._index:
                self._index.move_to_end(key)

    def _take_slot(self, keep: int) -> int | None:
        """A free slot, evicting the oldest unpinned entry but never one of the ``keep`` newest."""
        if self._free:
            return self._free.pop()
        candidates = len(self._index) - keep
        victim = None
        for position, (key, entry) in enumerate(self._index.items()):
            if position >= candidates:
                return None
            if entry.pins == 0:
                victim = key
                break
        if victim is None:
            return None
        self._unlist(victim)
        self._count.evicted += 1
        return self._free.pop()

    def _unlist(self, key: BlockKey) -> None:
        entry = self._index.pop(key, None)
        if entry is not None:
            entry.listed = False
            self._reclaim(entry)

    def _reclaim(self, entry: _Entry) -> None:
        if not entry.listed and entry.pins == 0:
            self._free.append(entry.slot)
