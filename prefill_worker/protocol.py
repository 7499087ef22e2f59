"""The prefill end of one hand-off as a pure state machine.

    QUEUED --admitted--> COMPUTING --computed--> COMPUTED --done--> CLOSED
                             |                      |
                           grant                  grant
                             v                      v
                    COMPUTING_GRANTED --computed--> COMPUTED_GRANTED --done--> CLOSED

A sequence that had ended before it came is COMPUTED while QUEUED: nothing starts, nothing moves.
Blocks become final while COMPUTING; they are offered as soon as they are both final and granted.
The peer may be gone (lost) in any state: the engine's blocks are given back exactly once, on the
way into CLOSED. Nothing here does I/O: each input returns the effects that the service performs.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.engine import api
from pdserve.errors import Cancelled, PdserveError, ProtocolError
from pdserve.lifecycle import Table
from pdserve.types import ChunkTiming


class State(enum.Enum):
    QUEUED = "queued"
    COMPUTING = "computing"
    COMPUTING_GRANTED = "computing_granted"
    COMPUTED = "computed"
    COMPUTED_GRANTED = "computed_granted"
    CLOSED = "closed"


class Input(enum.Enum):
    ADMITTED = "admitted"
    BLOCKS = "blocks"
    COMPUTED = "computed"
    GRANT = "grant"
    DONE = "done"
    LOST = "lost"  # cancelled, disconnected, or silent for a whole lease
    FAILED = "failed"  # the engine gave the sequence up


_S, _I = State, Input
TABLE: Table[State, Input] = Table(
    "prefill hand-off",
    {
        (_S.QUEUED, _I.ADMITTED): _S.COMPUTING,
        # What was generated before had ended the sequence already.
        (_S.QUEUED, _I.COMPUTED): _S.COMPUTED,
        (_S.COMPUTING, _I.BLOCKS): _S.COMPUTING,
        (_S.COMPUTING, _I.GRANT): _S.COMPUTING_GRANTED,
        (_S.COMPUTING, _I.COMPUTED): _S.COMPUTED,
        (_S.COMPUTING_GRANTED, _I.BLOCKS): _S.COMPUTING_GRANTED,
        (_S.COMPUTING_GRANTED, _I.COMPUTED): _S.COMPUTED_GRANTED,
        (_S.COMPUTED, _I.GRANT): _S.COMPUTED_GRANTED,
        # Without a grant: the first token ended the request, nothing has to move.
        (_S.COMPUTED, _I.DONE): _S.CLOSED,
        (_S.COMPUTED_GRANTED, _I.DONE): _S.CLOSED,
        **{(state, _I.LOST): _S.CLOSED for state in _S},
        **{
            (state, _I.FAILED): _S.CLOSED
            for state in (_S.QUEUED, _S.COMPUTING, _S.COMPUTING_GRANTED)
        },
    },
)


@dataclass(frozen=True, slots=True)
class SendStarted:
    pass


@dataclass(frozen=True, slots=True)
class SendOffers:
    """(position in the prompt's block list, block in our pool) of final, granted blocks."""

    blocks: tuple[tuple[int, api.BlockId], ...]


@dataclass(frozen=True, slots=True)
class SendFinished:
    tokens: api.Tokens


@dataclass(frozen=True, slots=True)
class Post:
    command: api.Command


@dataclass(frozen=True, slots=True)
class Close:
    """The stream ends, with an error or without."""

    error: PdserveError | None = None


Effect = SendStarted | SendOffers | SendFinished | Post | Close


class PrefillHandOff:
    """State of one attempt; owned by the service's task for it."""

    def __init__(self, seq: api.SeqId, prompt_blocks: int, moves: bool = True) -> None:
        """``moves`` False: the first token ends the request anyhow, so nothing is offered."""
        self.seq = seq
        self.state = State.QUEUED
        self.chunks: list[ChunkTiming] = []
        self._prompt_blocks = prompt_blocks
        self._moves = moves
        self._granted: frozenset[int] = frozenset()
        self._final: dict[int, api.BlockId] = {}  # not offered yet

    def admitted(self) -> list[Effect]:
        self._move(Input.ADMITTED)
        return [SendStarted()]

    def blocks(self, event: api.BlocksReady) -> list[Effect]:
        self._move(Input.BLOCKS)
        if event.chunk is not None:
            self.chunks.append(event.chunk)
        for position, block in enumerate(event.blocks, start=event.first_index):
            self._final[position] = block
        return self._offers()

    def computed(self, event: api.Tokens) -> list[SendFinished]:
        self._move(Input.COMPUTED)
        return [SendFinished(event)]

    def grant(self, indices: Sequence[int]) -> list[Effect]:
        """Raises ProtocolError for positions out of range, repeated or not ascending."""
        if not TABLE.allows(self.state, Input.GRANT):
            raise ProtocolError(f"grant in state {self.state.value}")
        ascending = all(a < b for a, b in itertools.pairwise(indices))
        if indices and (not ascending or not 0 <= indices[0] <= indices[-1] < self._prompt_blocks):
            raise ProtocolError(
                f"grant.block_indices must ascend within 0..{self._prompt_blocks - 1}"
            )
        self._move(Input.GRANT)
        self._granted = frozenset(indices)
        return self._offers()

    def done(self) -> list[Effect]:
        if not TABLE.allows(self.state, Input.DONE):
            raise ProtocolError(f"done in state {self.state.value}")
        self._move(Input.DONE)
        return [Post(api.Release(self.seq)), Close()]

    def lost(self, error: PdserveError | None) -> list[Effect]:
        """The peer is gone or wants no more; ``error`` is what it is still told."""
        computed = self.state in (State.COMPUTED, State.COMPUTED_GRANTED)
        closed = self.state is State.CLOSED
        self._move(Input.LOST)
        if closed:
            return []
        # The engine may finish the prompt while a Cancel is on its way: Release covers that case,
        # and is without effect on a sequence that the engine no longer has.
        posts: list[Effect] = [Post(api.Release(self.seq))]
        if not computed:
            reason = error or Cancelled("the decode worker closed the hand-off")
            posts.insert(0, Post(api.Cancel(self.seq, reason)))
        return [*posts, Close(error)]

    def failed(self, error: PdserveError) -> list[Effect]:
        self._move(Input.FAILED)
        return [Close(error)]

    def _offers(self) -> list[Effect]:
        granted = self.state in (State.COMPUTING_GRANTED, State.COMPUTED_GRANTED)
        if not granted or not self._final or not self._moves:
            return []
        wanted = tuple(
            (position, block)
            for position, block in sorted(self._final.items())
            if position in self._granted
        )
        self._final.clear()
        return [SendOffers(wanted)] if wanted else []

    def _move(self, event: Input) -> None:
        self.state = TABLE.next(self.state, event)
