"""Whether the cluster does what it was asked for: a pure decision over what the router observed.

    observed -> shortfalls(observed) -> ()        the phases are separated, and the tiers work
                                        (...)     what is not so, each with its reason in words

In strict mode each of them keeps the router unready; without, each is told as degraded. A cluster
that was never asked for something (a pool, a tier, events) falls short of nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pdserve.types import Reach, Tier, WorkerId


class Cause(enum.Enum):
    KV_NOT_MOVED = "kv_not_moved"
    TIER_UNREACHED = "tier_unreached"
    EVENTS_UNHEARD = "events_unheard"
    CONTROL_PLANE_AWAY = "control_plane_away"  # judged elsewhere: no request suffers from it


@dataclass(frozen=True, slots=True)
class Shortfall:
    cause: Cause
    text: str  # for operators: names workers, no addresses


@dataclass(frozen=True, slots=True)
class TierReport:
    """What one ready worker says about one of its tiers."""

    worker: WorkerId
    tier: Tier
    reach: Reach
    why: str = ""  # what the worker says does not work


@dataclass(frozen=True, slots=True)
class Observed:
    # Why a request that was given to a pair moved no KV, as of the last one sent to find out;
    # empty when KV moved, or when there is no pair.
    unmoved: str = ""
    tiers: Sequence[TierReport] = ()
    # Tiers that some worker reached since the router started.
    reached: frozenset[Tier] = frozenset()
    # Whether a tier that nobody tried yet is lacking, too.
    untried_lacks: bool = False
    # Seconds since the router last knew all of a ready worker's KV events; infinity where they
    # were asked for and the worker publishes none.
    unheard_s: Mapping[WorkerId, float] = field(default_factory=dict)
    unheard_limit_s: float = 0.0


def shortfalls(seen: Observed) -> tuple[Shortfall, ...]:
    found = []
    if seen.unmoved:
        text = f"KV does not move between workers: {seen.unmoved}"
        found.append(Shortfall(Cause.KV_NOT_MOVED, text))
    lacking = {Reach.NEVER, Reach.UNTRIED} if seen.untried_lacks else {Reach.NEVER}
    for tier in Tier:
        # One that worked once and fails now costs speed; that is a worker's to tell, not ours.
        never = [one for one in seen.tiers if one.tier is tier and one.reach in lacking]
        if never and tier not in seen.reached:
            text = f"the {tier.value} tier never worked: {', '.join(map(_report, never))}"
            found.append(Shortfall(Cause.TIER_UNREACHED, text))
    unheard = sorted(w for w, since in seen.unheard_s.items() if since > seen.unheard_limit_s)
    if unheard:
        text = f"the KV events of {', '.join(unheard)} do not come"
        found.append(Shortfall(Cause.EVENTS_UNHEARD, text))
    return tuple(found)


def _report(one: TierReport) -> str:
    return f"{one.worker} ({one.why})" if one.why else str(one.worker)
