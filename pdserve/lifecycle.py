"""Every state machine of pdserve, each as one table; an event that a table lacks raises.

A request, as the router sees it:

    ACCEPTED -> PLACED -> STREAMING -> FINISHED
        any of the first three -> FAILED, and PLACED/STREAMING -> ACCEPTED when an attempt is lost

A sequence, as an engine sees it:

    WAITING -> FETCHING -> PREFILLING -> RUNNING -> FINISHED         (compute here)
                        -> PREFILLING -> HELD -> FINISHED            (compute for another worker)
                        -> RECEIVING -> RUNNING -> FINISHED          (another worker computes)
    RUNNING, PREFILLING -> WAITING when preempted; RECEIVING -> PREFILLING when the hand-off failed

A worker, as the router sees it: see WORKER.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from pdserve.errors import IllegalTransition
from pdserve.types import WorkerState

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


@dataclass(frozen=True)
class Table(Generic[S, E]):
    """(state, event) -> state. Frozen; holds no state itself."""

    name: str
    moves: Mapping[tuple[S, E], S]

    def next(self, state: S, event: E) -> S:
        try:
            return self.moves[state, event]
        except KeyError:
            raise IllegalTransition(
                f"{self.name}: no event {event.name} in state {state.name}"
            ) from None

    def allows(self, state: S, event: E) -> bool:
        return (state, event) in self.moves


class RequestState(enum.Enum):
    ACCEPTED = "accepted"  # valid and logged, on no worker
    PLACED = "placed"  # an attempt was sent, no token yet
    STREAMING = "streaming"
    FINISHED = "finished"
    FAILED = "failed"


class RequestEvent(enum.Enum):
    PLACE = "place"
    TOKENS = "tokens"
    ATTEMPT_LOST = "attempt_lost"
    FINISH = "finish"
    FAIL = "fail"


_R, _RE = RequestState, RequestEvent
REQUEST: Table[RequestState, RequestEvent] = Table(
    "request",
    {
        (_R.ACCEPTED, _RE.PLACE): _R.PLACED,
        (_R.ACCEPTED, _RE.FAIL): _R.FAILED,
        # The log alone can end it: what was generated already meets a stop condition.
        (_R.ACCEPTED, _RE.FINISH): _R.FINISHED,
        (_R.PLACED, _RE.TOKENS): _R.STREAMING,
        (_R.PLACED, _RE.ATTEMPT_LOST): _R.ACCEPTED,
        (_R.PLACED, _RE.FINISH): _R.FINISHED,
        (_R.PLACED, _RE.FAIL): _R.FAILED,
        (_R.STREAMING, _RE.TOKENS): _R.STREAMING,
        (_R.STREAMING, _RE.ATTEMPT_LOST): _R.ACCEPTED,
        (_R.STREAMING, _RE.FINISH): _R.FINISHED,
        (_R.STREAMING, _RE.FAIL): _R.FAILED,
    },
)


class SequenceState(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    FETCHING = "fetching"  # holds blocks; tiers are filling some of them
    PREFILLING = "prefilling"
    HELD = "held"  # computed for another worker; blocks stay until released
    RECEIVING = "receiving"  # holds blocks; another worker computes and offers
    RUNNING = "running"  # decoding
    FINISHED = "finished"


class SequenceEvent(enum.Enum):
    ADMIT = "admit"  # all blocks for the tokens known are reserved
    COMPUTE = "compute"  # tiers answered (or had nothing to say): compute the rest here
    RECEIVE = "receive"  # tiers answered: a peer computes the rest
    COMPUTED = "computed"  # the last known token is computed, the next one sampled
    HOLD = "hold"
    ARRIVED = "arrived"  # the peer's blocks are verified
    HANDOFF_FAILED = "handoff_failed"
    PREEMPT = "preempt"
    FINISH = "finish"


_S, _SE = SequenceState, SequenceEvent
SEQUENCE: Table[SequenceState, SequenceEvent] = Table(
    "sequence",
    {
        (_S.WAITING, _SE.ADMIT): _S.FETCHING,
        (_S.WAITING, _SE.FINISH): _S.FINISHED,
        # A peer failed before its blocks were granted: wait here to be computed here.
        (_S.WAITING, _SE.HANDOFF_FAILED): _S.WAITING,
        (_S.FETCHING, _SE.COMPUTE): _S.PREFILLING,
        (_S.FETCHING, _SE.RECEIVE): _S.RECEIVING,
        (_S.FETCHING, _SE.HANDOFF_FAILED): _S.FETCHING,
        (_S.FETCHING, _SE.FINISH): _S.FINISHED,
        (_S.PREFILLING, _SE.COMPUTED): _S.RUNNING,
        (_S.PREFILLING, _SE.HOLD): _S.HELD,
        (_S.PREFILLING, _SE.PREEMPT): _S.WAITING,
        (_S.PREFILLING, _SE.FINISH): _S.FINISHED,
        (_S.RECEIVING, _SE.ARRIVED): _S.RUNNING,
        (_S.RECEIVING, _SE.HANDOFF_FAILED): _S.PREFILLING,
        (_S.RECEIVING, _SE.FINISH): _S.FINISHED,
        (_S.RUNNING, _SE.PREEMPT): _S.WAITING,
        (_S.RUNNING, _SE.FINISH): _S.FINISHED,
        (_S.HELD, _SE.FINISH): _S.FINISHED,
    },
)


class WorkerEvent(enum.Enum):
    HEARTBEAT = "heartbeat"
    NO_PROGRESS = "no_progress"  # work pending, the engine's step counter stands still
    SILENT = "silent"  # no heartbeat within the bound
    DRAIN = "drain"
    UNDRAIN = "undrain"
    GONE = "gone"  # the process ended, or its incarnation was replaced


_W, _WE = WorkerState, WorkerEvent
WORKER: Table[WorkerState, WorkerEvent] = Table(
    "worker",
    {
        (_W.STARTING, _WE.HEARTBEAT): _W.READY,
        (_W.STARTING, _WE.SILENT): _W.SUSPECT,
        (_W.STARTING, _WE.NO_PROGRESS): _W.SUSPECT,
        (_W.READY, _WE.HEARTBEAT): _W.READY,
        (_W.READY, _WE.NO_PROGRESS): _W.SUSPECT,
        (_W.READY, _WE.SILENT): _W.SUSPECT,
        (_W.READY, _WE.DRAIN): _W.DRAINING,
        (_W.DRAINING, _WE.HEARTBEAT): _W.DRAINING,
        (_W.DRAINING, _WE.DRAIN): _W.DRAINING,
        (_W.DRAINING, _WE.UNDRAIN): _W.READY,
        (_W.DRAINING, _WE.NO_PROGRESS): _W.SUSPECT,
        (_W.DRAINING, _WE.SILENT): _W.SUSPECT,
        (_W.SUSPECT, _WE.HEARTBEAT): _W.READY,
        (_W.SUSPECT, _WE.NO_PROGRESS): _W.SUSPECT,
        (_W.SUSPECT, _WE.SILENT): _W.SUSPECT,
        **{(state, _WE.GONE): _W.DEAD for state in _W},
    },
)
