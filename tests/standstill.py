"""How long this machine stood still: a bound on another process must not count that.

    with watched() as still:
        ...
        assert took < BOUND_S + still.seconds

A thread sleeps for moments and adds up by how much each was overslept. Another process that is late
while this thread is not gets nothing for it.
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
        self.seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standstill", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            before = time.monotonic()
            time.sleep(MOMENT_S)
            overslept = time.monotonic() - before - MOMENT_S
            if overslept > NOTED_S:
                self.seconds += overslept

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
