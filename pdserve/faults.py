"""Faults on purpose: kill, stop, hang or damage a worker at a named step of the protocol.

A worker that was started with ``testing.faults`` takes armed faults over its internal service; the
parts call ``hit`` at each named step, which costs one attribute read while nothing is armed. So a
test says "kill the decode worker at its second grant" and can say it again with the same outcome.

    board.arm(Fault(Step.DECODE_GRANT, nth=2, action=Action.KILL))
    board.hit(Step.DECODE_GRANT)      # first time: nothing
    board.hit(Step.DECODE_GRANT)      # second time: the process is gone

A fault fires once. Counting starts when it is armed.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.errors import InternalError

logger = logging.getLogger(__name__)


class Step(enum.Enum):
    """Where a fault can strike. ``prefill.*`` and ``decode.*`` are steps of one hand-off."""

    PREFILL_ACCEPT = "prefill.accept"  # a hand-off was opened, nothing is queued yet
    PREFILL_START = "prefill.start"  # blocks are reserved
    PREFILL_OFFER = "prefill.offer"  # before offers of finished blocks go out
    PREFILL_FINISH = "prefill.finish"  # before the first token goes out
    DECODE_START = "decode.start"  # an attempt came from the router
    DECODE_GRANT = "decode.grant"  # before the grant goes out
    DECODE_READ = "decode.read"  # before offered blocks are read
    DECODE_COMMIT = "decode.commit"  # all arrived, before they are handed to the engine
    DECODE_TOKENS = "decode.tokens"  # before tokens go to the router
    ENGINE_STEP = "engine.step"  # before a step is computed
    KV_REPLAY = "kv_events.replay"  # before a worker's KV events are told again
    TRANSFER_SERVE = "transfer.serve"  # before requested blocks are sent


class Action(enum.Enum):
    KILL = "kill"  # SIGKILL to the own process
    STOP = "stop"  # SIGSTOP to the own process
    HANG = "hang"  # this thread sleeps for ``seconds``
    RAISE = "raise"  # InternalError
    FLIP = "flip"  # the caller damages one bit of what it sends


@dataclass(frozen=True, slots=True)
class Fault:
    step: Step
    action: Action
    nth: int = 1  # strikes at the nth time that the step is reached
    seconds: float = 0.0  # of HANG


class FaultBoard:
    """Owns the armed faults of this process."""

    def __init__(self) -> None:
        self._armed: dict[Step, list[tuple[Fault, int]]] = {}
        self._lock = threading.Lock()
        self.fired = 0

    def arm(self, fault: Fault) -> None:
        with self._lock:
            self._armed.setdefault(fault.step, []).append((fault, fault.nth))

    def clear(self) -> None:
        with self._lock:
            self._armed = {}

    def hit(self, step: Step) -> bool:
        """The process reached ``step``. True: the caller is to damage what it sends."""
        if not self._armed:
            return False
        fault = self._due(step)
        return fault is not None and self._strike(fault)

    def _due(self, step: Step) -> Fault | None:
        with self._lock:
            left = [(fault, count - 1) for fault, count in self._armed.pop(step, [])]
            due = [fault for fault, count in left if count == 0]
            waiting = [(fault, count) for fault, count in left if count > 0]
            if waiting:
                self._armed[step] = waiting
        return due[0] if due else None

    def _strike(self, fault: Fault) -> bool:
        self.fired += 1
        logger.warning("fault on purpose: %s at %s", fault.action.value, fault.step.value)
        if fault.action is Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action is Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.action is Action.HANG:
            time.sleep(fault.seconds)
        elif fault.action is Action.RAISE:
            raise InternalError(f"a fault on purpose at {fault.step.value}")
        return fault.action is Action.FLIP


# The process' own board; every part hits the same one.
board = FaultBoard()


def flip_bit(views: Sequence[memoryview]) -> list[memoryview]:
    """The same bytes but for one bit in the middle; the originals stay as they are."""
    copies = [bytearray(view) for view in views]
    middle = copies[len(copies) // 2]
    middle[len(middle) // 2] ^= 1
    return [memoryview(copy) for copy in copies]
