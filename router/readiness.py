"""Whether the router may be given requests, and what it falls short of.

    self-test -> proved(...)       a request went the whole way, or why it did not
              -> kv_moved(...)     what became of the KV of a request that was given to a pair
    owner     -> control_plane(..) whether workers that die can be started again
    fronts    -> judge()           both, with what workers and their KV events say now

Observed here, decided in router/separation.py. In strict mode a new proof counts once every tier
was seen to work and every worker's events came; what joins later is given time.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_tiers.kv_subscriber import SURE_WITHIN_S
from pdserve.config import Config
from pdserve.types import Reach, Tier, WorkerState
from router.api import WorkerView
from router.kv_view import KvView
from router.registry import Registry
from router.separation import Cause, Observed, Shortfall, TierReport, shortfalls

# Heartbeats that a worker may miss before it is suspect; its events are given twice as long.
UNHEARD_FACTOR = 2.0
AWAY = Shortfall(
    Cause.CONTROL_PLANE_AWAY,
    "Ray's control plane is away: streams run on, and no worker is started until it is back",
)


@dataclass(frozen=True, slots=True)
class Judgement:
    ready: bool
    reason: str  # empty when ready
    shortfalls: tuple[Shortfall, ...]


class Readiness:
    """Owner of the self-test's verdict and of the tiers that ever worked. Event loop only."""

    def __init__(self, registry: Registry, kv_view: KvView, config: Config) -> None:
        self._registry = registry
        self._kv_view = kv_view
        self._strict = config.router.strict
        self._unheard_limit_s = max(UNHEARD_FACTOR * config.timers.dead_after_s, SURE_WITHIN_S)
        self._evident = not self._strict  # whether the cluster was ready since it was last unproven
        self._proof = (False, "no request has gone the whole way yet")
        self._unmoved = ""
        self._away = False
        self._reached: frozenset[Tier] = frozenset()

    def proved(self, proven: bool, why: str) -> None:
        """Whether a request has gone the whole way; ``why`` not."""
        self._proof = (proven, why)
        if not proven:
            self._evident = not self._strict

    def kv_moved(self, unmoved: str) -> None:
        """``unmoved``: why a pair's KV did not move; empty when it did, or there is no pair."""
        self._unmoved = unmoved

    def control_plane(self, *, away: bool) -> None:
        """As whoever starts the workers sees it."""
        self._away = away

    def judge(self) -> Judgement:
        """Leaves out whether a request could be placed now."""
        found = shortfalls(self._observe())
        proven, why = self._proof
        if proven and found and self._strict:
            proven, why = False, "; ".join(one.text for one in found)
        self._evident |= proven
        told = (*found, AWAY) if self._away else found
        return Judgement(proven, "" if proven else why, told)

    def _observe(self) -> Observed:
        ready = [v for v in self._registry.snapshot() if v.state is WorkerState.READY]
        tiers = [report for view in ready for report in _reports(view)]
        self._reached |= {one.tier for one in tiers if one.reach is Reach.REACHED}
        serving = {view.facts.id for view in ready}
        unheard = self._kv_view.unheard_s(patient=self._evident)
        return Observed(
            unmoved=self._unmoved,
            tiers=tiers,
            reached=self._reached,
            untried_lacks=not self._evident,
            unheard_s={worker: since for worker, since in unheard.items() if worker in serving},
            unheard_limit_s=self._unheard_limit_s,
        )


def _reports(view: WorkerView) -> tuple[TierReport, TierReport]:
    load, worker = view.load, view.facts.id
    return (
        TierReport(worker, Tier.HOST, load.reach.host, load.degraded),
        TierReport(worker, Tier.REDIS, load.reach.redis, load.degraded),
    )
