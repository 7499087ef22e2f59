"""A step that breaks ends its attempt: the router is told once, and both workers get all back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from decode_worker.attempt import Attempt
from kv_transfer.base import BlockOffer, Endpoint, ReadReport
from kv_transfer.convert import endpoint_to_proto, offer_to_proto
from pdserve.engine import api
from pdserve.errors import Cancelled, InternalError
from pdserve.faults import Action, Fault, Step, board
from pdserve.rpc.convert import finish_reason_to_proto
from pdserve.types import (
    AttemptTokens,
    BlockKey,
    CachedTokens,
    FinishReason,
    Sampling,
    TokenOut,
    Transport,
)
from pdserve.v1 import kv_pb2, worker_pb2
from pdserve.worker.bridge import EngineBridge
from tests.prefill_facts import PREFILL_FACTS as FACTS

SEQ = api.SeqId(b"s" * 16)
ENDPOINT = Endpoint(
    FACTS.incarnation, FACTS.model.fingerprint, 10, 64, "h", 1, 0, "", "", b"", 0, ()
)
MESSAGES = kv_pb2.PrefillToDecode


class Call:
    """The call to the prefill worker, whose side the test plays."""

    def __init__(self) -> None:
        self.cancelled = False
        self.says: asyncio.Queue[kv_pb2.PrefillToDecode | None] = asyncio.Queue()

    def cancel(self) -> None:
        self.cancelled = True
        self.says.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[kv_pb2.PrefillToDecode]:
        while (message := await self.says.get()) is not None:
            yield message
        raise asyncio.CancelledError


class World:
    """One attempt with everything around it."""

    def __init__(self) -> None:
        self.posted: list[api.Command] = []
        self.told: list[worker_pb2.AttemptEvent] = []
        self.ends = 0
        self.call = Call()
        self.bridge = EngineBridge()
        self.bridge.attach(asyncio.get_running_loop(), self.posted.append, None, None)
        services: Any = SimpleNamespace(
            bridge=self.bridge,
            facts=FACTS,
            stubs=SimpleNamespace(stub=lambda address: SimpleNamespace(Run=lambda says: self.call)),
            open_reader=_open,
            read=_read,
            keep_alive_s=1.0,
            peer_lost=lambda incarnation, gone: None,
            late_read=lambda: None,
        )
        start = worker_pb2.StartAttempt(attempt_id=SEQ)
        start.prefill.worker_id = "p0"
        start.prefill.incarnation = FACTS.incarnation
        tokens = AttemptTokens(
            token_ids=(1, 2, 3), prompt_len=3, key_root=BlockKey(b"r" * 16), block_keys=()
        )
        submit = api.Submit(SEQ, api.Job.GENERATE, tokens, Sampling(max_tokens=4))
        self.attempt = Attempt(services, start, submit, self.told.append, self._ended)

    def _ended(self) -> None:
        self.ends += 1

    async def peer(self, message: kv_pb2.PrefillToDecode) -> None:
        self.call.says.put_nowait(message)
        await asyncio.sleep(0.01)

    async def engine(self, event: api.Event) -> None:
        self.bridge.sink([event])
        await asyncio.sleep(0.01)


async def _open(endpoint: Endpoint) -> Any:
    return SimpleNamespace(transport=Transport.SHM)


async def _read(*_given: object) -> ReadReport:
    return ReadReport(64, 1.0, 2.0)


async def until_offered(world: World, first: bool = True) -> None:
    """Granted, and with the first token told by the peer, but for the block itself."""
    world.attempt.begin()
    await asyncio.sleep(0.01)
    await world.peer(MESSAGES(accepted=kv_pb2.Accepted(endpoint=endpoint_to_proto(ENDPOINT))))
    await world.peer(MESSAGES(started=kv_pb2.Started()))
    await world.engine(api.Reserved(SEQ, 0, (api.BlockId(3),), CachedTokens()))
    if first:
        token = kv_pb2.TokenOut(token_id=5)
        await world.peer(MESSAGES(finished=kv_pb2.PrefillFinished(first_token=token)))


async def the_block_comes(world: World) -> None:
    await until_offered(world)
    await world.peer(MESSAGES(offer=kv_pb2.Offer(blocks=[offer_to_proto(BlockOffer(0, 1, 0, 0))])))
    await asyncio.sleep(0.02)


async def it_ends_at_its_first_token(world: World) -> None:
    await until_offered(world, first=False)
    finished = kv_pb2.PrefillFinished(
        first_token=kv_pb2.TokenOut(token_id=5),
        finish_reason=finish_reason_to_proto(FinishReason.STOP),
    )
    await world.peer(MESSAGES(finished=finished))


async def it_writes(world: World) -> None:
    await the_block_comes(world)
    await world.engine(api.Tokens(SEQ, 0, (TokenOut(5), TokenOut(6)), None))


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    board.clear()
    yield
    board.clear()


@pytest.mark.parametrize(
    ("step", "nth", "story"),
    [
        (Step.DECODE_GRANT, 1, until_offered),
        (Step.DECODE_READ, 1, the_block_comes),
        (Step.DECODE_TOKENS, 1, until_offered),
        (Step.DECODE_COMMIT, 1, the_block_comes),
        (Step.DECODE_TOKENS, 1, it_ends_at_its_first_token),
        (Step.DECODE_TOKENS, 2, it_writes),
    ],
)
def test_the_router_is_told_and_nothing_stays_held(
    step: Step, nth: int, story: Callable[[World], Any]
) -> None:
    async def play() -> World:
        world = World()
        board.arm(Fault(step, Action.RAISE, nth))
        await story(world)
        await world.engine(api.Failed(SEQ, Cancelled("as asked")))
        return world

    fired = board.fired
    world = asyncio.run(play())
    assert board.fired == fired + 1, "the step was not reached"
    kinds = [type(command) for command in world.posted]
    assert api.Cancel in kinds
    assert kinds.count(api.ImportDone) + kinds.count(api.ImportFailed) == 1, "the loan ends once"
    assert world.call.cancelled, "the prefill worker would hold its blocks on"
    failures = [event.failure for event in world.told if event.HasField("failure")]
    assert [failure.code for failure in failures] == [InternalError("").code]
    assert world.told[-1].HasField("failure"), "something came after the end"
    assert world.ends == 1


def test_a_last_word_that_makes_no_sense_is_the_last_all_the_same() -> None:
    """The engine says no more of it: who waits on would wait for ever."""

    async def play() -> World:
        world = World()
        await until_offered(world, first=False)
        await world.engine(api.Tokens(SEQ, 0, (TokenOut(5),), FinishReason.STOP))
        return world

    world = asyncio.run(play())
    assert world.call.cancelled
    (event,) = world.told
    assert event.failure.code == InternalError("").code
    assert world.ends == 1
    assert world.bridge.listening == 0
