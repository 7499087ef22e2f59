"""Whether a cluster's first workers serve, and why not.

actors asked for -> enough of each role present, and the router told -> serving
                 -> one refuses, or dies, or it takes too long      -> its reason is raised

Serving starts with each role's minimum; the others have no place yet, perhaps for want of a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pdserve.cluster.child import tail_of
from pdserve.cluster.membership import Membership, Seen
from pdserve.errors import DeadlineExceeded, PdserveError, WorkerLost, from_wire
from pdserve.types import Role, WorkerId


def all_present(seen: Mapping[WorkerId, Seen]) -> bool:
    return all(one.facts is not None for one in seen.values())


def enough(seen: Mapping[WorkerId, Seen], minimum: Mapping[Role, int]) -> bool:
    present = Counter(one.facts.role for one in seen.values() if one.facts is not None)
    return all(present[role] >= count for role, count in minimum.items())


def _trouble(seen: Mapping[WorkerId, Seen]) -> bool:
    return any(one.failure is not None or one.deaths for one in seen.values())


def trouble_of(seen: Mapping[WorkerId, Seen]) -> PdserveError | None:
    """Why the first of these that does not start does not."""
    for worker, one in seen.items():
        if one.failure is not None:
            return from_wire(one.failure.code, f"{worker}: {one.failure.message}")
        if one.facts is None and one.deaths:
            return WorkerLost(f"{worker} died while it started")
    return None


def await_first(
    membership: Membership, minimum: Mapping[Role, int], timeout_s: float, logs: Path
) -> None:
    """Returns when enough serve. Raises the reason of the first that does not."""
    settled = membership.wait(lambda seen: enough(seen, minimum) or _trouble(seen), timeout_s)
    seen_now = membership.seen
    for worker, seen in seen_now.items():
        if seen.failure is not None:
            raise from_wire(seen.failure.code, f"{worker}: {seen.failure.message}")
        log = logs / f"{worker}.log"
        if seen.facts is None and seen.deaths:
            said = tail_of(log)
            raise WorkerLost(f"{worker} died while it started{': ' + said if said else ''}")
        if seen.facts is None and not settled and not enough(seen_now, minimum):
            raise DeadlineExceeded(f"{worker} did not start within {timeout_s:g} s; see {log}")
    if not settled:
        raise DeadlineExceeded(f"the router did not take its workers within {timeout_s:g} s")
