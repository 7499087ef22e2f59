"""Ends workers that no longer work, so that Ray starts them anew.

suspect for ``kill_after_s``, as the router sees it  -> killed
did not start again for a reason of its own          -> killed, later each time

The router only fences a suspect worker; ending its process is up to whoever owns it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdserve.config import TimersConfig
from pdserve.errors import PdserveError
from pdserve.types import WorkerId

if TYPE_CHECKING:
    from pdserve.cluster.seen import Seen

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_RETRY_MIN_S = 2.0
_RETRY_MAX_S = 60.0


@dataclass(slots=True)
class _Suspicion:
    incarnation: str
    since: float


class Suspects:
    """Who has been suspect for how long. Pure but for what it remembers."""

    def __init__(self, kill_after_s: float) -> None:
        self._kill_after_s = kill_after_s
        self._since: dict[str, _Suspicion] = {}

    def overdue(self, workers: Iterable[Mapping[str, Any]], now: float) -> list[str]:
        """Ids of workers suspect for too long; each is named once per suspicion."""
        suspects = {
            str(worker.get("id")): str(worker.get("incarnation"))
            for worker in workers
            if worker.get("state") == "suspect"
        }
        for worker, incarnation in suspects.items():
            known = self._since.get(worker)
            if known is None or known.incarnation != incarnation:
                self._since[worker] = _Suspicion(incarnation, now)
        self._since = {w: s for w, s in self._since.items() if w in suspects}
        late = [w for w, s in self._since.items() if now - s.since >= self._kill_after_s]
        for worker in late:
            self._since[worker].since = now
        return late


class Keeper:
    """Owns a thread that looks once a second."""

    def __init__(
        self,
        router_view: Callable[[], Iterable[Mapping[str, Any]]],
        seen: Callable[[], Mapping[WorkerId, Seen]],
        kill: Callable[[WorkerId], None],
        timers: TimersConfig,
        note: Callable[[str], None],
    ) -> None:
        self._router_view = router_view
        self._seen = seen
        self._kill = kill
        self._note = note
        self._suspects = Suspects(timers.kill_after_s)
        self._kill_after_s = timers.kill_after_s
        self._retries: dict[WorkerId, tuple[float, float]] = {}  # when next, and after how long
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            try:
                self._look()
            except PdserveError as error:
                # The router may be starting again; the next look will tell.
                logger.info("the keeper cannot look: %s", error)

    def _look(self) -> None:
        now = time.monotonic()
        known = self._seen()
        for worker, seen in known.items():
            self._retry(worker, seen, now)
        for name in self._suspects.overdue(self._router_view(), now):
            worker = WorkerId(name)
            if worker in known:
                self._note(f"{worker} was suspect for {self._kill_after_s:g} s; killing it")
                self._kill(worker)

    def _retry(self, worker: WorkerId, seen: Seen, now: float) -> None:
        """A worker that refused to start again gets another try, later each time."""
        if seen.failure is None:
            self._retries.pop(worker, None)
            return
        due, pause = self._retries.setdefault(worker, (now + _RETRY_MIN_S, _RETRY_MIN_S))
        if now >= due:
            pause = min(_RETRY_MAX_S, pause * 2)
            self._retries[worker] = (now + pause, pause)
            self._kill(worker)
