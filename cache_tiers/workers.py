"""A queue with its own threads, from which nothing gets lost: every job is handled or handed back.

    post -> queued -> taken by a thread -> handled
               \\-> handed back by stop()

``wait_idle`` returns when no job is queued or being handled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

J = TypeVar("J")


class Workers(Generic[J]):
    """``handle`` runs on one of ``threads`` threads and answers for its own errors.

    ``idle``: called once at the start, and by a thread that found no job for ``idle_s``.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        handle: Callable[[J], None],
        idle: Callable[[], None] | None = None,
        idle_s: float = 0.0,
    ) -> None:
        self._handle = handle
        self._idle = idle
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._has_ended = threading.Condition(self._lock)
        self._queue: deque[J] = deque()
        self._busy = 0
        self._stopped = False
        self._failures = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        with self._lock:
            return len(self._queue)

    @property
    def failures(self) -> int:
        """Jobs whose handler raised; each is in the log."""
        with self._lock:
            return self._failures

    def post(self, job: J) -> bool:
        """False after ``stop``: the job was not taken."""
        with self._lock:
            if self._stopped:
                return False
            self._queue.append(job)
            self._has_work.notify()
            return True

    def wait_idle(self, deadline: float) -> bool:
        """Whether every job was done by ``deadline`` (time.monotonic())."""
        with self._lock:
            return self._has_ended.wait_for(
                lambda: not self._queue and not self._busy,
                timeout=max(0.0, deadline - time.monotonic()),
            )

    def stop(self) -> list[J]:
        """Takes no more jobs; returns those that were not begun."""
        with self._lock:
            self._stopped = True
            left_over = list(self._queue)
            self._queue.clear()
            self._has_work.notify_all()
            self._has_ended.notify_all()
            return left_over

    def join(self, deadline: float) -> None:
        """After ``stop``: waits for the jobs that were begun."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        if self._idle is not None:
            self._guard(self._idle)
        while True:
            with self._lock:
                if not self._queue and not self._stopped:
                    self._has_work.wait(self._idle_s if self._idle is not None else None)
                if self._stopped:
                    return
                job = self._queue.popleft() if self._queue else None
                self._busy += job is not None
            if job is not None:
                self._guard(self._handle, job)
                job = None  # an idle thread keeps no job's memory alive
                with self._lock:
                    self._busy -= 1
                    self._has_ended.notify_all()
            elif self._idle is not None:
                self._guard(self._idle)

    def _guard(self, work: Callable[..., None], *args: Any) -> None:
        """A broken handler must be seen, and must not end the thread."""
        try:
            work(*args)
        except Exception:
            with self._lock:
                self._failures += 1
            logger.exception("a cache tier's job failed")
