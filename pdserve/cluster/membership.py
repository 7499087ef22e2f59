"""Keeps the router told who exists: asks the actors, pushes the whole truth when it changed.

What is known of one worker, and how answers change it, is in pdserve/cluster/seen.py.

An actor is asked again only when it answered the last time, so a frozen one costs one pending call
and holds up nobody; the router's own heartbeats judge it. So they do one that Ray cannot reach: Ray
says the same of a worker that died and of one that was cut off for a moment, and its control plane
is asked which process is the actor's. While that does not answer, nobody is declared gone: what the
router knows stays as it is and streams run on. An actor from before such a time that ends after it
is replaced: Ray may not tell of it again (decision 5).

An error that nobody foresaw ends membership, and with it the cluster's use: it is told at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from pdserve.cluster.ray_tables import RayTables
from pdserve.cluster.seen import Seen, Step, described, gone, out_of_reach, refused
from pdserve.config import TimersConfig
from pdserve.errors import ConfigError, InternalError, PdserveError
from pdserve.rpc import convert
from pdserve.rpc.channels import make_channel
from pdserve.rpc.identity import Identity
from pdserve.types import Duty, WorkerFacts, WorkerId
from pdserve.v1 import worker_pb2, worker_pb2_grpc

logger = logging.getLogger(__name__)

# A worker that came to exist, or went, is known to the router within about this.
POLL_S = 0.25
STARTING_POLL_S = 0.05
RESTART_POLL_MAX_S = 10.0
REPUSH_S = 10.0
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
CONTROL_PLANE_LOOK_S = 1.0
# So many fruitless questions, the pauses between which double to 3 s in all, are no short cut.
UNAVAILABLE_TIMES = 6
# Of Ray's two calls; only a Ray that is broken takes longer.
RENEW_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Truth:
    """What the router is told."""

    generation: int  # the router's; it knows nothing of what an earlier one was told
    workers: tuple[WorkerFacts, ...]  # who exist
    plan: tuple[tuple[WorkerId, Duty], ...]  # what is wanted of whom
    away: bool  # Ray's control plane: all of this is as it was


class Router(Protocol):
    """What membership needs to know of the router's process."""

    @property
    def generation(self) -> int: ...


def _pause(seen: Seen) -> float:
    """Seconds until the next question, which may begin another start."""
    if seen.facts is not None and not seen.fruitless:
        return POLL_S
    return min(RESTART_POLL_MAX_S, STARTING_POLL_S * 2.0 ** min(seen.fruitless, 20))


def _head_of(nodes: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Ids of the node that the control plane runs on; a new one has another."""
    return frozenset(
        str(node["NodeID"])
        for node in nodes
        if node["Alive"] and "node:__internal_head__" in node["Resources"]
    )


class Membership:
    """Owns a thread with an event loop. ``seen`` and ``wait`` may be called from anywhere."""

    def __init__(
        self,
        actors: Mapping[WorkerId, Any],
        router: Router,
        internal_address: Callable[[], str],
        identity: Identity,
        timers: TimersConfig,
        note: Callable[[str], None],
        renew: Callable[[WorkerId, Any], Any | None],
        on_failure: Callable[[PdserveError], None] = lambda error: None,
    ) -> None:
        """``renew`` replaces a worker's actor, if it may; it blocks. ``on_failure`` hears why
        nobody is watched any more."""
        # Changed by other threads, under the lock of ``_changed``.
        self._actors = dict(actors)
        self._duties = dict.fromkeys(actors, Duty.SERVE)
        self._router = router
        self._internal_address = internal_address
        self._identity = identity
        self._timers = timers
        self._note = note
        self._renew = renew
        self._on_failure = on_failure
        self._failure: PdserveError | None = None
        self._seen = {worker: Seen() for worker in actors}
        self._dropped: set[WorkerId] = set()  # whose watchers are to end
        self._changed = threading.Condition()
        # The router's generation, and what it was told.
        self._pushed: _Truth | None = None
        self._away = False
        self._returns = 0  # of the control plane
        self._watchers: dict[WorkerId, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._poke = asyncio.Event()
        self._replanned = asyncio.Event()
        self._tables = RayTables()
        self._renewals = ThreadPoolExecutor(1, "ray-renew")
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """May be called twice, and before ``start``."""
        if self._loop.is_closed():
            return
        if self._thread.ident is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        self._loop.close()
        self._tables.close()
        self._renewals.shutdown(wait=False, cancel_futures=True)

    # ---- the plan: who is to exist, and for what -------------------------------------------------

    def add(self, worker: WorkerId, actor: Any, duty: Duty = Duty.SERVE) -> None:
        """One more is to exist, or this one in the place of one that was vacated."""
        with self._changed:
            self._actors[worker] = actor
            self._duties[worker] = duty
            self._seen[worker] = Seen()
        self._tell(self._replanned)

    def vacate(self, worker: WorkerId) -> None:
        """Its process is ended on purpose: nobody asks for it until ``add`` names another."""
        with self._changed:
            self._actors.pop(worker, None)
            self._seen[worker] = Seen()
            self._dropped.add(worker)
            self._changed.notify_all()
        self._tell(self._replanned)

    def drop(self, worker: WorkerId) -> None:
        """It is to exist no more, and nobody asks for it."""
        with self._changed:
            for known in (self._actors, self._duties, self._seen):
                known.pop(worker, None)
            self._dropped.add(worker)
            self._changed.notify_all()
        self._tell(self._replanned)

    def set_duty(self, worker: WorkerId, duty: Duty) -> None:
        with self._changed:
            self._duties[worker] = duty
        self._tell(self._poke)

    @property
    def duties(self) -> Mapping[WorkerId, Duty]:
        """Of every worker that is to exist, in the order of the plan."""
        with self._changed:
            return dict(self._duties)

    def _tell(self, event: asyncio.Event) -> None:
        self._loop.call_soon_threadsafe(event.set)

    # ---- what is seen ----------------------------------------------------------------------------

    @property
    def seen(self) -> Mapping[WorkerId, Seen]:
        with self._changed:
            return dict(self._seen)

    def workers(self) -> tuple[WorkerFacts, ...]:
        """Those that exist now, in the order of the plan."""
        return tuple(seen.facts for seen in self.seen.values() if seen.facts is not None)

    def wait(self, done: Callable[[Mapping[WorkerId, Seen]], bool], timeout_s: float) -> bool:
        """Waits until ``done`` holds of what is seen, and the router was told of all of it.

        False: not in time. Raises, at once, why it never will: membership has ended.
        """
        limit = time.monotonic() + timeout_s
        with self._changed:
            while not (done(self._seen) and self._is_pushed()):
                if self._failure is not None:
                    raise self._failure
                if not self._thread.is_alive():
                    raise InternalError("membership was stopped")
                left = limit - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.5))
            return True

    def _is_pushed(self) -> bool:
        return self._pushed == self._truth()

    def _truth(self) -> _Truth:
        """Under the lock."""
        present = tuple(seen.facts for seen in self._seen.values() if seen.facts is not None)
        plan = tuple(self._duties.items())
        return _Truth(self._router.generation, present, plan, self._away)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:
            logger.exception("membership ended")
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, PdserveError):
            error = InternalError(f"membership ended: {type(error).__name__}: {error}")
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        self._on_failure(error)

    async def _main(self) -> None:
        push = asyncio.create_task(self._push_changes())
        look = asyncio.create_task(self._look_for_control_plane())
        stop = asyncio.create_task(self._stop.wait())
        try:
            while not stop.done():
                self._replanned.clear()
                self._follow_plan()
                replanned = asyncio.create_task(self._replanned.wait())
                tasks = (push, look, stop, replanned, *self._watchers.values())
                # A watcher never ends by itself; if one does, its error must not be lost.
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                replanned.cancel()
                for task in done:
                    task.result()
        finally:
            tasks = (push, look, stop, *self._watchers.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _follow_plan(self) -> None:
        with self._changed:
            actors = dict(self._actors)
            dropped, self._dropped = self._dropped, set()
        # Who was dropped and added anew has another actor.
        for worker in self._watchers.keys() & dropped:
            self._watchers.pop(worker).cancel()
        for worker in actors.keys() - self._watchers.keys():
            watcher = asyncio.create_task(self._watch(worker, actors[worker]))
            self._watchers[worker] = watcher
        self._poke.set()

    async def _watch(self, worker: WorkerId, actor: Any) -> None:
        """Until it is cancelled, which may be a while after the worker was dropped."""
        heard_of = self._returns
        while True:
            is_lost = await self._ask(worker, actor)
            returns = self._returns
            if is_lost and heard_of != returns and (made := await self._renewed(worker, actor)):
                actor, heard_of = made, returns
            await asyncio.sleep(_pause(self._before(worker)))

    async def _ask(self, worker: WorkerId, actor: Any) -> bool:
        """One question. Whether this actor is lost, unless Ray brings it back."""
        try:
            answer = await asyncio.wrap_future(actor.describe.remote().future())
        except RayActorError as error:
            return await self._judge(worker, actor, isinstance(error, ActorUnavailableError))
        except RayError as error:
            logger.warning("%s: asking it failed: %s", worker, type(error).__name__)
        else:
            if isinstance(answer, WorkerFacts):
                self._take(worker, actor, described, answer)
            else:
                self._take(worker, actor, refused, answer)
        return False

    async def _judge(self, worker: WorkerId, actor: Any, unavailable: bool) -> bool:
        """Ray could not ask it: it died, or is only ``unavailable``. Whether it is lost."""
        if await self._tables.nodes() is None:
            return False
        if not unavailable:
            self._take(worker, actor, gone)
            return True
        facts = self._before(worker).facts
        if facts is not None and await self._tables.process_of(actor) in (None, facts.pid):
            self._take(worker, actor, out_of_reach)
            return False
        self._take(worker, actor, gone)
        return self._before(worker).fruitless >= UNAVAILABLE_TIMES

    async def _renewed(self, worker: WorkerId, actor: Any) -> Any | None:
        """Who took its place. None: nobody may, or could for now."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._renewals, self._renew, worker, actor)
        try:
            made = await asyncio.wait_for(call, RENEW_TIMEOUT_S)
        except Exception as error:  # Ray's are of many kinds; the next question tries it again
            logger.warning("%s: it was not replaced: %s: %s", worker, type(error).__name__, error)
            return None
        if made is None:
            return None
        with self._changed:
            if self._actors.get(worker) is not actor:
                return None
            self._actors[worker] = made
        return made

    def _before(self, worker: WorkerId) -> Seen:
        with self._changed:
            return self._seen.get(worker, Seen())

    def _take(
        self, worker: WorkerId, actor: Any, step: Callable[..., Step], *answer: object
    ) -> None:
        """What is said of an actor that has been replaced says nothing of its worker."""
        with self._changed:
            if self._actors.get(worker) is not actor:
                return
            before = self._seen[worker]
            taken = step(before, *answer)
            self._seen[worker] = taken.seen
            self._changed.notify_all()
        if taken.note:
            self._note(f"{worker} {taken.note}")
        if taken.seen != before:
            self._poke.set()

    async def _look_for_control_plane(self) -> None:
        head: frozenset[str] = frozenset()
        while True:
            await asyncio.sleep(CONTROL_PLANE_LOOK_S)
            nodes = await self._tables.nodes()
            if nodes is None:
                self._set_away(True)
                continue
            before, head = head, _head_of(nodes)
            # One that came back between two looks has another head.
            self._returns += self._away or bool(before - head)
            self._set_away(False)

    def _set_away(self, away: bool) -> None:
        if away is self._away:
            return
        self._note(f"Ray's control plane {'is away' if away else 'answers again'}")
        with self._changed:
            self._away = away
        self._poke.set()

    async def _push_changes(self) -> None:
        while True:
            self._poke.clear()
            pushed = await self._push()
            # A router that restarted shows by its generation alone.
            waits = REPUSH_S if pushed else STARTING_POLL_S
            generation, limit = self._router.generation, time.monotonic() + waits
            while time.monotonic() < limit and self._router.generation == generation:
                try:
                    await asyncio.wait_for(self._poke.wait(), STARTING_POLL_S)
                except TimeoutError:
                    continue
                break

    async def _push(self) -> bool:
        with self._changed:
            truth = self._truth()
        if truth.generation == 0:
            return False
        request = worker_pb2.SetWorkersRequest(
            workers=[convert.worker_facts_to_proto(worker) for worker in truth.workers],
            plan=convert.plan_to_proto(dict(truth.plan)),
            control_plane_away=truth.away,
        )
        async with make_channel(self._internal_address(), self._identity) as channel:
            stub = worker_pb2_grpc.MembershipStub(channel)
            try:
                await stub.SetWorkers(request, timeout=self._timers.dead_after_s)
            except grpc.aio.AioRpcError as error:
                if error.code() in _REFUSED:
                    raise ConfigError("the router refuses the cluster's credential") from error
                logger.warning("telling the router of its workers failed: %s", error.code().name)
                return False
        with self._changed:
            self._pushed = truth
            self._changed.notify_all()
        return True
