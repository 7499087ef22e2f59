"""When one sequence passed which station, as phases of its request's timeline.

    waits -> admitted -> [found, read] -> computed* -> first_token -> decodes .. waits .. -> ended

A sequence that waits again was preempted. Nothing is recorded for a token: a stream of any length
has one DECODE. Owned by the engine's thread, as the sequence is.
"""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.telemetry.timeline import Phase, PhaseName, Recorder, between
from pdserve.types import Tier


class Journal:
    """Moments are seconds of the engine's clock."""

    __slots__ = ("_began", "_decoding", "_given", "_recorder", "_waiting")

    def __init__(self, given: int) -> None:
        """``given``: tokens that came with the sequence."""
        self._given = given
        self._recorder = Recorder()
        self._began: float | None = None
        self._waiting = 0.0  # since when
        self._decoding: float | None = None  # since when

    def waits(self, now: float) -> None:
        self._waiting = now

    def admitted(self, now: float, blocks: int, block_size: int) -> None:
        """It has blocks; ``blocks`` of them were found in the pool, full."""
        if self._began is not None:
            self._recorder.add(between(PhaseName.PREEMPTED, self._waiting, now))
            return
        self._began = self._waiting
        self._recorder.add(between(PhaseName.QUEUE, self._waiting, now))
        if blocks:
            found = between(
                PhaseName.TIER_READ,
                now,
                now,
                tier=Tier.DEVICE,
                blocks=blocks,
                tokens=blocks * block_size,
            )
            self._recorder.add(found)

    def read(self, phases: Iterable[Phase]) -> None:
        """What the slower tiers tell of their reads."""
        self._recorder.extend(phases)

    def computed(self, start: float, end: float, tokens: int) -> None:
        self._recorder.add(between(PhaseName.CHUNK, start, end, tokens=tokens))

    def decodes(self, now: float) -> None:
        """Everything before the next token came from a peer."""
        self._decoding = now

    def first_token(self, now: float) -> None:
        """The first one sampled or received here."""
        if self._decoding is None:
            began = now if self._began is None else self._began
            self._recorder.add(between(PhaseName.PREFILL, began, now, tokens=self._given))
            self._decoding = now

    def ended(self, now: float, known: int) -> None:
        """``known``: all tokens of the sequence by now."""
        if self._decoding is not None:
            made = known - self._given
            self._recorder.add(between(PhaseName.DECODE, self._decoding, now, tokens=made))

    def take(self) -> tuple[Phase, ...]:
        return self._recorder.take()
