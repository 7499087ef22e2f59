"""``Decode.Session``: all attempts between one router and this worker, on one stream.

Inbound messages start and cancel attempts. Outbound, all that happened since the last message goes
out as one, so that an engine step with many sequences costs one message. When the stream ends, or
the router says nothing for too long (a stopped process closes no socket), every attempt of the
session is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc

from decode_worker.attempt import Attempt, AttemptServices, refusal
from pdserve.engine import api
from pdserve.errors import (
    Draining,
    InternalError,
    PdserveError,
    ProtocolError,
    StaleIncarnation,
    WorkerLost,
)
from pdserve.types import Incarnation
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from pdserve.worker.wire import submit_from_wire

logger = logging.getLogger(__name__)


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """Serves sessions of one engine."""

    def __init__(
        self, services: AttemptServices, silence_s: float, draining: Callable[[], bool]
    ) -> None:
        self._services = services
        self._silence_s = silence_s
        self._draining = draining
        self._sessions: set[_Session] = set()

    @property
    def attempts(self) -> int:
        return sum(len(session.attempts) for session in self._sessions)

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterToDecode],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[worker_pb2.DecodeToRouter]:
        # This router may be one that could not reach us, as we could not reach prefill workers.
        self._services.stubs.renew()
        session = _Session(self._services, self._draining)
        self._sessions.add(session)
        reader = asyncio.create_task(session.read(request_iterator))
        watchdog = asyncio.create_task(session.watch(self._silence_s))
        try:
            async for message in session.messages():
                yield message
        finally:
            session.abandon()
            self._sessions.discard(session)
            reader.cancel()
            watchdog.cancel()
            ends = await asyncio.gather(reader, watchdog, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):
                    logger.error("a router's session broke", exc_info=end)


class _Session:
    def __init__(self, services: AttemptServices, draining: Callable[[], bool]) -> None:
        self.attempts: dict[bytes, Attempt] = {}
        self._services = services
        self._draining = draining
        self._outbox: list[worker_pb2.AttemptEvent] = []
        self._in_hand = 0  # events of the message that is being sent: not known to be heard
        self._wake = asyncio.Event()
        self._closed = False
        self._heard = time.monotonic()

    async def read(self, requests: AsyncIterator[worker_pb2.RouterToDecode]) -> None:
        try:
            async for message in requests:
                self._heard = time.monotonic()
                kind = message.WhichOneof("message")
                if kind == "start":
                    self._start(message.start)
                elif kind == "cancel":
                    self._cancel(bytes(message.cancel.attempt_id))
                elif kind == "peer_gone":
                    gone = Incarnation(bytes(message.peer_gone.incarnation))
                    self._services.peer_lost(gone, True)
        finally:
            self._close()

    async def watch(self, silence_s: float) -> None:
        while True:
            quiet = time.monotonic() - self._heard
            if quiet >= silence_s:
                break
            await asyncio.sleep(silence_s - quiet)
        logger.warning("the router said nothing for %.1f s: its attempts are cancelled", quiet)
        # Here, since the stream may stand in the middle of a message that nobody takes.
        self.abandon()

    async def messages(self) -> AsyncIterator[worker_pb2.DecodeToRouter]:
        incarnation = self._services.facts.incarnation
        # The first message tells the router that the session stands.
        yield worker_pb2.DecodeToRouter(incarnation=incarnation)
        while not self._closed:
            await self._wake.wait()
            self._wake.clear()
            if self._outbox:
                events, self._outbox = self._outbox, []
                self._in_hand = len(events)
                yield worker_pb2.DecodeToRouter(incarnation=incarnation, events=events)
                self._in_hand = 0

    def abandon(self) -> None:
        """Nobody hears what the attempts wrote and still write. May be called again."""
        self._close()
        self._services.bridge.late(len(self._outbox) + self._in_hand)
        self._outbox.clear()
        self._in_hand = 0
        for attempt in list(self.attempts.values()):
            attempt.cancel(WorkerLost("the router's session ended"))

    def _start(self, start: worker_pb2.StartAttempt) -> None:
        attempt_id = bytes(start.attempt_id)
        try:
            submit = self._admit(start)
        except PdserveError as error:
            self._emit(refusal(attempt_id, error))
            return
        attempt = Attempt(
            self._services,
            start,
            submit,
            self._emit,
            lambda: self._ended(attempt_id),
        )
        self.attempts[attempt_id] = attempt
        try:
            attempt.begin()
        except Exception as error:
            # One attempt's bug must not cost the others of this session theirs.
            logger.exception("attempt %s could not begin", attempt_id.hex())
            failure = error if isinstance(error, PdserveError) else InternalError(str(error))
            attempt.cancel(failure)
            # The engine never had it, so nobody else will say that it is over.
            self._services.bridge.forget(submit.seq)
            self._ended(attempt_id)
            self._emit(refusal(attempt_id, failure))

    def _admit(self, start: worker_pb2.StartAttempt) -> api.Submit:
        facts = self._services.facts
        if start.expected_incarnation != facts.incarnation:
            raise StaleIncarnation("this decode worker was restarted since it was chosen")
        if self._draining():
            raise Draining("this decode worker is draining")
        if bytes(start.attempt_id) in self.attempts:
            raise ProtocolError("attempt_id is in use")
        return submit_from_wire(
            attempt_id=start.attempt_id,
            job=api.Job.GENERATE,
            tokens=start.tokens,
            sampling=start.sampling,
            priority=start.priority,
            remaining_ms=start.remaining_ms,
            model=facts.model,
        )

    def _cancel(self, attempt_id: bytes) -> None:
        attempt = self.attempts.get(attempt_id)
        if attempt is not None:
            attempt.cancel(WorkerLost("cancelled by the router"))

    def _ended(self, attempt_id: bytes) -> None:
        self.attempts.pop(attempt_id, None)

    def _emit(self, event: worker_pb2.AttemptEvent) -> None:
        if self._closed:
            self._services.bridge.late(1)
            return
        self._outbox.append(event)
        self._wake.set()

    def _close(self) -> None:
        self._closed = True
        self._wake.set()
