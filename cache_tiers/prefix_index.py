"""What the router believes about who holds which blocks in its device pool. Torch-free.

Fed by each worker's KV events; asked for the longest prefix of a prompt's block keys. It is a hint:
a worker that lost a block computes it, so the index may lack keys but is kept exact where it can.
One set of keys per worker: a lookup touches only workers that hold the prompt's first blocks, and a
worker that died is dropped without a walk over the others' keys. One thread (the router's loop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pdserve.engine.api import Cleared, Removed, Stored
from pdserve.types import BlockKey, WorkerId

MAX_KEYS = 4_000_000  # about 110 bytes each


class PrefixIndex:
    """``max_keys``: keys of all workers together; more are not taken in, and counted."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._held: dict[WorkerId, set[BlockKey]] = {}
        self._keys = 0
        self._overflow = 0

    @property
    def keys(self) -> int:
        """Keys known, each counted once per worker that holds it."""
        return self._keys

    @property
    def overflow(self) -> int:
        """Keys that were not taken in because the index was full."""
        return self._overflow

    def held_by(self) -> Mapping[WorkerId, int]:
        """How many keys each worker is known to hold."""
        return MappingProxyType({worker: len(keys) for worker, keys in self._held.items()})

    def apply(self, worker: WorkerId, event: Stored | Removed | Cleared) -> None:
        if isinstance(event, Stored):
            self.stored(worker, event.keys)
        elif isinstance(event, Removed):
            self.removed(worker, event.keys)
        else:
            self.cleared(worker)

    def stored(self, worker: WorkerId, keys: Sequence[BlockKey]) -> None:
        held = self._held.setdefault(worker, set())
        before = len(held)
        room = self._max_keys - self._keys
        if len(keys) <= room:
            held.update(keys)
        else:
            # The first keys of a chain are the ones that a lookup needs.
            new = [key for key in dict.fromkeys(keys) if key not in held]
            held.update(new[:room])
            self._overflow += max(0, len(new) - room)
        self._keys += len(held) - before

    def removed(self, worker: WorkerId, keys: Sequence[BlockKey]) -> None:
        held = self._held.get(worker)
        if held is None:
            return
        before = len(held)
        held.difference_update(keys)
        self._keys += len(held) - before

    def cleared(self, worker: WorkerId) -> None:
        """The worker's pool holds nothing any more, or what it holds is not known any more."""
        self.drop(worker)

    def drop(self, worker: WorkerId) -> None:
        """The worker is gone."""
        self._keys -= len(self._held.pop(worker, ()))

    def longest(self, worker: WorkerId, keys: Sequence[BlockKey]) -> int:
        """How many of ``keys``, counted from the first, ``worker`` holds."""
        return _prefix(self._held.get(worker, set()), keys)

    def longest_all(self, keys: Sequence[BlockKey]) -> dict[WorkerId, int]:
        """``longest`` of every worker for which it is not 0."""
        if not keys:
            return {}
        first = keys[0]
        return {worker: _prefix(held, keys) for worker, held in self._held.items() if first in held}


def _prefix(held: set[BlockKey], keys: Sequence[BlockKey]) -> int:
    for i, key in enumerate(keys):
        if key not in held:
            return i
    return len(keys)
