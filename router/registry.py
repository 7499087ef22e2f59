"""The router's one view of the cluster: who lives, what each worker is busy with.

    Membership.SetWorkers -> set_workers     the whole truth about who exists
    Watch streams         -> heard, unreachable
    a timer               -> tick            silence and stand-still
    dispatch              -> attempt_*       work that the router itself sent

Readers get frozen snapshots. Listeners are called after each change that can matter to placement
(a worker came, went, or changed state), on the event loop, in order of registration. Dead workers
stay in the snapshot for a while, so that requests know that one may be on its way back.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pdserve.config import TimersConfig
from pdserve.errors import Draining, PdserveError, WorkerLost
from pdserve.types import (
    Duty,
    Incarnation,
    Load,
    ModelFacts,
    Role,
    WorkerFacts,
    WorkerId,
    WorkerState,
)
from router import liveness
from router.api import WorkerView
from router.liveness import WorkerRecord

log = logging.getLogger(__name__)

Listener = Callable[[], None]
Clock = Callable[[], float]


@dataclass(slots=True)
class _Work:
    """What the router has sent to one incarnation."""

    in_flight: int = 0
    pending_tokens: int = 0


class Registry:
    """Owner of the workers' records. Event loop only."""

    def __init__(self, timers: TimersConfig, clock: Clock = time.monotonic) -> None:
        self._timers = timers
        self._clock = clock
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._work: dict[Incarnation, _Work] = {}
        self._listeners: list[Listener] = []
        self._snapshot: tuple[WorkerView, ...] | None = ()
        self._plan: Mapping[WorkerId, Duty] = {}
        # Planned ones that are dead for so long that nobody waits for their return.
        self._lost: dict[WorkerId, WorkerView] = {}
        self._model: ModelFacts | None = None
        self._ticked_at = clock()

    # ---- reading ------------------------------------------------------------------------------

    def snapshot(self) -> tuple[WorkerView, ...]:
        """Every worker known, by id; built once per change."""
        if self._snapshot is None:
            self._snapshot = tuple(self._view(r) for _, r in sorted(self._records.items()))
        return self._snapshot

    def everyone(self) -> tuple[WorkerView, ...]:
        """The snapshot and, dead, those of the plan that have been gone for long."""
        if not self._lost:
            return self.snapshot()
        return tuple(sorted((*self.snapshot(), *self._lost.values()), key=lambda v: v.facts.id))

    def missing(self) -> tuple[WorkerId, ...]:
        """Those of the plan that have never joined: they start, or no node has room for them."""
        known = self._records.keys() | self._lost.keys()
        return tuple(sorted(self._plan.keys() - known))

    def model(self) -> ModelFacts | None:
        """The model of the group that requests are placed in; the last one while none lives."""
        return self._model

    def live(self) -> tuple[WorkerFacts, ...]:
        """Workers whose owner says that they exist, whatever their state."""
        return tuple(r.facts for r in self._records.values() if r.state is not WorkerState.DEAD)

    def duty(self, facts: WorkerFacts) -> Duty:
        record = self._current(facts.id, facts.incarnation)
        return Duty.SERVE if record is None else record.duty

    def in_flight(self) -> Mapping[WorkerId, int]:
        """The router's attempts on each worker that lives."""
        return {
            r.facts.id: work.in_flight
            for r in self._records.values()
            if (work := self._work.get(r.facts.incarnation)) is not None
        }

    def lost(self, facts: WorkerFacts) -> PdserveError | None:
        """Why nobody should wait for this incarnation any more; None while one may."""
        if self.state(facts) in (WorkerState.SUSPECT, WorkerState.DEAD):
            return WorkerLost(f"{facts.role.value} worker {facts.id} fell silent")
        if self.duty(facts) is Duty.LEAVE:
            return Draining(f"{facts.role.value} worker {facts.id} is to be idle")
        return None

    def state(self, facts: WorkerFacts) -> WorkerState:
        record = self._current(facts.id, facts.incarnation)
        return WorkerState.DEAD if record is None else record.state

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls ``listener`` after each change; the answer ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ---- membership and liveness ----------------------------------------------------------------

    def set_workers(
        self, workers: Iterable[WorkerFacts], plan: Mapping[WorkerId, Duty] | None = None
    ) -> None:
        """These exist and no others. A new incarnation replaces the old one of the same id.

        ``plan``: who is to exist, and for what. Who is in neither is forgotten; without a plan
        nobody is, and all serve.
        """
        plan = self._plan = plan or {}
        now = self._clock()
        wanted = {facts.id: facts for facts in workers}
        changed = False
        for worker_id, record in self._records.items():
            if worker_id not in wanted and record.state is not WorkerState.DEAD:
                changed |= self._put(liveness.gone(record, now))
        for facts in wanted.values():
            old = self._records.get(facts.id)
            duty = plan.get(facts.id, Duty.SERVE)
            if old is not None and old.facts.incarnation == facts.incarnation:
                # An incarnation that was declared gone does not come back.
                changed |= old.duty is not duty
                self._put(liveness.told(old, duty))
                continue
            if old is not None:
                self._work.pop(old.facts.incarnation, None)
            log.info(
                "worker %s (%s, pid %d) joined as incarnation %s",
                facts.id,
                facts.role.value,
                facts.pid,
                facts.incarnation.hex()[:8],
            )
            self._records[facts.id] = liveness.new_record(facts, now, duty)
            changed = True
        self._lost = {w: v for w, v in self._lost.items() if w in plan and w not in wanted}
        if plan:
            for worker_id in self._records.keys() - plan.keys() - wanted.keys():
                self._work.pop(self._records.pop(worker_id).facts.incarnation, None)
                changed = True
        if changed:
            self._notify()

    def heard(self, facts: WorkerFacts, load: Load) -> None:
        record = self._current(facts.id, facts.incarnation)
        if record is None or record.state is WorkerState.DEAD:
            return
        if self._put(liveness.heard(record, load, self._clock(), self._timers)):
            self._notify()

    def unreachable(self, facts: WorkerFacts, why: str) -> None:
        """A connection to this incarnation was refused or broke."""
        record = self._current(facts.id, facts.incarnation)
        if record is not None and self._put(liveness.unreachable(record), why):
            self._notify()

    def tick(self) -> None:
        """Call about once per heartbeat interval.

        A router that was stopped itself must not take everybody else for silent.
        """
        now = self._clock()
        stall = now - self._ticked_at - self._timers.heartbeat_s
        self._ticked_at = now
        changed = False
        for worker_id, kept in list(self._records.items()):
            record = kept
            if stall > self._timers.heartbeat_s:
                record = self._records[worker_id] = liveness.forgiven(kept, stall)
            if record.state is not WorkerState.DEAD:
                changed |= self._put(liveness.checked(record, now, self._timers))
            elif now - record.died_at > self._timers.start_timeout_s:
                # Whoever waited for its return has given up by now.
                del self._records[worker_id]
                if worker_id in self._plan:
                    self._lost[worker_id] = self._view(record)
                self._work.pop(record.facts.incarnation, None)
                changed = True
        if changed:
            self._notify()

    # ---- the router's own work ------------------------------------------------------------------

    def attempt_started(self, incarnation: Incarnation) -> None:
        self._work.setdefault(incarnation, _Work()).in_flight += 1
        self._snapshot = None

    def attempt_ended(self, incarnation: Incarnation) -> None:
        work = self._work.get(incarnation)
        if work is not None:  # None: that incarnation was replaced meanwhile
            work.in_flight -= 1
            self._snapshot = None

    def reading_started(self, incarnation: Incarnation, tokens: int) -> None:
        """``tokens`` of a prompt were sent there to be read."""
        self._work.setdefault(incarnation, _Work()).pending_tokens += tokens
        self._snapshot = None

    def reading_ended(self, incarnation: Incarnation, tokens: int) -> None:
        work = self._work.get(incarnation)
        if work is not None:
            work.pending_tokens -= tokens
            self._snapshot = None

    # ---- inside ---------------------------------------------------------------------------------

    def _current(self, worker_id: WorkerId, incarnation: Incarnation) -> WorkerRecord | None:
        record = self._records.get(worker_id)
        if record is None or record.facts.incarnation != incarnation:
            return None
        return record

    def _put(self, record: WorkerRecord, why: str = "") -> bool:
        """Keeps the record; whether its state changed."""
        old = self._records[record.facts.id]
        if record is old:
            return False
        self._records[record.facts.id] = record
        self._snapshot = None
        if record.state is old.state:
            return False
        level = logging.WARNING if record.state is WorkerState.SUSPECT else logging.INFO
        log.log(
            level,
            "worker %s: %s -> %s%s",
            record.facts.id,
            old.state.value,
            record.state.value,
            f" ({why})" if why else "",
        )
        return True

    def _notify(self) -> None:
        self._snapshot = None
        self._model = self._agreed_model()
        for listener in list(self._listeners):
            listener()

    def _agreed_model(self) -> ModelFacts | None:
        """The fingerprint that most live decoding workers share; the present one wins a tie."""
        votes: Counter[bytes] = Counter()
        facts: dict[bytes, ModelFacts] = {}
        for _, record in sorted(self._records.items()):
            if record.state is WorkerState.DEAD:
                continue
            model = record.facts.model
            facts.setdefault(model.fingerprint, model)
            votes[model.fingerprint] += 0 if record.facts.role is Role.PREFILL else 1
        if not facts:
            return self._model
        best = max(votes.values())
        if self._model is not None and votes.get(self._model.fingerprint, -1) == best:
            return self._model
        winner = next(print_ for print_ in facts if votes[print_] == best)
        return facts[winner]

    def _view(self, record: WorkerRecord) -> WorkerView:
        work = self._work.get(record.facts.incarnation)
        return WorkerView(
            facts=record.facts,
            state=record.state,
            load=record.load,
            in_flight=work.in_flight if work else 0,
            pending_tokens=work.pending_tokens if work else 0,
        )
