"""Performs one attempt: connects its state machine to engine, prefill peer, reads and router.

Everything runs on the worker's event loop; only reads of blocks run on threads. The order of one
hand-off is in decode_worker/protocol.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from decode_worker import protocol
from decode_worker.facts import AttemptRecord
from decode_worker.peer import PeerStubs, PrefillPeer
from kv_transfer.base import BlockOffer, BlockReader, Endpoint, ReadReport
from kv_transfer.convert import endpoint_from_proto, offers_from_proto
from pdserve.engine import api
from pdserve.errors import (
    DeadlineExceeded,
    InternalError,
    LayoutMismatch,
    PdserveError,
    StaleIncarnation,
    TransferError,
    WorkerLost,
)
from pdserve.faults import Step, board
from pdserve.rpc import convert
from pdserve.rpc.convert_timeline import phases_from_proto
from pdserve.types import PROTOCOL_VERSION, Incarnation, WorkerFacts
from pdserve.v1 import inference_pb2, kv_pb2, worker_pb2
from pdserve.worker.bridge import EngineBridge, SequenceEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttemptServices:
    """What all attempts of a worker share."""

    bridge: EngineBridge
    facts: WorkerFacts
    stubs: PeerStubs
    # Both run on threads of their own: opening may connect, reading copies.
    open_reader: Callable[[Endpoint], Awaitable[BlockReader]]
    read: Callable[
        [BlockReader, tuple[BlockOffer, ...], tuple[int, ...], float], Awaitable[ReadReport]
    ]
    keep_alive_s: float
    # What is open to an incarnation that cannot be reached; True: it is known to be over.
    peer_lost: Callable[[Incarnation, bool], None]
    # A read of KV returned to an attempt that was over.
    late_read: Callable[[], None]


def elsewhere(error: PdserveError) -> bool:
    """Whether another pair may do what this one could not; a bad request fails anywhere."""
    return error.retryable or isinstance(error, TransferError | InternalError)


def refusal(attempt_id: bytes, error: PdserveError) -> worker_pb2.AttemptEvent:
    """The end of an attempt of which nothing else is told."""
    return worker_pb2.AttemptEvent(
        attempt_id=attempt_id,
        failure=worker_pb2.AttemptFailure(
            code=error.code,
            message=str(error),
            retryable=elsewhere(error),
            retry_after_ms=int(1000 * (error.retry_after_s or 0)),
        ),
    )


def _is_last(event: SequenceEvent) -> bool:
    return isinstance(event, api.Failed) or (
        isinstance(event, api.Tokens) and event.finish is not None
    )


class Attempt:
    """One StartAttempt. ``emit`` hands events to the session; ``ended`` comes last."""

    def __init__(
        self,
        services: AttemptServices,
        start: worker_pb2.StartAttempt,
        submit: api.Submit,
        emit: Callable[[worker_pb2.AttemptEvent], None],
        ended: Callable[[], None],
    ) -> None:
        self._services = services
        self._start = start
        self._submit = submit
        self._emit = emit
        self._ended = ended
        with_peer = start.HasField("prefill")
        self._machine = protocol.DecodeAttempt(submit.seq, submit.tokens.generated, with_peer)
        self._record = AttemptRecord(
            services.facts.model.block_size,
            prefill_worker=start.prefill.worker_id if with_peer else "",
            skip_reason=start.skip_reason or ("" if with_peer else "local"),
        )
        self._peer: PrefillPeer | None = None
        self._peer_blocks = 0
        self._reader: asyncio.Future[BlockReader] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Sent with the first tokens.
        self._prompt_logprobs: list[inference_pb2.TokenLogprob] = []
        # So are the facts; again with the next ones after the last block arrived, and at the end.
        self._facts_due = True
        self._end_told = False  # the router knows how it ended

    def begin(self) -> None:
        board.hit(Step.DECODE_START)
        if self._start.HasField("prefill"):
            self._spawn(self._follow_peer())
        else:
            self._services.bridge.submit(self._submit, self._on_engine)

    def cancel(self, reason: PdserveError) -> None:
        self._perform(self._machine.cancel(reason))

    # ---- the peer

    async def _follow_peer(self) -> None:
        if self._machine.answered:
            return  # cancelled before this task ran: nobody would end the call
        peer = PrefillPeer(
            self._services.stubs.stub(self._start.prefill.address),
            self._start_prefill(),
            self._services.keep_alive_s,
        )
        self._peer = peer
        try:
            async for message in peer.messages():
                self._perform(self._on_peer(message))
            self._perform(self._machine.peer_lost(WorkerLost("prefill closed the hand-off")))
        except PdserveError as error:
            if isinstance(error, WorkerLost) and not peer.dropped:
                gone = isinstance(error, StaleIncarnation)
                self._services.peer_lost(Incarnation(self._start.prefill.incarnation), gone)
            peer.drop()
            self._perform(self._machine.peer_lost(error))

    def _on_peer(self, message: kv_pb2.PrefillToDecode) -> list[protocol.Effect]:
        kind = message.WhichOneof("message")
        if kind == "accepted":
            endpoint = endpoint_from_proto(message.accepted.endpoint)
            if endpoint.incarnation != self._start.prefill.incarnation:
                raise StaleIncarnation("the prefill worker is not the one that was chosen")
            if endpoint.fingerprint != self._services.facts.model.fingerprint:
                raise LayoutMismatch("the prefill worker's KV layout differs from this worker's")
            self._peer_blocks = endpoint.num_blocks
            self._reader = asyncio.ensure_future(self._services.open_reader(endpoint))
            return self._machine.accepted()
        if kind == "started":
            self._record.started()
            return self._machine.started()
        if kind == "offer":
            return self._machine.offered(self._offers(message.offer))
        if kind == "finished":
            return self._peer_finished(message.finished)
        return []  # a message of a later version: nothing that this one waits for

    def _offers(self, offer: kv_pb2.Offer) -> tuple[BlockOffer, ...]:
        size = self._services.facts.model.block_size
        prompt_blocks = -(-len(self._submit.tokens.token_ids) // size)
        return offers_from_proto(offer, prompt_blocks, self._peer_blocks)

    def _peer_finished(self, finished: kv_pb2.PrefillFinished) -> list[protocol.Effect]:
        record = self._record
        record.cached = convert.cached_tokens_from_proto(finished.cached_tokens)
        record.chunks = tuple(convert.chunk_timing_from_proto(c) for c in finished.chunks)
        record.preemptions += finished.preemptions
        record.peer_phases = phases_from_proto(finished.phases)
        finish = convert.finish_reason_from_proto(finished.finish_reason)
        token = None
        if finished.HasField("first_token"):
            token = convert.token_out_from_proto(finished.first_token)
        if finish is not None:
            record.ended_at_first_token()
        self._prompt_logprobs = list(finished.prompt_logprobs)
        # What it read from Redis is there already.
        cached = record.cached.device + record.cached.host
        from_cache = cached // self._services.facts.model.block_size
        return self._machine.peer_finished(token, finish, from_cache)

    def _start_prefill(self) -> kv_pb2.StartPrefill:
        start, facts = self._start, self._services.facts
        return kv_pb2.StartPrefill(
            attempt_id=start.attempt_id,
            request_id=start.request_id,
            tokens=start.tokens,
            sampling=start.sampling,
            remaining_ms=start.remaining_ms,
            expected_incarnation=start.prefill.incarnation,
            decode_incarnation=facts.incarnation,
            layout_fingerprint=facts.model.fingerprint,
            priority=start.priority,
            protocol_version=PROTOCOL_VERSION,
        )

    # ---- reads

    async def _read(self, effect: protocol.Read) -> None:
        assert self._reader is not None, "an offer follows accepted"
        try:
            board.hit(Step.DECODE_READ)
            reader = await self._reader
            try:
                report = await self._services.read(
                    reader, effect.offers, effect.into, self._submit.deadline
                )
                self._record.read(effect.offers, report, reader.transport)
            finally:
                if self._machine.answered:
                    self._services.late_read()
        except PdserveError as error:
            logger.warning("attempt %s: %s", self._submit.seq.hex(), error)
            if isinstance(error, DeadlineExceeded) and time.monotonic() < self._submit.deadline:
                # The read's bound passed, not the request's: there is time to try elsewhere.
                error = TransferError(str(error))
            self._perform(self._machine.read_failed(effect.offers, error))
        except Exception:
            # Our own bug; unless it is told, the blocks that were lent for it never come back.
            logger.exception("attempt %s: a read broke", self._submit.seq.hex())
            broken = InternalError("the decode worker failed to read KV")
            self._perform(self._machine.read_failed(effect.offers, broken))
        else:
            self._perform(self._machine.read_done(effect.offers, report))

    # ---- the engine

    def _on_engine(self, event: SequenceEvent) -> None:
        if self._machine.answered and not isinstance(event, api.Failed):
            self._services.bridge.late(1)
        try:
            effects = self._engine_says(event)
        except Exception as error:
            self._broke(error)
            if _is_last(event) and self._machine.state is not protocol.State.ENDED:
                # It says no more, and what waits for its last word waits for this.
                self._perform(self._machine.engine_failed(InternalError("broke at its end")))
        else:
            self._perform(effects)

    def _engine_says(self, event: SequenceEvent) -> list[protocol.Effect]:
        if isinstance(event, api.Tokens):
            return self._machine.tokens(event)
        if isinstance(event, api.Reserved):
            return self._machine.reserved(event)
        if isinstance(event, api.Failed):
            self._record.recorder.extend(event.phases)
            return self._machine.engine_failed(event.error)
        return []

    # ---- effects

    def _perform(self, effects: list[protocol.Effect]) -> None:
        """Does not raise. The machine counts all of them as done, and what they give back is held
        by others: one that breaks, which is a bug of ours, ends the attempt and not the rest."""
        broken: Exception | None = None
        for effect in effects:
            try:
                self._carry_out(effect)
            except Exception as error:
                broken = broken or error
        if broken is not None:
            self._broke(broken)

    def _carry_out(self, effect: protocol.Effect) -> None:
        if isinstance(effect, protocol.Emit):
            self._emit_tokens(effect)
        elif isinstance(effect, protocol.Post):
            self._tell_engine(effect.command)
        elif isinstance(effect, protocol.Read):
            self._spawn(self._read(effect))
        elif isinstance(effect, protocol.EmitFailure):
            self._emit_failure(effect)
        elif isinstance(effect, protocol.End):
            self._services.bridge.forget(self._submit.seq)
            self._ended()
        elif isinstance(effect, protocol.SubmitImport):
            submit = replace(self._submit, job=api.Job.IMPORT)
            self._services.bridge.submit(submit, self._on_engine)
        else:
            self._tell_peer(effect)

    def _tell_engine(self, command: api.Command) -> None:
        try:
            if isinstance(command, api.ImportDone):
                board.hit(Step.DECODE_COMMIT)
        finally:
            # A loan that the machine counts as over must be.
            self._services.bridge.post(command)

    def _tell_peer(
        self, effect: protocol.SendGrant | protocol.SendDone | protocol.DropPeer
    ) -> None:
        if self._peer is None:
            return  # cancelled before the call was opened
        if isinstance(effect, protocol.SendGrant):
            board.hit(Step.DECODE_GRANT)
            self._record.granted(len(effect.block_indices))
            self._peer.grant(effect.block_indices)
        elif isinstance(effect, protocol.SendDone):
            self._record.arrived()
            self._facts_due = True
            self._peer.done()
        elif effect.suspect:
            self._peer.denounce(effect.suspect)
            self._forget(effect.suspect)
        else:
            self._peer.drop()

    def _forget(self, suspect: tuple[int, ...]) -> None:
        """A tier that both workers share may hold what the peer's pool holds."""
        keys = self._submit.tokens.block_keys[min(suspect) :]
        if keys:
            self._services.bridge.post(api.Forget(keys))

    def _emit_tokens(self, effect: protocol.Emit) -> None:
        if effect.event is not None:
            self._note(effect.event)
        if not effect.tokens and effect.finish is None:
            return
        board.hit(Step.DECODE_TOKENS)
        event = worker_pb2.AttemptEvent(
            attempt_id=self._submit.seq,
            offset=effect.offset,
            tokens=[convert.token_out_to_proto(token) for token in effect.tokens],
        )
        if effect.finish is not None:
            event.finish_reason = convert.finish_reason_to_proto(effect.finish)
        event.prompt_logprobs.extend(self._prompt_logprobs)
        self._prompt_logprobs = []
        if effect.finish is not None or self._facts_due:
            self._facts_due = False
            event.facts.CopyFrom(self._record.to_proto())
            event.phases.extend(self._record.take_phases(self._services.facts.id))
        self._end_told |= effect.finish is not None
        self._emit(event)

    def _note(self, source: api.Tokens) -> None:
        record = self._record
        record.preemptions = max(record.preemptions, source.preemptions)
        record.recorder.extend(source.phases)
        if not self._start.HasField("prefill"):
            record.cached = source.cached
            record.chunks = source.chunks
            self._prompt_logprobs += convert.prompt_logprobs_to_proto(source.prompt_logprobs)

    def _emit_failure(self, effect: protocol.EmitFailure) -> None:
        error = effect.error
        retryable = elsewhere(error)
        failure = worker_pb2.AttemptFailure(
            code=error.code,
            message=str(error),
            retryable=retryable,
            retry_after_ms=int(1000 * (error.retry_after_s or 0)),
            suspect_worker=(
                self._start.prefill.worker_id if effect.peer_at_fault and retryable else ""
            ),
        )
        phases = self._record.take_phases(self._services.facts.id)
        self._emit(
            worker_pb2.AttemptEvent(attempt_id=self._submit.seq, failure=failure, phases=phases)
        )
        self._end_told = True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broke(error)

    def _broke(self, error: BaseException) -> None:
        """A bug of ours: the router is answered, and nobody goes on to hold anything for this."""
        logger.error("attempt %s broke", self._submit.seq.hex(), exc_info=error)
        failure = InternalError("the decode worker failed to serve this attempt")
        if not self._end_told:
            self._end_told = True
            self._emit(refusal(self._submit.seq, failure))
        self._perform(self._machine.cancel(failure))
        if self._peer is not None:
            # The machine may think that it was told.
            self._peer.drop()
