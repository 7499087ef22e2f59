"""The engine's thread: commands in, one step, events out, again.

Each turn: drain the inbox, fail what is overdue, plan, compute, apply. Events of commands and of
planning are sunk before the step (a tier read or a grant runs while the step computes), all that
the step made is sunk after it in one call. Without rows to compute the thread sleeps until a
command or a deadline comes.

    NEW --start--> SERVING --stop--> STOPPED          every sequence that lives is Failed(Draining)
                   SERVING --bug---> BROKEN --stop--> STOPPED

A step that raises costs the rows that raise by themselves, no more. An exception anywhere else is
our own bug, after which nothing that the engine holds can be trusted: it becomes BROKEN and says so
to ``on_broken``, where a worker ends its process. Where there is none, it fails every sequence,
answers each Submit with Failed, and computes no further step. Its snapshot then stands still and
never says idle.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pdserve.config import EngineConfig
from pdserve.engine.api import (
    BlockHasher,
    Command,
    EngineSnapshot,
    Event,
    EventSink,
    Failed,
    Inspect,
    Submit,
)
from pdserve.engine.board import computing_failed
from pdserve.engine.limits import Limits
from pdserve.engine.scheduler import Plan, Scheduler, Work
from pdserve.engine.step import RowResult, Runner
from pdserve.errors import Draining, InternalError, PdserveError
from pdserve.faults import Step, board

log = logging.getLogger(__name__)

# The clock need not be the one that waiting goes by (tests): look at it this often.
LONGEST_WAIT_S = 1.0


class EngineState(enum.Enum):
    NEW = "new"
    SERVING = "serving"
    BROKEN = "broken"
    STOPPED = "stopped"


class Engine:
    """One model, one pool, one thread.

    ``generations``: uint64 [num_blocks] of the pool, raised here. ``sink`` is called on the
    engine's thread and must not block. ``clock``: seconds, the one that deadlines go by.
    ``on_broken`` is called on the engine's thread before anybody else hears of the failure.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        block_size: int,
        num_blocks: int,
        generations: npt.NDArray[np.uint64],
        config: EngineConfig,
        hasher: BlockHasher,
        has_tiers: bool,
        sink: EventSink,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        on_broken: Callable[[PdserveError], None] | None = None,
    ) -> None:
        self.limits = Limits.of(config, block_size, num_blocks, max_model_len)
        self._runner = runner
        self._sink = sink
        self._clock = clock
        self._on_broken = on_broken
        self._scheduler = Scheduler(
            self.limits, generations, hasher, has_tiers, runner.open_sampler
        )
        self._steps = 0
        self._more = False  # the next turn has something to compute without a new command
        self._latest = self._scheduler.snapshot(0, check=False)
        self._thread = threading.Thread(target=self._run, name="pdserve-engine", daemon=True)
        self._failure: PdserveError | None = None
        # Guarded by _wake: posted commands and the state, which stop() changes from outside.
        self._wake = threading.Condition()
        self._inbox: deque[Command] = deque()
        self._state = EngineState.NEW

    # ---- for other threads -----------------------------------------------------------------------

    def start(self) -> None:
        with self._wake:
            assert self._state is EngineState.NEW
            self._state = EngineState.SERVING
        self._thread.start()

    def post(self, command: Command) -> None:
        """Any thread. Raises Draining for a Submit or an Inspect after ``stop``."""
        with self._wake:
            if self._state is not EngineState.STOPPED:
                self._inbox.append(command)
                self._wake.notify()
                return
        if isinstance(command, Submit | Inspect):
            raise Draining("the engine has stopped")

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the thread after the step in progress; what still lives is Failed(Draining)."""
        with self._wake:
            was, self._state = self._state, EngineState.STOPPED
            self._wake.notify()
        if was is EngineState.NEW:
            self._wind_up(Draining("the worker stops"))  # no thread that would do it
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def snapshot(self) -> EngineSnapshot:
        """Counts at the end of the last turn; cheap, any thread. ``violations`` is not looked for
        (Inspect does), but names the failure of a broken engine."""
        return self._latest

    @property
    def failure(self) -> PdserveError | None:
        """Why the engine is broken; None while it is sound."""
        return self._failure

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._runner.begin()
            while self.turn(wait=True):
                pass
            self._wind_up(Draining("the worker stops"))
        except Exception as error:
            log.critical("the engine is broken", exc_info=error)
            self._break(error)
            while self._answer_broken():
                pass

    def turn(self, wait: bool) -> bool:
        """One round; False once stopped. For the engine's thread, or for a host that has no other.

        ``wait``: sleep until there is something to do.
        """
        commands = self._take_commands(wait)
        if commands is None:
            return False
        self._obey(commands)
        self._scheduler.expire(self._clock())
        plan = self._scheduler.plan()
        if plan.work:
            self._flush()
            board.hit(Step.ENGINE_STEP)
            self._step(plan)
        self._more = bool(plan.work) or plan.preempted
        self._latest = self._scheduler.snapshot(self._steps, check=False)
        self._flush()
        return True

    def _take_commands(self, wait: bool) -> list[Command] | None:
        with self._wake:
            if wait and not self._more and not self._inbox and self._is_open():
                self._wake.wait(self._longest_wait())
            if not self._is_open():
                return None
            commands = list(self._inbox)
            self._inbox.clear()
            return commands

    def _is_open(self) -> bool:
        return self._state is not EngineState.STOPPED

    def _longest_wait(self) -> float | None:
        deadline = self._scheduler.next_deadline()
        if deadline == float("inf"):
            return None
        return min(max(deadline - self._clock(), 0.0), LONGEST_WAIT_S)

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Inspect):
                self._inspect(command, self._scheduler.snapshot(self._steps, check=True))
            else:
                self._scheduler.handle(command, self._clock())

    def _inspect(self, command: Inspect, snapshot: EngineSnapshot) -> None:
        try:
            command.read(snapshot)
        except Exception:
            # The reader's own failure; it must not cost anybody a sequence.
            log.exception("reading a snapshot failed")

    def _flush(self) -> None:
        events = self._scheduler.take_events()
        if events:
            self._sink(events)

    # ---- one step --------------------------------------------------------------------------------

    def _step(self, plan: Plan) -> None:
        started = self._clock()
        results: Sequence[RowResult | PdserveError] = ()
        failed: Exception | None = None
        try:
            results = self._compute(plan.work)
        except Exception as error:
            log.exception("a step of %d rows failed", len(plan.work))
            failed = error.with_traceback(None)  # which holds the step's tensors; it is in the log
        if failed is not None:
            # A device on which nothing runs any more is no row's fault, and raises here.
            self._runner.finish()
            results = self._one_by_one(plan.work, failed)
        self._steps += 1
        self._scheduler.apply(plan, results, started, self._clock())

    def _compute(self, work: Sequence[Work]) -> list[RowResult]:
        results = self._runner.step([each.row for each in work])
        if len(results) != len(work):
            raise InternalError(f"the runner answered {len(results)} of {len(work)} rows")
        for each in work:
            if each.zero_tail is not None:
                self._runner.zero_tail(*each.zero_tail)
        self._runner.finish()
        return results

    def _one_by_one(self, work: Sequence[Work], error: Exception) -> list[RowResult | PdserveError]:
        """A row's computation is idempotent, so each gets a second chance, alone."""
        if len(work) == 1:
            return [computing_failed(error)]
        results: list[RowResult | PdserveError] = []
        for each in work:
            try:
                results += self._compute([each])
            except Exception as own_error:
                self._runner.finish()
                results.append(computing_failed(own_error))
        return results

    # ---- the end ---------------------------------------------------------------------------------

    def _wind_up(self, error: PdserveError) -> None:
        """Ends everything; what was posted before the stop is still answered."""
        with self._wake:
            commands = list(self._inbox)
            self._inbox.clear()
        self._obey(commands)
        self._scheduler.fail_all(error)
        self._latest = self._scheduler.snapshot(self._steps, check=False)
        self._flush()

    def _break(self, error: Exception) -> None:
        failure = InternalError(f"the engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._failure = failure
        if self._on_broken is not None:
            self._on_broken(failure)
        with self._wake:
            if self._is_open():
                self._state = EngineState.BROKEN
        self._latest = replace(self._latest, violations=(str(failure),), idle=False)
        # The board cannot be trusted to end its sequences one by one: say it for all of them.
        events: list[Event] = [*self._scheduler.take_last_events()]
        events += [Failed(seq.id, failure) for seq in self._scheduler.unanswered()]
        self._sink_last(events)

    def _answer_broken(self) -> bool:
        assert self._failure is not None
        with self._wake:
            while not self._inbox and self._is_open():
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            is_open = self._is_open()
        for command in commands:
            if isinstance(command, Inspect):
                self._inspect(command, self._latest)
        self._sink_last(
            [Failed(each.seq, self._failure) for each in commands if isinstance(each, Submit)]
        )
        return is_open

    def _sink_last(self, events: Sequence[Event]) -> None:
        try:
            if events:
                self._sink(events)
        except Exception:
            # The sink may be what broke the engine; the log and the heartbeat still tell.
            log.exception("a broken engine's events were not taken")
