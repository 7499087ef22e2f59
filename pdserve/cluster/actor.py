"""The Ray actor around one worker: starts the role, says what it found out, stops it.

constructed (by Ray, in a new process, again whenever that dies)
    -first describe-> the role starts: serving | failed -stop-> stopped

The constructor does nothing that can fail: Ray would repeat it without a word. A start that fails
for a reason of ours is kept and told by every ``describe``; one that kills the process fails the
``describe`` that began it. Each start is another incarnation of the worker.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pdserve.collector import starting_up
from pdserve.engine.host_memory import Memory
from pdserve.errors import Draining, InternalError, PdserveError
from pdserve.telemetry import setup_logging
from pdserve.types import WorkerFacts
from pdserve.worker.boot import RunningWorker, WorkerBoot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Why a worker does not serve; see pdserve.errors.from_wire."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ActorBoot:
    """A worker's boot and what its process needs around it."""

    worker: WorkerBoot
    module: str  # holds start_worker
    log: str  # file for all output; empty leaves it to Ray
    memory: Mapping[str, Memory]  # of each host that was there at first, by Ray's id of the node


class WorkerActor:
    """Owns one worker; Ray calls its methods one at a time."""

    def __init__(self, boot: ActorBoot) -> None:
        self._boot = boot
        self._running: RunningWorker | None = None
        self._failure: StartFailure | None = None

    def describe(self) -> WorkerFacts | StartFailure:
        """Starts the worker at the first call; seconds to minutes then, nothing later."""
        if self._running is None and self._failure is None:
            self._start()
        if self._running is not None:
            return self._running.facts
        assert self._failure is not None
        return self._failure

    def _start(self) -> None:
        boot = self._boot
        _set_up_logging(boot)
        try:
            with starting_up():
                start = importlib.import_module(boot.module).start_worker
                self._running = start(_placed(boot))
        except PdserveError as error:
            logger.error("does not start: %s", error)
            self._failure = StartFailure(error.code, str(error))
        except Exception as error:
            logger.exception("does not start")
            what = f"{type(error).__name__}: {error}"
            self._failure = StartFailure(InternalError.code, what.splitlines()[0])

    def stop(self, drain_s: float) -> None:
        running, self._running = self._running, None
        self._failure = StartFailure(Draining.code, "the worker was stopped")
        if running is not None:
            running.stop(drain_s)


def _placed(boot: ActorBoot) -> WorkerBoot:
    """Fills in where Ray put us, unless the owner knew, and what memory there was."""
    import ray  # noqa: PLC0415

    worker = boot.worker
    memory = boot.memory.get(ray.get_runtime_context().get_node_id())
    if worker.host and worker.node:
        return replace(worker, memory=memory)
    address = str(ray.util.get_node_ip_address())
    return replace(worker, host=worker.host or address, node=worker.node or address, memory=memory)


def _set_up_logging(boot: ActorBoot) -> None:
    if boot.log:
        fd = os.open(boot.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
    setup_logging(boot.worker.config.log, boot.worker.worker_id)
