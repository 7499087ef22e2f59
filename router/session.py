"""One Decode.Session stream: every attempt between this router and one worker incarnation.

    open      the stream is being set up; attempts may be sent already
    closed    the stream ended, or the worker was fenced: every attempt on it is lost, at once

The way of a token through here is one lookup and one put. Events that name no running attempt, and
messages of another incarnation, are counted and dropped: after a fence the past may still arrive.
A session that closed stays closed; its successor is a new object.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import grpc
import grpc.aio

from pdserve.errors import PdserveError, StaleIncarnation, WorkerLost
from pdserve.rpc.channels import from_rpc_error
from pdserve.types import AttemptId, Incarnation, WorkerFacts
from pdserve.v1 import kv_pb2, worker_pb2, worker_pb2_grpc
from router.counters import Counters
from router.inbox import AttemptLost, Inbox, Parked

log = logging.getLogger(__name__)

_KEEP_ALIVE = worker_pb2.RouterToDecode(keep_alive=kv_pb2.KeepAlive())


class DecodeSession:
    """Event loop only. ``on_broken`` is called, once, when the stream ends of its own accord."""

    def __init__(
        self,
        facts: WorkerFacts,
        channel: grpc.aio.Channel,
        keep_alive_s: float,
        counters: Counters,
        on_broken: Callable[[PdserveError], None],
    ) -> None:
        self.facts = facts
        self.closed = False
        self._attempts: dict[bytes, Inbox] = {}
        self._outbox: deque[worker_pb2.RouterToDecode] = deque()
        self._wake = asyncio.Event()
        self._keep_alive_s = keep_alive_s
        self._counters = counters
        self._on_broken = on_broken
        self._call = worker_pb2_grpc.DecodeStub(channel).Session()
        self._tasks = (
            asyncio.create_task(self._read(), name=f"session-read-{facts.id}"),
            asyncio.create_task(self._write(), name=f"session-write-{facts.id}"),
        )
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    def start(self, message: worker_pb2.StartAttempt, inbox: Inbox) -> None:
        """Sends an attempt; from now on its events go to ``inbox``."""
        attempt = AttemptId(message.attempt_id)
        if self.closed:
            inbox.put(AttemptLost(attempt, WorkerLost(f"worker {self.facts.id} is gone")))
            return
        self._attempts[attempt] = inbox
        self._send(worker_pb2.RouterToDecode(start=message))

    def cancel(self, attempt: AttemptId) -> None:
        """Fences an attempt: nothing of it is relayed any more, and the worker is told."""
        if self._attempts.pop(attempt, None) is None:
            return  # it ended, or was lost with this session
        self._send(worker_pb2.RouterToDecode(cancel=worker_pb2.CancelAttempt(attempt_id=attempt)))

    def peer_gone(self, incarnation: Incarnation) -> None:
        """The worker may let go of what it keeps open to that prefill worker."""
        if not self.closed:
            gone = worker_pb2.PeerGone(incarnation=incarnation)
            self._send(worker_pb2.RouterToDecode(peer_gone=gone))

    def close(self, error: PdserveError) -> None:
        """Ends the stream, which cancels its attempts on the worker, and fails them here."""
        if self.closed:
            return
        self.closed = True
        attempts, self._attempts = self._attempts, {}
        for attempt, inbox in attempts.items():
            inbox.put(AttemptLost(AttemptId(attempt), error))
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _broken(self, error: PdserveError) -> None:
        if not self.closed:
            self.close(error)
            self._on_broken(error)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """However the reader or the writer came to its end, no attempt is left waiting."""
        if self.closed:
            return
        if task.cancelled():
            self._broken(WorkerLost(f"the session with worker {self.facts.id} was cancelled"))
        elif (error := task.exception()) is not None:
            log.error("session with worker %s failed", self.facts.id, exc_info=error)
            self._broken(WorkerLost(f"the session with worker {self.facts.id} broke"))

    # ---- the stream -----------------------------------------------------------------------------

    def _send(self, message: worker_pb2.RouterToDecode) -> None:
        self._outbox.append(message)
        self._wake.set()

    async def _write(self) -> None:
        """The one writer; says that the router lives when there is nothing else to say."""
        try:
            while True:
                while self._outbox:
                    await self._call.write(self._outbox.popleft())
                self._wake.clear()
                try:
                    async with asyncio.timeout(self._keep_alive_s):
                        await self._wake.wait()
                except TimeoutError:
                    self._outbox.append(_KEEP_ALIVE)
        except grpc.aio.AioRpcError as error:
            self._broken(_lost(self.facts, from_rpc_error(error)))
        except asyncio.InvalidStateError:
            # The call is over; the reader has, or will get, the reason.
            return

    async def _read(self) -> None:
        try:
            while (batch := await self._call.read()) is not grpc.aio.EOF:
                self._relay(batch)
            error: PdserveError = WorkerLost(f"worker {self.facts.id} ended the session")
        except grpc.aio.AioRpcError as rpc_error:
            error = _lost(self.facts, from_rpc_error(rpc_error))
        self._broken(error)

    def _relay(self, batch: worker_pb2.DecodeToRouter) -> None:
        if batch.incarnation != self.facts.incarnation:
            self._counters.late_events += len(batch.events)
            self._broken(StaleIncarnation(f"worker {self.facts.id} is another process now"))
            return
        attempts = self._attempts
        for event in batch.events:
            inbox = attempts.get(event.attempt_id)
            if inbox is None:
                self._counters.late_events += 1
                continue
            has_room = inbox.put_event(event)
            if event.finish_reason or event.HasField("failure"):
                del attempts[event.attempt_id]
            elif not has_room:
                attempt = AttemptId(event.attempt_id)
                self._counters.parked += 1
                self.cancel(attempt)
                inbox.put(Parked(attempt))


def _lost(facts: WorkerFacts, cause: PdserveError) -> PdserveError:
    """Whatever ended the stream, its attempts are lost and can be tried elsewhere."""
    return WorkerLost(f"the session with worker {facts.id} ended: {cause}")
