"""Whether a cluster's first workers serve, and why not.

actors asked for -> STARTING -> SERVING      enough of each role present, and the router told
                             -> Trouble      one refuses or dies first; its reason is raised
                             -> (too long)   DeadlineExceeded names who is missing

Serving starts with each role's minimum; the others have no place yet, perhaps for want of a node.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdserve.cluster.child import tail_of
from pdserve.errors import DeadlineExceeded, PdserveError, WorkerLost, from_wire
from pdserve.types import Role, WorkerId

if TYPE_CHECKING:  # both bring in Ray
    from pdserve.cluster.actor import StartFailure
    from pdserve.cluster.membership import Membership
    from pdserve.cluster.seen import Seen


class Start(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"


@dataclass(frozen=True, slots=True)
class Trouble:
    """The first worker that does not start. ``failure``: what it said; None: it died."""

    worker: WorkerId
    failure: StartFailure | None

    def error(self, last_words: str = "") -> PdserveError:
        if self.failure is not None:
            return from_wire(self.failure.code, f"{self.worker}: {self.failure.message}")
        said = f": {last_words}" if last_words else ""
        return WorkerLost(f"{self.worker} died while it started{said}")


def all_present(seen: Mapping[WorkerId, Seen]) -> bool:
    return all(one.facts is not None for one in seen.values())


def trouble_of(seen: Mapping[WorkerId, Seen]) -> Trouble | None:
    """One that died and is there again is none."""
    for worker, one in seen.items():
        if one.facts is None and (one.failure is not None or one.deaths):
            return Trouble(worker, one.failure)
    return None


def judge(seen: Mapping[WorkerId, Seen], minimum: Mapping[Role, int]) -> Start | Trouble:
    """Enough are enough, whatever becomes of the others."""
    present = Counter(one.facts.role for one in seen.values() if one.facts is not None)
    if all(present[role] >= count for role, count in minimum.items()):
        return Start.SERVING
    return trouble_of(seen) or Start.STARTING


def await_first(
    membership: Membership, minimum: Mapping[Role, int], timeout_s: float, logs: Path
) -> None:
    """Returns when enough serve. Raises the reason of the first that does not."""
    limit = time.monotonic() + timeout_s
    while True:
        is_known = membership.wait(
            lambda seen: judge(seen, minimum) is not Start.STARTING, limit - time.monotonic()
        )
        seen = membership.seen
        match judge(seen, minimum):
            case Trouble() as trouble:
                raise trouble.error(tail_of(logs / f"{trouble.worker}.log"))
            case Start.SERVING if is_known:
                return
            case Start.SERVING if time.monotonic() >= limit:
                raise DeadlineExceeded(
                    f"the router did not take its workers within {timeout_s:g} s"
                )
            case Start.STARTING if time.monotonic() >= limit:
                missing = next(worker for worker, one in seen.items() if one.facts is None)
                raise DeadlineExceeded(
                    f"{missing} did not start within {timeout_s:g} s; see {logs / missing}.log"
                )
