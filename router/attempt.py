"""One attempt of a request on the workers that placement chose, and what it weighs there.

Attempt(...)  -> charged to its workers in the registry
prompt_read   -> by whom it was read is relieved, and a prefill worker's KV has moved
end           -> the rest is relieved; once, however the attempt ended
"""

from __future__ import annotations

import os

from pdserve.types import ID_BYTES, AttemptId, WorkerFacts
from router.placement import Placement
from router.registry import Registry


class Attempt:
    """A charge on the registry until ``end``. Event loop only."""

    __slots__ = ("_ended", "_reading", "_registry", "id", "placement", "started_at")

    def __init__(self, registry: Registry, placement: Placement, started_at: int) -> None:
        self.id = AttemptId(os.urandom(ID_BYTES))
        self.placement = placement
        self.started_at = started_at  # how many tokens were generated before
        self._registry = registry
        self._reading = True
        self._ended = False
        registry.attempt_started(placement.decode.facts.incarnation)
        if placement.prefill is not None:
            registry.attempt_started(placement.prefill.facts.incarnation)
        registry.reading_started(placement.reader.facts.incarnation, placement.uncached)

    @property
    def awaited(self) -> WorkerFacts | None:
        """The prefill worker, for as long as it reads the prompt or its KV moves."""
        peer = self.placement.prefill
        return peer.facts if self._reading and peer is not None else None

    def progressed(self, generated: int) -> bool:
        """Whether the decode worker wrote a token; the first of a pair is the prefill worker's."""
        given = 1 if self.placement.prefill is not None else 0
        return generated > self.started_at + given

    def prompt_read(self) -> None:
        if not self._reading:
            return
        self._reading = False
        placement = self.placement
        self._registry.reading_ended(placement.reader.facts.incarnation, placement.uncached)
        if placement.prefill is not None:
            self._registry.attempt_ended(placement.prefill.facts.incarnation)

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self.prompt_read()
        self._registry.attempt_ended(self.placement.decode.facts.incarnation)
