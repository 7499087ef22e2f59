"""From a job to its deltas: placement, attempts, and what follows when one is lost.

    generate: admit -> ( place -> attempt -> relay )* -> finish | fail

A request is a generator and its log. Everything that can happen to it arrives in its inbox, so
there is one place to wait, and no task or timer per token. The generator's end, however it comes,
cancels the attempt and forgets the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from cache_tiers.keys import KeyMaker
from pdserve.config import Config
from pdserve.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NoWorker,
    Overloaded,
    PdserveError,
)
from pdserve.rpc import convert
from pdserve.rpc.deadlines import remaining_ms
from pdserve.telemetry.timeline import PhaseName
from pdserve.types import FinishReason, ModelFacts, WorkerId
from pdserve.v1 import worker_pb2
from router.api import Delta, Job, WorkerView
from router.attempt import Attempt
from router.book import RequestBook
from router.budget import RecoveryBudget
from router.counters import Counters
from router.inbox import POKE, AttemptLost, Ended, Poke
from router.kv_view import KvView
from router.links import Links
from router.placement import Ask, Placement, Rules, hope, place
from router.readiness import Readiness
from router.recovery import Failure, GiveUp, History, Limits, decide
from router.registry import Registry
from router.relay import relay
from router.request_log import Accepted, RequestLog
from router.separation import Shortfall
from router.timelines import Timeline

log = logging.getLogger(__name__)


# Failures that say nothing about whether the next request succeeds.
_NO_DOUBT = (Cancelled, DeadlineExceeded, Draining, InvalidRequest, Overloaded)


class RequestDispatcher:
    """The router's Dispatcher (router/api.py). Event loop only."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        links: Links,
        kv_view: KvView,
        maker: KeyMaker,
        counters: Counters,
    ) -> None:
        self._config = config
        self._rules = Rules.of(config.router)
        self._limits = Limits.of(config.router)
        # The self-test finds out what works, so it goes on where strict mode would stop.
        self._test_rules = replace(self._rules, strict=False)
        self._test_limits = replace(self._limits, strict=False)
        self._registry = registry
        self._links = links
        self._kv_view = kv_view
        self._maker = maker
        self.counters = counters
        self._book = RequestBook(config.router.max_requests)
        self._budget: RecoveryBudget[RequestLog] = RecoveryBudget(config.router.recovery_share)
        self._turn = 0
        self.readiness = Readiness(registry, kv_view, config)
        self._stopping = False
        # Set when a request failed, or its KV did, in a way that is to be tested again.
        self.doubted = asyncio.Event()
        self._doubt = False
        registry.listen(self._leave_lost_readers)

    # ---- the fronts' side -----------------------------------------------------------------------

    def model(self) -> ModelFacts | None:
        return self._registry.model()

    def workers(self) -> tuple[WorkerView, ...]:
        return self._registry.everyone()

    def missing(self) -> tuple[WorkerId, ...]:
        return self._registry.missing()

    def ready(self) -> tuple[bool, str]:
        if self._stopping:
            return False, "the router is stopping"
        judgement = self.readiness.judge()
        if not judgement.ready:
            return False, judgement.reason
        return self.servable()

    def shortfalls(self) -> tuple[Shortfall, ...]:
        return self.readiness.judge().shortfalls

    @property
    def borrowed_tokens(self) -> int:
        """At most so many tokens of a request are prefill workers': one of each failed attempt."""
        return self._limits.prefill + self._limits.decode

    def servable(self) -> tuple[bool, str]:
        """Whether a request of one token could be placed at this moment."""
        model = self._registry.model()
        if model is None:
            return False, "no worker has joined"
        ask = Ask(model.fingerprint, tokens=1, force_pair=self._rules.strict)
        try:
            place(self._registry.snapshot(), ask, self._rules)
        except PdserveError as error:
            return False, str(error)
        return True, ""

    def check_room(self, coming: int, prepared: int) -> None:
        if self._stopping:
            raise Draining("the router is stopping")
        self._book.check_room(coming, prepared)

    def take_doubt(self) -> bool:
        """Whether a request failed, since the last call, by a fault that is not its client's."""
        doubt, self._doubt = self._doubt, False
        return doubt

    def generate(self, job: Job, timeline: Timeline | None = None) -> AsyncIterator[Delta]:
        return self.run(job, timeline, force_pair=False)

    # ---- stopping -------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        self._stopping = True

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no request runs; what still does after ``timeout_s`` is ended."""
        if await self._book.empty(timeout_s):
            return True
        for request in self._book.running():
            self._end(request, Draining("the router is stopping"))
        return await self._book.empty(1.0)

    # ---- one request ----------------------------------------------------------------------------

    async def run(
        self, job: Job, timeline: Timeline | None = None, *, force_pair: bool
    ) -> AsyncIterator[Delta]:
        """``force_pair``: for the self-test; hand over whenever a prefill worker lives."""
        request = self._admit(job, timeline, own=force_pair)
        history = History()
        timer = asyncio.get_running_loop().call_later(
            job.deadline - time.monotonic(),
            self._end,
            request,
            DeadlineExceeded("the request's deadline passed"),
        )
        try:
            while True:
                if (finish := request.finished_by_itself()) is not None:
                    yield self._finish(request, (), finish)
                    return
                if request.ended_for is not None:
                    # Said in one breath with what ended the attempt, so nobody read it there.
                    raise request.ended_for
                placement = await self._placed(request, history, force_pair)
                self._begin(request, placement, history)
                failure: Failure | None = None
                parked = False
                while failure is None and not parked:
                    items = await request.inbox.take()
                    relayed = relay(request, items, self.counters)
                    if relayed.finish is not None:
                        if history.prefill_given_up and not force_pair:
                            self._raise_doubt()
                        yield self._finish(request, relayed.accepted, relayed.finish)
                        return
                    if relayed.accepted:
                        self._recovered(request)
                        yield request.delta(relayed.accepted, None)
                    failure, parked = relayed.failure, relayed.parked
                if failure is not None:
                    limits = self._test_limits if force_pair else self._limits
                    history = await self._recover(request, history, failure, limits)
                else:
                    self._lose(request, "parked")
        except PdserveError as error:
            if request.running:
                self._failed(request, error, own=force_pair)
            raise
        finally:
            timer.cancel()
            self._drop_attempt(request)
            self._book.close(request)
            self._recovered(request)

    def _admit(self, job: Job, timeline: Timeline | None, *, own: bool) -> RequestLog:
        if self._stopping:
            raise Draining("the router is stopping")
        if job.deadline <= time.monotonic():
            raise DeadlineExceeded("the request's deadline had passed when it came")
        request = RequestLog(job, timeline)
        fenced = self._book.open(request, own=own)
        if fenced is not None:
            self.counters.takeovers += 1
            self._end(fenced, Cancelled("the request was taken over by a resume"))
        return request

    def _end(self, request: RequestLog, error: PdserveError) -> None:
        """Its workers are free at once: its consumer may hang on a connection that is no more."""
        request.ended_for = request.ended_for or error
        request.inbox.put(Ended(error))
        self._drop_attempt(request)

    # ---- placing --------------------------------------------------------------------------------

    async def _placed(self, request: RequestLog, history: History, force_pair: bool) -> Placement:
        """Waits for a worker while one is on its way back; NoWorker when none is.

        A request that ran already waits for a whole restart; a new one is refused sooner, since
        its client can still go elsewhere.
        """
        timers = self._config.timers
        rules = self._test_rules if force_pair else self._rules
        request.timeline.enter(PhaseName.PLACE)
        patience = timers.start_timeout_s if request.attempts else timers.dead_after_s
        give_up = time.monotonic() + patience
        self._turn += 1
        while True:
            ask = None
            try:
                ask = self._ask(request, history, force_pair)
                return place(self._registry.snapshot(), ask, rules)
            except NoWorker:
                left = give_up - time.monotonic()
                restarts = self._config.pools.restart_workers
                if ask is None or left <= 0:
                    raise
                if not hope(self._registry.snapshot(), ask, rules, restarts):
                    raise
                await self._pause(request, left)

    def _ask(self, request: RequestLog, history: History, force_pair: bool) -> Ask:
        """What placement must know. Binds the request to the model that is served now."""
        model = self._registry.model()
        if model is None:
            raise NoWorker("no worker has joined yet")
        if request.model is None or len(request.generated) == len(request.job.generated):
            request.bind(model, self._maker)
        assert request.model is not None
        known: Mapping[WorkerId, int] = {}
        if not request.bypass_cache:
            known = self._kv_view.known(request.keys(self._maker, request.length))
        size = request.model.block_size
        return Ask(
            fingerprint=request.model.fingerprint,
            tokens=request.length,
            known={worker: blocks * size for worker, blocks in known.items()},
            failed=history.failed,
            prefill_given_up=history.prefill_given_up,
            force_pair=force_pair,
            turn=self._turn,
        )

    async def _pause(self, request: RequestLog, seconds: float) -> None:
        """Until the cluster changes, or so long. Raises what ends the request meanwhile."""
        unlisten = self._registry.listen(lambda: request.inbox.put(POKE))
        timer = asyncio.get_running_loop().call_later(seconds, request.inbox.put, POKE)
        try:
            await _poked(request)
        finally:
            timer.cancel()
            unlisten()

    # ---- attempts -------------------------------------------------------------------------------

    def _begin(self, request: RequestLog, placement: Placement, history: History) -> None:
        attempt = Attempt(self._registry, placement, len(request.generated))
        request.begin(attempt)
        self.counters.attempts += 1
        message = self._start_message(request, attempt)
        skip = "" if placement.skip is None else placement.skip.value
        log.debug(
            "request %s: attempt %s on %s, prompt read by %s %s",
            request.job.request_id,
            attempt.id.hex()[:8],
            placement.decode.facts.id,
            placement.reader.facts.id,
            skip,
        )
        self._links.start_attempt(placement.decode.facts, message, request.inbox)

    def _start_message(self, request: RequestLog, attempt: Attempt) -> worker_pb2.StartAttempt:
        placement = attempt.placement
        message = worker_pb2.StartAttempt(
            attempt_id=attempt.id,
            request_id=request.job.request_id,
            tokens=convert.attempt_tokens_to_proto(request.attempt_tokens(self._maker)),
            sampling=convert.sampling_to_proto(request.attempt_sampling()),
            remaining_ms=remaining_ms(request.job.deadline),
            expected_incarnation=placement.decode.facts.incarnation,
            priority=request.job.priority,
        )
        if placement.prefill is not None:
            peer = placement.prefill.facts
            message.prefill.worker_id = peer.id
            message.prefill.address = peer.address
            message.prefill.incarnation = peer.incarnation
        elif placement.skip is not None:
            message.skip_reason = placement.skip.value
        return message

    def _leave_lost_readers(self) -> None:
        """Whoever waits for a prefill worker that fell silent goes elsewhere at once.

        A stopped process closes no connection, so its decode worker would wait on.
        """
        for request in self._book.running():
            attempt = request.attempt
            awaited = None if attempt is None else attempt.awaited
            if attempt is None or awaited is None:
                continue
            if (error := self._registry.lost(awaited)) is not None:
                request.inbox.put(AttemptLost(attempt.id, error, blame_prefill=True))

    def _drop_attempt(self, request: RequestLog) -> None:
        """Cancels what still runs on a worker and relieves the registry of it."""
        attempt = request.attempt
        if attempt is not None:
            attempt.end()
            self._links.cancel_attempt(attempt.placement.decode.facts, attempt.id)

    async def _recover(
        self, request: RequestLog, history: History, failure: Failure, limits: Limits
    ) -> History:
        """Decides between another attempt and the end; raises for the latter."""
        self.counters.attempts_failed += 1
        self._recovered(request)
        self._lose(request, failure.error.code)
        decision = decide(history, failure, limits)
        if isinstance(decision, GiveUp):
            raise decision.error
        log.warning(
            "request %s: attempt failed after %d tokens, trying again: %s: %s",
            request.job.request_id,
            len(request.generated),
            failure.error.code,
            failure.error,
        )
        if decision.delay_s:
            await self._pause(request, decision.delay_s)
        if not decision.exempt and not self._budget.enter(request, len(self._book)):
            self.counters.recoveries_delayed += 1
            while not self._budget.holds(request):
                await _poked(request)
        return decision.history

    def _failed(self, request: RequestLog, error: PdserveError, own: bool) -> None:
        request.fail()
        log.info("request %s failed: %s: %s", request.job.request_id, error.code, error)
        if not own and not isinstance(error, _NO_DOUBT):
            self._raise_doubt()

    def _raise_doubt(self) -> None:
        self._doubt = True
        self.doubted.set()

    def _lose(self, request: RequestLog, why: str) -> None:
        self._drop_attempt(request)
        request.lose(why)

    def _recovered(self, request: RequestLog) -> None:
        """Its place among those under recovery goes to the next, if it had one."""
        for following in self._budget.leave(request, len(self._book)):
            following.inbox.put(POKE)

    def _finish(
        self, request: RequestLog, accepted: Sequence[Accepted], finish: FinishReason
    ) -> Delta:
        request.finish()
        self._drop_attempt(request)
        # Before the client hears of the end: it may use the id again at once.
        self._book.release(request)
        self._note_cached(request)
        return request.delta(accepted, finish)

    def _note_cached(self, request: RequestLog) -> None:
        """What its workers hold now, without waiting for their events: the next turn goes there."""
        attempt = request.attempt
        if attempt is None or request.job.sampling.prompt_logprobs is not None:
            return  # the latter bypass the caches
        # The last token was sampled, never read: it has no KV.
        keys = request.keys(self._maker, request.length - 1)
        self._kv_view.note(attempt.placement.decode.facts, keys)
        prefill = attempt.placement.prefill
        if prefill is not None and request.model is not None:
            whole = len(request.job.prompt) // request.model.block_size
            self._kv_view.note(prefill.facts, keys[:whole])


async def _poked(request: RequestLog) -> None:
    """Until there is a reason to look again. Raises what ends the request meanwhile."""
    poked = False
    while not poked:
        for item in await request.inbox.take():
            if isinstance(item, Ended):
                raise item.error
            poked |= isinstance(item, Poke)
