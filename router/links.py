"""The router's connections: one link per live worker incarnation, following the registry.

    joined     channel, Watch stream; with it a session once a decoding worker is ready
    suspect    the session is closed at once, so that its requests move on; Watch goes on listening
    ready      a new session
    to leave   the session is closed, so that its requests go on elsewhere
    gone       everything is closed

One channel carries both streams of a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import grpc.aio

from pdserve.config import TimersConfig
from pdserve.errors import Draining, PdserveError, StaleIncarnation, WorkerLost
from pdserve.rpc import convert
from pdserve.rpc.channels import from_rpc_error, make_channel
from pdserve.rpc.identity import Identity
from pdserve.types import AttemptId, Duty, Incarnation, Role, WorkerFacts, WorkerState
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from router.counters import Counters
from router.inbox import AttemptLost, Inbox
from router.registry import Registry
from router.session import DecodeSession

_SERVING = (WorkerState.READY, WorkerState.DRAINING)


class Links:
    """Event loop only. Reports to the registry what it hears, and does what the registry says."""

    def __init__(
        self, registry: Registry, identity: Identity, timers: TimersConfig, counters: Counters
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._timers = timers
        self._counters = counters
        self._links: dict[Incarnation, _Link] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._unlisten = registry.listen(self._follow)

    def start_attempt(
        self, facts: WorkerFacts, message: worker_pb2.StartAttempt, inbox: Inbox
    ) -> None:
        """Sends it; if that worker is gone, ``inbox`` hears so like of any later loss."""
        link = self._links.get(facts.incarnation)
        if link is None:
            error = WorkerLost(f"worker {facts.id} is gone")
            inbox.put(AttemptLost(AttemptId(message.attempt_id), error))
            return
        link.open_session().start(message, inbox)

    def cancel_attempt(self, facts: WorkerFacts, attempt: AttemptId) -> None:
        link = self._links.get(facts.incarnation)
        if link is not None and link.session is not None:
            link.session.cancel(attempt)

    async def close(self) -> None:
        """Closes every connection; what still runs is lost."""
        self._unlisten()
        for incarnation in list(self._links):
            self._drop(incarnation, WorkerLost("the router is stopping"))
        await asyncio.gather(*self._closing)

    def _follow(self) -> None:
        live = {facts.incarnation: facts for facts in self._registry.live()}
        for incarnation in self._links.keys() - live.keys():
            self._drop(incarnation, WorkerLost("the worker is gone"))
            for other in self._links.values():
                if other.session is not None:
                    other.session.peer_gone(incarnation)
        for incarnation, facts in live.items():
            link = self._links.get(incarnation)
            if link is None:
                link = self._links[incarnation] = _Link(
                    facts, self._registry, self._identity, self._timers, self._counters
                )
            state = self._registry.state(facts)
            if state is WorkerState.SUSPECT:
                link.fence(WorkerLost(f"worker {facts.id} is suspect"))
            elif self._registry.duty(facts) is Duty.LEAVE:
                link.fence(Draining(f"worker {facts.id} is to be idle"))
            elif state in _SERVING and facts.role is not Role.PREFILL:
                link.open_session()

    def _drop(self, incarnation: Incarnation, error: PdserveError) -> None:
        link = self._links.pop(incarnation)
        link.fence(error)
        self._background(link.close())

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Link:
    """Everything that is connected to one incarnation."""

    def __init__(
        self,
        facts: WorkerFacts,
        registry: Registry,
        identity: Identity,
        timers: TimersConfig,
        counters: Counters,
    ) -> None:
        self.facts = facts
        self.session: DecodeSession | None = None
        self._registry = registry
        self._timers = timers
        self._counters = counters
        self._channel = make_channel(facts.address, identity)
        self._watcher = asyncio.create_task(self._watch(), name=f"watch-{facts.id}")

    def open_session(self) -> DecodeSession:
        if self.session is None or self.session.closed:
            self.session = DecodeSession(
                self.facts,
                self._channel,
                self._timers.heartbeat_s,
                self._counters,
                self._session_broke,
            )
        return self.session

    def fence(self, error: PdserveError) -> None:
        """Fails every attempt there, now; the worker cancels them when it sees the stream end."""
        if self.session is not None:
            self.session.close(error)

    async def close(self) -> None:
        self._watcher.cancel()
        await self._channel.close()

    def _session_broke(self, error: PdserveError) -> None:
        self._registry.unreachable(self.facts, str(error))

    async def _watch(self) -> None:
        """Listens for heartbeats for as long as this incarnation is said to live."""
        stub = worker_pb2_grpc.WorkerStub(self._channel)
        while True:
            try:
                async for message in stub.Watch(worker_pb2.WatchRequest()):
                    self._heard(message)
                why = "it ended its heartbeats"
            except grpc.aio.AioRpcError as error:
                why = str(from_rpc_error(error))
            except PdserveError as error:
                why = str(error)
            self._registry.unreachable(self.facts, why)
            await asyncio.sleep(self._timers.heartbeat_s / 2)

    def _heard(self, message: worker_pb2.Heartbeat) -> None:
        incarnation, load = convert.heartbeat_from_proto(message)
        if incarnation != self.facts.incarnation:
            raise StaleIncarnation("another process answers at its address")
        self._registry.heard(self.facts, load)
