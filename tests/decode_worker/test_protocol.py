"""Every order of events that a hand-off can meet, on the production state machines.

Both ends run against each other, with an engine model on each side, and every interleaving of
small cases is explored: messages may be lost with the connection, the router may cancel, a read may
fail, either engine may give up. In every reachable end: the attempt was answered exactly once (or
cancelled by the router), each engine's blocks were given back exactly once, and nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import pytest

from decode_worker import protocol as decode
from kv_transfer.base import BlockOffer, ReadReport
from pdserve.engine import api
from pdserve.errors import (
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    WorkerLost,
)
from pdserve.types import CachedTokens, FinishReason, TokenOut
from prefill_worker import protocol as prefill

SEQ = api.SeqId(b"s" * 16)
REPORT = ReadReport(100, 1.0, 2.0)


@dataclass
class World:
    """One attempt: both machines, both engines, the wires between them."""

    blocks: int
    ends_at_first: bool
    ended_before: bool = False  # what a client sent as generated ends the sequence already
    decode: decode.DecodeAttempt = field(init=False)
    prefill: prefill.PrefillHandOff = field(init=False)
    to_prefill: list[object] = field(default_factory=list)
    to_decode: list[object] = field(default_factory=list)
    reads: list[decode.Read] = field(default_factory=list)
    # the decode engine: none, waiting, reserved (lent), running, over
    decode_engine: str = "none"
    lent: bool = False
    # the prefill engine: waiting, computing, held, over
    prefill_engine: str = "waiting"
    computed: int = 0
    connected: bool = True
    prefill_stream: bool = True
    answers: list[str] = field(default_factory=list)
    tokens: int = 0
    ended: int = 0
    cancelled: bool = False
    faults: int = 1  # how many things may still go wrong

    def __post_init__(self) -> None:
        self.decode = decode.DecodeAttempt(SEQ, 0, with_peer=True)
        self.prefill = prefill.PrefillHandOff(SEQ, self.blocks)
        self.to_decode.append("accepted")

    # ---- effects

    def run_decode(self, effects: list[decode.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, decode.SubmitImport):
                assert self.decode_engine == "none"
                self.decode_engine = "waiting"
            elif isinstance(effect, decode.SendGrant):
                self.to_prefill.append(effect)
            elif isinstance(effect, decode.Read):
                self.reads.append(effect)
            elif isinstance(effect, decode.SendDone):
                self.to_prefill.append("done")
            elif isinstance(effect, decode.DropPeer):
                self.connected = False
            elif isinstance(effect, decode.Emit):
                assert "failure" not in self.answers
                assert "finish" not in self.answers
                assert effect.offset == self.tokens, "a gap or a repeat"
                self.tokens += len(effect.tokens)
                if effect.finish is not None:
                    self.answers.append("finish")
            elif isinstance(effect, decode.EmitFailure):
                self.answers.append("failure")
            elif isinstance(effect, decode.End):
                self.ended += 1
            elif isinstance(effect.command, api.ImportDone):
                assert self.lent
                assert not self.reads
                self.lent, self.decode_engine = False, "running"
            elif isinstance(effect.command, api.ImportFailed):
                assert self.lent, "blocks are given back once"
                assert not self.reads, "a read still writes into blocks that are given back"
                self.lent = False
            elif isinstance(effect.command, api.Cancel) and self.decode_engine != "over":
                self.decode_engine = "cancelling"

    def run_prefill(self, effects: list[prefill.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, prefill.Post):
                if isinstance(effect.command, api.Release):
                    if self.prefill_engine in ("held", "cancelling"):
                        self.prefill_engine = "over"
                elif self.prefill_engine != "over":
                    self.prefill_engine = "cancelling"
            elif isinstance(effect, prefill.Close):
                self.prefill_stream = False
                self.to_decode.append(effect.error or "closed")
            elif self.connected:
                self.to_decode.append(effect)

    # ---- what can happen next

    def moves(self) -> Iterator[str]:
        if self.to_decode and self.connected:
            yield "decode_hears"
        if self.to_prefill and self.prefill_stream:
            yield "prefill_hears"
        if not self.connected and self.prefill_stream:
            yield "prefill_notices"
        if self.prefill_stream and self.prefill_engine in ("waiting", "computing"):
            yield "prefill_works"
        if self.decode_engine == "waiting":
            yield "reserve"
        if self.decode_engine == "running":
            yield "decode_finishes"
        if self.decode_engine == "cancelling":
            yield "decode_cancelled"
        if self.reads:
            yield "read_ok"
        if self.faults:
            if self.reads:
                yield "read_bad"
            if self.connected and not self.answers and not self.cancelled:
                yield "connection_lost"
            if self.prefill_stream and self.prefill_engine in ("waiting", "computing"):
                yield "prefill_engine_fails"
            if self.decode_engine in ("waiting", "reserved", "running"):
                yield "decode_engine_fails"
            if not self.cancelled and not self.answers:
                yield "router_cancels"

    def do(self, move: str) -> None:
        getattr(self, "_" + move)()

    def _decode_hears(self) -> None:
        message = self.to_decode.pop(0)
        machine = self.decode
        if message == "accepted":
            self.run_decode(machine.accepted())
        elif isinstance(message, prefill.SendStarted):
            self.run_decode(machine.started())
        elif isinstance(message, prefill.SendOffers):
            offers = [BlockOffer(i, b, 0, 0) for i, b in message.blocks]
            self.run_decode(machine.offered(offers))
        elif isinstance(message, prefill.SendFinished):
            token = None if self.ended_before else TokenOut(7)
            finish = FinishReason.STOP if self.ends_at_first or self.ended_before else None
            self.run_decode(machine.peer_finished(token, finish))
        elif message == "closed":
            self.run_decode(machine.peer_lost(WorkerLost("closed")))
        else:
            self.run_decode(machine.peer_lost(message))  # type: ignore[arg-type]

    def _prefill_hears(self) -> None:
        message = self.to_prefill.pop(0)
        if isinstance(message, decode.SendGrant):
            self.run_prefill(self.prefill.grant(message.block_indices))
        else:
            self.run_prefill(self.prefill.done())

    def _prefill_notices(self) -> None:
        self.run_prefill(self.prefill.lost(None))

    def _prefill_works(self) -> None:
        if self.ended_before:
            self.prefill_engine = "over"
            self.run_prefill(self.prefill.computed(api.Tokens(SEQ, 0, (), FinishReason.STOP)))
        elif self.prefill_engine == "waiting":
            self.prefill_engine = "computing"
            self.run_prefill(self.prefill.admitted())
        elif self.computed < self.blocks:
            block = api.BlockId(self.computed)
            ready = api.BlocksReady(SEQ, self.computed, (block,), None)
            self.computed += 1
            self.run_prefill(self.prefill.blocks(ready))
        else:
            self.prefill_engine = "held"
            tokens = api.Tokens(SEQ, 0, (TokenOut(7),))
            self.run_prefill(self.prefill.computed(tokens))

    def _reserve(self) -> None:
        self.decode_engine, self.lent = "reserved", True
        blocks = tuple(api.BlockId(i + 50) for i in range(self.blocks))
        self.run_decode(self.decode.reserved(api.Reserved(SEQ, 0, blocks, CachedTokens())))

    def _decode_finishes(self) -> None:
        self.decode_engine = "over"
        event = api.Tokens(SEQ, 0, (TokenOut(7), TokenOut(8)), FinishReason.LENGTH)
        self.run_decode(self.decode.tokens(event))

    def _decode_cancelled(self) -> None:
        self.decode_engine = "over"
        self.run_decode(self.decode.engine_failed(Cancelled("cancelled")))

    def _read_ok(self) -> None:
        read = self.reads.pop(0)
        self.run_decode(self.decode.read_done(read.offers, REPORT))

    def _read_bad(self) -> None:
        self.faults -= 1
        read = self.reads.pop(0)
        self.run_decode(self.decode.read_failed(read.offers, ChecksumMismatch("flipped")))

    def _connection_lost(self) -> None:
        self.faults -= 1
        self.connected = False
        self.run_decode(self.decode.peer_lost(WorkerLost("reset")))

    def _prefill_engine_fails(self) -> None:
        self.faults -= 1
        self.prefill_engine = "over"
        self.run_prefill(self.prefill.failed(DeadlineExceeded("late")))

    def _decode_engine_fails(self) -> None:
        self.faults -= 1
        self.decode_engine = "over"
        self.run_decode(self.decode.engine_failed(DeadlineExceeded("late")))

    def _router_cancels(self) -> None:
        self.faults -= 1
        self.cancelled = True
        self.run_decode(self.decode.cancel(Cancelled("the client left")))

    def key(self) -> str:
        return repr(
            (
                vars(self.decode),
                vars(self.prefill),
                [v for k, v in sorted(vars(self).items()) if k not in ("decode", "prefill")],
            )
        )

    def check_end(self, path: tuple[str, ...]) -> None:
        assert self.ended == 1, path
        assert self.cancelled or len(self.answers) == 1, path
        assert len(self.answers) <= 1, path
        if "finish" in self.answers:
            expected = 0 if self.ended_before else 1 if self.ends_at_first else 2
            assert self.tokens == expected, path
        assert not self.lent, path
        assert not self.reads, path
        assert self.decode_engine in ("none", "over"), path
        assert self.prefill_engine == "over" or not self.prefill_stream, path
        assert self.prefill.state is prefill.State.CLOSED, path
        assert self.decode.state is decode.State.ENDED, path


def explore(world: World) -> tuple[int, int]:
    """Depth-first over every interleaving; returns (states, ends)."""
    seen: set[str] = set()
    ends = 0
    stack: list[tuple[World, tuple[str, ...]]] = [(world, ())]
    while stack:
        current, path = stack.pop()
        key = current.key()
        if key in seen:
            continue
        seen.add(key)
        moves = list(current.moves())
        if not any(move in moves for move in moves if move not in _FAULTS):
            current.check_end(path)
            ends += 1
            continue
        for move in moves:
            following = deepcopy(current)
            following.do(move)
            stack.append((following, (*path, move)))
    return len(seen), ends


_FAULTS = {
    "read_bad",
    "connection_lost",
    "prefill_engine_fails",
    "decode_engine_fails",
    "router_cancels",
}


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("ends_at_first", [False, True])
@pytest.mark.parametrize("faults", [0, 1, 2])
def test_every_interleaving_ends_once_and_gives_everything_back(
    blocks: int, ends_at_first: bool, faults: int
) -> None:
    world = World(blocks=blocks, ends_at_first=ends_at_first)
    world.faults = faults
    states, ends = explore(world)
    print(f"{states} states, {ends} ends")
    assert ends >= 1
    assert states > 8


@pytest.mark.parametrize("faults", [0, 1, 2])
def test_a_sequence_that_had_ended_before_it_came_ends_once_too(faults: int) -> None:
    world = World(blocks=1, ends_at_first=False, ended_before=True)
    world.faults = faults
    states, ends = explore(world)
    print(f"{states} states, {ends} ends")
    assert ends >= 1
    assert states >= 5 * (1 + faults)


def test_only_an_ending_may_come_before_the_start() -> None:
    machine = decode.DecodeAttempt(SEQ, 3, with_peer=True)
    machine.accepted()
    with pytest.raises(ProtocolError):
        machine.peer_finished(TokenOut(7), None)
    emit, done, end = machine.peer_finished(None, FinishReason.STOP)
    assert emit == decode.Emit((), 3, FinishReason.STOP, None)
    assert (done, end) == (decode.SendDone(), decode.End()), "no engine was asked"


def receiving(finish_first: bool) -> tuple[decode.DecodeAttempt, list[BlockOffer]]:
    """One block is wanted; the prefill worker told its token before or after it offered that.

    What was offered before may have been computed with: its bytes are awaited.
    """
    machine = decode.DecodeAttempt(SEQ, 5, with_peer=True)
    machine.accepted()
    machine.started()
    machine.reserved(api.Reserved(SEQ, 0, (api.BlockId(9),), CachedTokens()))
    offers = [BlockOffer(0, 0, 0, 0)]
    told = [decode.Emit((TokenOut(7),), 5, None, None)]
    if finish_first:
        assert machine.peer_finished(TokenOut(7), None) == told
    machine.offered(offers)
    if not finish_first:
        assert machine.peer_finished(TokenOut(7), None) == []
    return machine, offers


@pytest.mark.parametrize("finish_first", [False, True])
def test_the_first_token_waits_for_no_later_block_and_goes_out_once(finish_first: bool) -> None:
    machine, offers = receiving(finish_first)
    told = [] if finish_first else [decode.Emit((TokenOut(7),), 5, None, None)]
    assert machine.read_done(offers, REPORT) == [
        *told,
        decode.Post(api.ImportDone(SEQ, TokenOut(7))),
        decode.SendDone(),
    ]
    again = api.Tokens(SEQ, 5, (TokenOut(7),))
    assert machine.tokens(again) == [decode.Emit((), 6, None, again)]
    second = api.Tokens(SEQ, 6, (TokenOut(8),))
    assert machine.tokens(second) == [decode.Emit((TokenOut(8),), 6, None, second)]


def test_no_token_is_told_before_there_is_a_place_for_the_next_one() -> None:
    """Whoever is refused is refused whole, and goes elsewhere without a stream to wait for."""
    full, roomy = (decode.DecodeAttempt(SEQ, 5, with_peer=True) for _ in range(2))
    for machine in (full, roomy):
        machine.accepted()
        machine.started()
        assert machine.peer_finished(TokenOut(7), None) == []
    refused = full.engine_failed(Overloaded("no place"))
    assert not any(isinstance(effect, decode.Emit) for effect in refused)
    reserved = roomy.reserved(api.Reserved(SEQ, 0, (api.BlockId(9),), CachedTokens()))
    assert reserved == [decode.SendGrant((0,)), decode.Emit((TokenOut(7),), 5, None, None)]


def test_the_first_token_waits_for_the_blocks_that_it_was_computed_from() -> None:
    """Of three blocks two were offered before it: only how these arrive speaks for it."""
    machine = decode.DecodeAttempt(SEQ, 5, with_peer=True)
    machine.accepted()
    machine.started()
    blocks = tuple(api.BlockId(block) for block in (9, 8, 7))
    machine.reserved(api.Reserved(SEQ, 0, blocks, CachedTokens()))
    first, second, third = ([BlockOffer(i, i, 0, 0)] for i in range(3))
    machine.offered(first)
    machine.offered(second)
    assert machine.peer_finished(TokenOut(7), None, from_cache=1) == []
    machine.offered(third)
    assert machine.read_done(second, REPORT) == []
    assert machine.read_done(first, REPORT) == [decode.Emit((TokenOut(7),), 5, None, None)]
    assert machine.read_done(third, REPORT) == [
        decode.Post(api.ImportDone(SEQ, TokenOut(7), from_cache=1)),
        decode.SendDone(),
    ]


@pytest.mark.parametrize("finish_first", [False, True])
def test_after_a_damaged_block_the_first_token_is_all_that_was_told(finish_first: bool) -> None:
    machine, offers = receiving(finish_first)
    failed = machine.read_failed(offers, ChecksumMismatch("one bit"))
    assert isinstance(failed[0], decode.EmitFailure)
    assert decode.DropPeer((0,)) in failed
    assert not any(isinstance(effect, decode.Emit) for effect in failed)
    assert decode.Post(api.ImportFailed(SEQ, 0)) in failed


def test_an_offer_that_was_not_granted_is_a_protocol_error() -> None:
    machine = decode.DecodeAttempt(SEQ, 0, with_peer=True)
    machine.accepted()
    machine.started()
    machine.reserved(api.Reserved(SEQ, 2, (api.BlockId(9),), CachedTokens()))
    with pytest.raises(ProtocolError):
        machine.offered([BlockOffer(1, 0, 0, 0)])
    machine.offered([BlockOffer(2, 0, 0, 0)])
    with pytest.raises(ProtocolError):
        machine.offered([BlockOffer(2, 0, 0, 0)])


def test_a_grant_must_ascend_within_the_prompt() -> None:
    for indices in ([3], [-1], [1, 1], [1, 0]):
        machine = prefill.PrefillHandOff(SEQ, 3)
        machine.admitted()
        with pytest.raises(ProtocolError):
            machine.grant(indices)


def test_only_granted_blocks_are_offered_and_each_once() -> None:
    machine = prefill.PrefillHandOff(SEQ, 3)
    machine.admitted()
    ready = api.BlocksReady(SEQ, 0, (api.BlockId(4), api.BlockId(5)), None)
    assert machine.blocks(ready) == []
    offers = machine.grant([1, 2])
    assert offers == [prefill.SendOffers(((1, api.BlockId(5)),))]
    later = machine.blocks(api.BlocksReady(SEQ, 2, (api.BlockId(6),), None))
    assert later == [prefill.SendOffers(((2, api.BlockId(6)),))]


def test_a_request_of_one_token_is_offered_nothing() -> None:
    machine = prefill.PrefillHandOff(SEQ, 1, moves=False)
    machine.admitted()
    assert machine.grant([0]) == []
    assert machine.blocks(api.BlocksReady(SEQ, 0, (api.BlockId(4),), None)) == []
    tokens = api.Tokens(SEQ, 0, (TokenOut(7),), FinishReason.LENGTH)
    assert machine.computed(tokens) == [prefill.SendFinished(tokens)]
