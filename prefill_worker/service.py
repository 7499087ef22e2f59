"""``Prefill.Run``: one attempt of one decode worker, from its first message to the last block read.

Everything that happens to an attempt (wire messages, engine events, the lease running out) lines up
in one inbox and goes through the state machine of prefill_worker/protocol.py; this module performs
the effects. Whatever ends the stream, the engine's blocks are given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from kv_transfer.base import BlockExporter, Endpoint
from kv_transfer.convert import endpoint_to_proto, offer_to_proto
from pdserve.engine import api
from pdserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    LayoutMismatch,
    ProtocolError,
    StaleIncarnation,
    WorkerLost,
)
from pdserve.faults import Step, board
from pdserve.rpc import convert
from pdserve.rpc.convert_timeline import phases_to_proto
from pdserve.types import PROTOCOL_VERSION, WorkerFacts, WorkerId
from pdserve.v1 import kv_pb2, kv_pb2_grpc
from pdserve.worker.bridge import EngineBridge, SequenceEvent
from pdserve.worker.wire import submit_from_wire
from prefill_worker.protocol import (
    Effect,
    Post,
    PrefillHandOff,
    SendFinished,
    SendOffers,
    SendStarted,
)

logger = logging.getLogger(__name__)

# A lease that ran out is over after so long without a word: when this process stood still, what the
# peer said meanwhile is yet to be read from its connection. What the engine says is no word of it.
LAST_WORDS_S = 0.25


@dataclass(frozen=True, slots=True)
class _PeerClosed:
    error: ProtocolError | None = None  # what it is still told


_Item = SequenceEvent | kv_pb2.DecodeToPrefill | _PeerClosed


class PrefillService(kv_pb2_grpc.PrefillServicer):
    """Serves hand-offs of one engine; the number of live attempts is bounded by the engine."""

    def __init__(
        self,
        bridge: EngineBridge,
        exporter: BlockExporter,
        facts: Callable[[], WorkerFacts],
        lease_s: float,
        draining: Callable[[], bool],
    ) -> None:
        self._bridge = bridge
        self._exporter = exporter
        self._facts = facts
        self._lease_s = lease_s
        self._draining = draining
        # Checksums read whole blocks; they must not hold up the event loop.
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="offer")
        self.attempts = 0

    async def Run(
        self,
        request_iterator: AsyncIterator[kv_pb2.DecodeToPrefill],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[kv_pb2.PrefillToDecode]:
        first = await anext(request_iterator, None)
        if first is None:
            return
        submit = self._admit(first)
        board.hit(Step.PREFILL_ACCEPT)
        attempt = _Attempt(self, submit)
        self.attempts += 1
        reader = asyncio.create_task(attempt.read_wire(request_iterator))
        try:
            yield self._accepted()
            self._bridge.submit(submit, attempt.inbox.put_nowait)
            async for message in attempt.messages():
                yield message
        finally:
            # Nothing of this is left out when the call is cancelled here as well.
            attempt.give_back()
            self._bridge.forget(submit.seq)
            self.attempts -= 1
            reader.cancel()
            try:
                (end,) = await asyncio.gather(reader, return_exceptions=True)
                if isinstance(end, Exception):
                    logger.error("hand-off %s: its stream broke", submit.seq.hex(), exc_info=end)
            finally:
                self._bridge.late(attempt.read_out())

    def close(self) -> None:
        self._hashing.shutdown(wait=True)

    def _admit(self, first: kv_pb2.DecodeToPrefill) -> api.Submit:
        if first.WhichOneof("message") != "start":
            raise ProtocolError("the first message of Prefill.Run must be start")
        if self._draining():
            raise Draining("this prefill worker is draining")
        return start_to_submit(first.start, self._facts())

    def _accepted(self) -> kv_pb2.PrefillToDecode:
        endpoint: Endpoint = self._exporter.endpoint()
        return kv_pb2.PrefillToDecode(
            accepted=kv_pb2.Accepted(
                endpoint=endpoint_to_proto(endpoint), queue_length=self.attempts
            )
        )

    async def offers(self, effect: SendOffers) -> kv_pb2.PrefillToDecode:
        loop = asyncio.get_running_loop()
        offers = await loop.run_in_executor(
            self._hashing,
            lambda: [offer_to_proto(offer) for offer in self._exporter.offers(effect.blocks)],
        )
        return kv_pb2.PrefillToDecode(offer=kv_pb2.Offer(blocks=offers))

    @property
    def worker(self) -> WorkerId:
        return self._facts().id

    @property
    def lease_s(self) -> float:
        return self._lease_s

    def post(self, command: api.Command) -> None:
        self._bridge.post(command)


class _Attempt:
    """One stream: its inbox, its state machine and its lease."""

    def __init__(self, service: PrefillService, submit: api.Submit) -> None:
        self.inbox: asyncio.Queue[_Item] = asyncio.Queue()
        self._looked_at: _Item | None = None  # taken from the inbox; it is the next one
        self._in_hand = 0  # of the engine's events: what it says is made, or on its way
        self._service = service
        blocks = -(-len(submit.tokens.token_ids) // service._facts().model.block_size)
        moves = submit.sampling.max_tokens - submit.tokens.generated > 1
        self._machine = PrefillHandOff(submit.seq, blocks, moves)
        self._keys = submit.tokens.block_keys
        self._heard = time.monotonic()
        # Whatever is heard: who keeps the call alive need not be who still reads the blocks.
        self._over = submit.deadline + service.lease_s
        # The word after which the lease was found to have run out, and when that becomes final.
        self._last_word, self._final = 0.0, 0.0

    async def read_wire(self, requests: AsyncIterator[kv_pb2.DecodeToPrefill]) -> None:
        try:
            async for message in requests:
                self._heard = time.monotonic()
                if message.WhichOneof("message") != "keep_alive":
                    self.inbox.put_nowait(message)
        except grpc.aio.UsageError:
            logger.debug("hand-off stream was closed while it was read")
        except DecodeError:
            error = ProtocolError("a message of the hand-off could not be parsed")
            self.inbox.put_nowait(_PeerClosed(error))
            return
        self.inbox.put_nowait(_PeerClosed())

    async def messages(self) -> AsyncIterator[kv_pb2.PrefillToDecode]:
        while True:
            for effect in await self._next_effects():
                self._in_hand = int(isinstance(effect, SendStarted | SendOffers | SendFinished))
                if isinstance(effect, SendStarted):
                    board.hit(Step.PREFILL_START)
                    yield kv_pb2.PrefillToDecode(started=kv_pb2.Started())
                elif isinstance(effect, SendOffers):
                    for ahead in self._token_ahead():
                        yield self._finished(ahead)
                    board.hit(Step.PREFILL_OFFER)
                    yield await self._service.offers(effect)
                elif isinstance(effect, SendFinished):
                    yield self._finished(effect)
                elif isinstance(effect, Post):
                    self._service.post(effect.command)
                else:
                    if effect.error is not None:
                        raise effect.error
                    return
                self._in_hand = 0

    def give_back(self) -> None:
        """The stream ended in some way of its own: whatever is still held is released."""
        for effect in self._machine.lost(None):
            if isinstance(effect, Post):
                self._service.post(effect.command)

    def read_out(self) -> int:
        """After the end: blocks that the peer denounced are forgotten all the same.

        Returns how many of the engine's events lie here that nobody will hear of, or that were on
        their way when the stream ended.
        """
        unheard, self._in_hand = self._in_hand, 0
        left = [] if self._looked_at is None else [self._looked_at]
        while not self.inbox.empty():
            left.append(self.inbox.get_nowait())
        for item in left:
            if isinstance(item, kv_pb2.DecodeToPrefill):
                self._forget(item.cancel.suspect_blocks)  # none in a message of another kind
            else:
                unheard += not isinstance(item, _PeerClosed | api.Failed)
        return unheard

    async def _next_effects(self) -> list[Effect]:
        now, until = time.monotonic(), self._heard + self._service.lease_s
        if now >= self._over:
            logger.warning("hand-off %s: open after its deadline", self._machine.seq.hex())
            return self._machine.lost(DeadlineExceeded("the request's deadline has passed"))
        if now >= until:
            if self._last_word != self._heard:
                self._last_word, self._final = self._heard, now + LAST_WORDS_S
            until = self._final
        item = await self._next_item(min(until, self._over) - now)
        if item is None:
            if self._last_word != self._heard or time.monotonic() < self._final:
                return []  # heard meanwhile, or found to have run out by the next call
            logger.warning("hand-off %s: lease expired", self._machine.seq.hex())
            return self._machine.lost(
                WorkerLost(f"no message from the decode worker for {self._service.lease_s} s")
            )
        return self._step(item)

    def _token_ahead(self) -> list[SendFinished]:
        """The token that came with the blocks that are to be offered, if it did: it need not wait
        for their checksums. Nothing else is taken out of turn, so that no step is begun before all
        that the one before it asks for is done."""
        if self._looked_at is None and not self.inbox.empty():
            self._looked_at = self.inbox.get_nowait()
        if not isinstance(self._looked_at, api.Tokens):
            return []
        tokens, self._looked_at = self._looked_at, None
        return self._machine.computed(tokens)

    async def _next_item(self, timeout_s: float) -> _Item | None:
        if self._looked_at is not None:
            item, self._looked_at = self._looked_at, None
            return item
        try:
            return await asyncio.wait_for(self.inbox.get(), max(0.0, timeout_s))
        except TimeoutError:
            return None

    def _step(self, item: _Item) -> list[Effect]:
        machine = self._machine
        if isinstance(item, _PeerClosed):
            return machine.lost(item.error)
        if isinstance(item, kv_pb2.DecodeToPrefill):
            return self._wire(item)
        if isinstance(item, api.Admitted):
            return machine.admitted()
        if isinstance(item, api.BlocksReady):
            return machine.blocks(item)
        if isinstance(item, api.Tokens):
            return [*machine.computed(item)]
        if isinstance(item, api.Failed):
            return machine.failed(item.error)
        raise ProtocolError(f"a prefill attempt got {type(item).__name__}")

    def _wire(self, message: kv_pb2.DecodeToPrefill) -> list[Effect]:
        kind = message.WhichOneof("message")
        try:
            if kind == "grant":
                return self._machine.grant(list(message.grant.block_indices))
            if kind == "done":
                return self._machine.done()
            if kind == "cancel":
                self._forget(message.cancel.suspect_blocks)
                return self._machine.lost(Cancelled(message.cancel.reason))
            raise ProtocolError(f"unexpected message {kind} in a hand-off")
        except ProtocolError as error:
            return self._machine.lost(error)

    def _forget(self, suspect: Sequence[int]) -> None:
        """Blocks that arrived damaged may lie here like that: they and what builds on them go."""
        keys = self._keys[min(suspect) :] if suspect else ()
        if keys:
            logger.warning("hand-off %s: %d suspect blocks", self._machine.seq.hex(), len(keys))
            self._service.post(api.Forget(keys))

    def _finished(self, effect: SendFinished) -> kv_pb2.PrefillToDecode:
        board.hit(Step.PREFILL_FINISH)
        event = effect.tokens
        finished = kv_pb2.PrefillFinished(
            finish_reason=convert.finish_reason_to_proto(event.finish),
            cached_tokens=convert.cached_tokens_to_proto(event.cached),
            chunks=[convert.chunk_timing_to_proto(c) for c in self._machine.chunks],
            prompt_logprobs=convert.prompt_logprobs_to_proto(event.prompt_logprobs),
            preemptions=event.preemptions,
            phases=phases_to_proto(event.phases, self._service.worker),
        )
        if event.tokens:
            finished.first_token.CopyFrom(convert.token_out_to_proto(event.tokens[0]))
        return kv_pb2.PrefillToDecode(finished=finished)


def start_to_submit(start: kv_pb2.StartPrefill, facts: WorkerFacts) -> api.Submit:
    """Checks that both workers mean the same thing, then the tokens themselves."""
    if start.protocol_version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"protocol version {start.protocol_version}; this worker speaks {PROTOCOL_VERSION}"
        )
    if start.expected_incarnation != facts.incarnation:
        raise StaleIncarnation("this prefill worker was restarted since it was chosen")
    if start.layout_fingerprint != facts.model.fingerprint:
        raise LayoutMismatch("the decode worker's KV layout differs from this worker's")
    return submit_from_wire(
        attempt_id=start.attempt_id,
        job=api.Job.PREFILL,
        tokens=start.tokens,
        sampling=start.sampling,
        priority=start.priority,
        remaining_ms=start.remaining_ms,
        model=facts.model,
    )
