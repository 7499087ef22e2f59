"""The decode end of one attempt as a pure state machine.

With a prefill peer:

    OPENING --accepted--> QUEUED --started--> RESERVING --reserved--> RECEIVING --arrived--> RUNNING
                                                (grant is sent)      (offers are read)
Alone: LOCAL from the start; the engine reads the prompt itself.

The client gets the first token while the last blocks still move: as soon as the prefill worker
tells it, there is a place here for what follows, and all that was offered before it has arrived in
good order. What is offered after it was hashed after it was computed from it, so how that arrives
says nothing about it. When the engine tells that token too, it is dropped.

What can go wrong (peer lost, a read failed, cancelled by the router) or end early (the first token
finishes the request) leads to WINDING_DOWN, where the attempt is already answered, but the engine's
sequence is not over: blocks that were lent go back only when no read writes into them any more.
ENDED: answered, and nothing held. Each input returns the effects that the attempt performs.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.base import BlockOffer, ReadReport
from pdserve.engine import api
from pdserve.errors import Cancelled, ChecksumMismatch, PdserveError, ProtocolError
from pdserve.lifecycle import Table
from pdserve.types import FinishReason, TokenOut


class State(enum.Enum):
    LOCAL = "local"
    OPENING = "opening"
    QUEUED = "queued"
    RESERVING = "reserving"
    RECEIVING = "receiving"
    RUNNING = "running"
    WINDING_DOWN = "winding_down"
    ENDED = "ended"


class Input(enum.Enum):
    ACCEPTED = "accepted"
    STARTED = "started"
    RESERVED = "reserved"
    OFFERED = "offered"
    READ = "read"  # a read returned, well or not
    PEER_FINISHED = "peer_finished"
    ARRIVED = "arrived"  # every wanted block and the first token are here
    TOKENS = "tokens"
    FINISHED = "finished"
    ENGINE_FAILED = "engine_failed"
    ABANDON = "abandon"  # answered already; the engine still has the sequence
    DROP = "drop"  # answered, and the engine never had the sequence


_S, _I = State, Input
_WITH_ENGINE = (_S.LOCAL, _S.RESERVING, _S.RECEIVING, _S.RUNNING)
TABLE: Table[State, Input] = Table(
    "decode attempt",
    {
        (_S.OPENING, _I.ACCEPTED): _S.QUEUED,
        (_S.QUEUED, _I.STARTED): _S.RESERVING,
        (_S.RESERVING, _I.RESERVED): _S.RECEIVING,
        (_S.RESERVING, _I.PEER_FINISHED): _S.RESERVING,
        (_S.RECEIVING, _I.PEER_FINISHED): _S.RECEIVING,
        (_S.RECEIVING, _I.OFFERED): _S.RECEIVING,
        (_S.RECEIVING, _I.READ): _S.RECEIVING,
        (_S.RECEIVING, _I.ARRIVED): _S.RUNNING,
        (_S.LOCAL, _I.TOKENS): _S.LOCAL,
        (_S.RUNNING, _I.TOKENS): _S.RUNNING,
        (_S.LOCAL, _I.FINISHED): _S.ENDED,
        (_S.RUNNING, _I.FINISHED): _S.ENDED,
        **{(state, _I.ENGINE_FAILED): _S.ENDED for state in (_S.LOCAL, _S.RESERVING, _S.RUNNING)},
        # Reads may be under way: the lent blocks go back when they have returned.
        (_S.RECEIVING, _I.ENGINE_FAILED): _S.WINDING_DOWN,
        **{(state, _I.ABANDON): _S.WINDING_DOWN for state in _WITH_ENGINE},
        **{(state, _I.DROP): _S.ENDED for state in (_S.OPENING, _S.QUEUED)},
        (_S.WINDING_DOWN, _I.RESERVED): _S.WINDING_DOWN,
        (_S.WINDING_DOWN, _I.READ): _S.WINDING_DOWN,
        (_S.WINDING_DOWN, _I.TOKENS): _S.WINDING_DOWN,
        (_S.WINDING_DOWN, _I.FINISHED): _S.ENDED,
        (_S.WINDING_DOWN, _I.ENGINE_FAILED): _S.ENDED,
        (_S.WINDING_DOWN, _I.ABANDON): _S.WINDING_DOWN,
    },
)


@dataclass(frozen=True, slots=True)
class SubmitImport:
    pass


@dataclass(frozen=True, slots=True)
class SendGrant:
    block_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Read:
    offers: tuple[BlockOffer, ...]
    into: tuple[api.BlockId, ...]


@dataclass(frozen=True, slots=True)
class Post:
    command: api.Command


@dataclass(frozen=True, slots=True)
class SendDone:
    """The peer may release its blocks; the stream to it ends."""


@dataclass(frozen=True, slots=True)
class DropPeer:
    """The stream to the peer is cancelled; it hears which of its blocks arrived damaged."""

    suspect: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Emit:
    """Without tokens and ``finish``: only what the engine's event tells besides is taken down."""

    tokens: tuple[TokenOut, ...]
    offset: int
    finish: FinishReason | None
    event: api.Tokens | None  # the engine's own, if these tokens are


@dataclass(frozen=True, slots=True)
class EmitFailure:
    error: PdserveError
    peer_at_fault: bool


@dataclass(frozen=True, slots=True)
class End:
    """Nothing of the attempt is held any more."""


Effect = SubmitImport | SendGrant | Read | Post | SendDone | DropPeer | Emit | EmitFailure | End


class DecodeAttempt:
    """State of one attempt; owned by the session that the router opened."""

    def __init__(self, seq: api.SeqId, first_offset: int, with_peer: bool) -> None:
        self.seq = seq
        self.state = State.OPENING if with_peer else State.LOCAL
        self.bytes_moved = 0
        self._first_offset = first_offset
        self._first_token: TokenOut | None = None
        self._first_told = False  # emitted here; the engine has not told it yet
        self._before_first: frozenset[int] = frozenset()  # the blocks offered before it came
        self._from_cache = 0
        self._blocks: tuple[api.BlockId, ...] = ()
        self._first_wanted = 0
        self._lent = False
        self._offered: set[int] = set()
        self._verified: set[int] = set()
        self._reading = 0  # reads that have not returned
        self._engine_ended = False

    @property
    def answered(self) -> bool:
        """Whatever still comes is of no use to anybody."""
        return self.state in (State.WINDING_DOWN, State.ENDED)

    # ---- the peer's messages

    def accepted(self) -> list[Effect]:
        return self._peer(Input.ACCEPTED, [])

    def started(self) -> list[Effect]:
        return self._peer(Input.STARTED, [SubmitImport()])

    def offered(self, offers: Sequence[BlockOffer]) -> list[Effect]:
        """Raises ProtocolError for a block that was not granted, or was offered before."""
        if self.answered:
            return []
        if not TABLE.allows(self.state, Input.OFFERED):
            raise ProtocolError(f"offer in state {self.state.value}")
        into = []
        for offer in offers:
            position = offer.index - self._first_wanted
            if not 0 <= position < len(self._blocks) or offer.index in self._offered:
                raise ProtocolError(f"offer of block {offer.index}, which is not awaited")
            self._offered.add(offer.index)
            into.append(self._blocks[position])
        self._move(Input.OFFERED)
        if not offers:
            return []
        self._reading += 1
        return [Read(tuple(offers), tuple(into))]

    def peer_finished(
        self, token: TokenOut | None, finish: FinishReason | None, from_cache: int = 0
    ) -> list[Effect]:
        """The prompt is computed; ``finish`` set: nothing is left to decode.

        ``from_cache``: so many of the prompt's first blocks the peer did not compute for this.
        """
        if self.answered:
            return []
        # Only a sequence that had ended before it came is finished without having started.
        allowed = finish is not None and self.state is State.QUEUED
        allowed |= TABLE.allows(self.state, Input.PEER_FINISHED) and self._first_token is None
        if not allowed:
            raise ProtocolError(f"prefill finished in state {self.state.value}")
        if finish is not None:
            tokens = () if token is None else (token,)
            emit = Emit(tokens, self._first_offset, finish, None)
            return [emit, SendDone(), *self._leave(Cancelled("ended at its first token"))]
        if token is None:
            raise ProtocolError("prefill finished without a token")
        self._first_token = token
        self._before_first, self._from_cache = frozenset(self._offered), from_cache
        self._move(Input.PEER_FINISHED)
        return [*self._tell_first(), *self._arrived()]

    def peer_lost(self, error: PdserveError) -> list[Effect]:
        """The peer failed, said no, or broke the protocol, before it had delivered everything."""
        if self.answered or self.state in (State.RUNNING, State.LOCAL):
            return []
        return self._fail(error, peer_at_fault=True)

    # ---- reads

    def read_done(self, offers: Sequence[BlockOffer], report: ReadReport) -> list[Effect]:
        self._reading -= 1
        self.bytes_moved += report.bytes_moved
        self._verified.update(offer.index for offer in offers)
        self._move(Input.READ)
        if self.state is State.WINDING_DOWN:
            return self._give_back()
        return [*self._tell_first(), *self._arrived()]

    def read_failed(self, offers: Sequence[BlockOffer], error: PdserveError) -> list[Effect]:
        self._reading -= 1
        self._move(Input.READ)
        if self.state is State.WINDING_DOWN:
            return self._give_back()
        suspect: tuple[int, ...] = ()
        if isinstance(error, ChecksumMismatch):
            suspect = tuple(offer.index for offer in offers)
        return self._fail(error, peer_at_fault=True, suspect=suspect)

    # ---- the engine's events

    def reserved(self, event: api.Reserved) -> list[Effect]:
        self._move(Input.RESERVED)
        self._blocks, self._first_wanted = event.blocks, event.first_wanted
        self._lent = True
        if self.state is State.WINDING_DOWN:
            return self._give_back()
        first = event.first_wanted
        grant = SendGrant(tuple(range(first, first + len(event.blocks))))
        return [grant, *self._tell_first(), *self._arrived()]

    def tokens(self, event: api.Tokens) -> list[Effect]:
        answered = self.answered
        self._move(Input.TOKENS if event.finish is None else Input.FINISHED)
        effects: list[Effect] = []
        if not answered:
            told = 1 if self._first_told else 0
            self._first_told = False
            tokens, offset = event.tokens[told:], event.offset + told
            effects.append(Emit(tokens, offset, event.finish, event))
        if event.finish is not None:
            effects.append(End())
        return effects

    def engine_failed(self, error: PdserveError) -> list[Effect]:
        answered = self.answered
        receiving = self.state is State.RECEIVING
        had_peer = self.state in (State.RESERVING, State.RECEIVING)
        self._engine_ended = True
        if self.state is State.WINDING_DOWN and self._lent:
            return []  # the lent blocks are still to be given back
        self._move(Input.ENGINE_FAILED)
        effects: list[Effect] = []
        if not answered:
            effects.append(EmitFailure(error, peer_at_fault=False))
            if had_peer:
                effects.append(DropPeer())
        if receiving:
            return [*effects, *self._give_back()]
        return [*effects, End()]

    # ---- the router

    def cancel(self, reason: PdserveError) -> list[Effect]:
        """The router wants no more, or is gone; it is not answered."""
        if self.answered:
            return []
        peer: list[Effect] = [] if self.state in (State.LOCAL, State.RUNNING) else [DropPeer()]
        return [*peer, *self._leave(reason)]

    # ---- inside

    def _peer(self, event: Input, effects: list[Effect]) -> list[Effect]:
        if self.answered:
            return []
        if not TABLE.allows(self.state, event):
            raise ProtocolError(f"{event.value} in state {self.state.value}")
        self._move(event)
        return effects

    def _tell_first(self) -> list[Effect]:
        if self.state is not State.RECEIVING or self._first_token is None or self._first_told:
            return []
        if not self._before_first <= self._verified:
            return []
        self._first_told = True
        return [Emit((self._first_token,), self._first_offset, None, None)]

    def _arrived(self) -> list[Effect]:
        if self.state is not State.RECEIVING or self._first_token is None:
            return []
        if len(self._verified) < len(self._blocks):
            return []
        self._move(Input.ARRIVED)
        self._lent = False
        done = api.ImportDone(self.seq, self._first_token, from_cache=self._from_cache)
        return [Post(done), SendDone()]

    def _fail(
        self, error: PdserveError, peer_at_fault: bool, suspect: tuple[int, ...] = ()
    ) -> list[Effect]:
        return [EmitFailure(error, peer_at_fault), DropPeer(suspect), *self._leave(error)]

    def _leave(self, reason: PdserveError) -> list[Effect]:
        if TABLE.allows(self.state, Input.DROP):
            self._move(Input.DROP)
            return [End()]
        return self._abandon(reason)

    def _abandon(self, reason: PdserveError) -> list[Effect]:
        self._move(Input.ABANDON)
        return [Post(api.Cancel(self.seq, reason)), *self._give_back()]

    def _give_back(self) -> list[Effect]:
        """Ends the loan once no read can write any more; keeps what arrived in good order."""
        if not self._lent or self._reading:
            return []
        self._lent = False
        valid = 0
        while self._first_wanted + valid in self._verified:
            valid += 1
        effects: list[Effect] = [Post(api.ImportFailed(self.seq, valid))]
        if self._engine_ended:
            self._move(Input.ENGINE_FAILED)
            effects.append(End())
        return effects

    def _move(self, event: Input) -> None:
        self.state = TABLE.next(self.state, event)
