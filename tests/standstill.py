"""How long this machine stood still: a bound on another process must not count that.

    with watched() as still:
        ...
        assert took < BOUND_S + still.seconds

A thread sleeps for moments and adds up by how much each was overslept; the one that it sleeps just
now counts, too. Another process that is late while this thread is not gets nothing for it, nor does
code of this process that keeps the interpreter: its own processor time is taken off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOMENT_S = 0.02
# A sleep that is longer by less is the scheduler's everyday business.
NOTED_S = 0.2


class Standstill:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = 0.0
        # Of the sleep that runs: time.monotonic() and time.process_time() when it began.
        self._began = (time.monotonic(), time.process_time())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standstill", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        with self._lock:
            return self._ended + self._overslept()

    def _overslept(self) -> float:
        began, worked = self._began
        overslept = time.monotonic() - began - MOMENT_S - (time.process_time() - worked)
        return overslept if overslept > NOTED_S else 0.0

    def _watch(self) -> None:
        while not self._over.is_set():
            time.sleep(MOMENT_S)
            with self._lock:
                self._ended += self._overslept()
                self._began = (time.monotonic(), time.process_time())

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def watched() -> Iterator[Standstill]:
    still = Standstill()
    try:
        yield still
    finally:
        still.close()
