"""Series that are read from their owner at each scrape instead of being counted a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdserve.types import Load, Role, WorkerFacts, WorkerState


class WorkerLike(Protocol):
    """What the router's registry knows of one worker."""

    @property
    def facts(self) -> WorkerFacts: ...

    @property
    def state(self) -> WorkerState: ...

    @property
    def load(self) -> Load: ...


class WorkerCollector(Collector):
    """Workers by role and state; requests and blocks of each, with its id as ``engine``."""

    def __init__(
        self, read: Callable[[], Sequence[WorkerLike]], model_name: str, prefix: str
    ) -> None:
        self._read = read
        self._model = model_name
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        """Without it, registering would read workers that may not be there yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        workers = self._read()
        yield self._by_state(workers)
        live = [worker for worker in workers if worker.state is not WorkerState.DEAD]
        for kind, name, text, read in _OF_EACH:
            family = kind(self._prefix + name, text, labels=("model_name", "engine"))
            for worker in live:
                family.add_metric((self._model, worker.facts.id), read(worker.load))
            yield family
        for kind, name, text, read_kinds in _OF_EACH_BY_KIND:
            family = kind(self._prefix + name, text, labels=("model_name", "engine", "kind"))
            for worker in live:
                for of, count in read_kinds(worker.load).items():
                    family.add_metric((self._model, worker.facts.id, of), count)
            yield family

    def _by_state(self, workers: Sequence[WorkerLike]) -> Metric:
        """Every combination has a series, so that a worker that went away reads as 0."""
        family = GaugeMetricFamily(
            self._prefix + "workers", "Workers.", labels=("model_name", "role", "state")
        )
        found = Counter((worker.facts.role, worker.state) for worker in workers)
        for role in Role:
            for state in WorkerState:
                family.add_metric((self._model, role.value, state.value), found[role, state])
        return family


def _usage(load: Load) -> float:
    return load.blocks_used / load.blocks_total if load.blocks_total else 0.0


_Family: TypeAlias = type[GaugeMetricFamily | CounterMetricFamily]
_OF_EACH: tuple[tuple[_Family, str, str, Callable[[Load], float]], ...] = (
    (
        GaugeMetricFamily,
        "num_requests_running",
        "Requests that a worker computes.",
        lambda load: load.running,
    ),
    (
        GaugeMetricFamily,
        "num_requests_waiting",
        "Requests that wait on a worker.",
        lambda load: load.waiting,
    ),
    (GaugeMetricFamily, "kv_cache_usage_perc", "KV blocks in use; 1 means all.", _usage),
    (
        GaugeMetricFamily,
        "engine_degraded",
        "1 while a part of a worker, such as a cache tier, does not work; /workers says which.",
        lambda load: bool(load.degraded),
    ),
    (
        CounterMetricFamily,
        "engine_turn_wait_seconds",
        "What steps waited for other engines on the same cores (engine.turn_ms).",
        lambda load: load.turn_wait_s,
    ),
    (
        CounterMetricFamily,
        "engine_turns_forced",
        "Steps that began although no other engine on the same cores let them in.",
        lambda load: load.turns_forced,
    ),
)
_OF_EACH_BY_KIND: tuple[tuple[_Family, str, str, Callable[[Load], Mapping[str, int]]], ...] = (
    (
        GaugeMetricFamily,
        "kv_blocks",
        "KV blocks of a worker.",
        lambda load: {
            "used": load.blocks_used,
            "cached": load.blocks_cached,
            "total": load.blocks_total,
        },
    ),
    (
        CounterMetricFamily,
        "worker_late",
        "What came to a worker after its attempt was over, dropped: of its engine, KV reads.",
        lambda load: {"event": load.late_events, "kv_read": load.late_kv_reads},
    ),
    (
        CounterMetricFamily,
        "redis_blocks_lost",
        "KV blocks that Redis did not get, for want of room or by a failure, or gave as another.",
        lambda load: {"unsent": load.tiers.redis_unsent, "rejected": load.tiers.redis_rejected},
    ),
)


class ShortfallCollector(Collector):
    """What the cluster was asked for and does not do; every cause has a series."""

    def __init__(
        self, read: Callable[[], Mapping[str, bool]], model_name: str, prefix: str
    ) -> None:
        self._read = read
        self._model = model_name
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            self._prefix + "shortfall",
            "1 while the cluster does not do what it was asked for; /live.json says why.",
            labels=("model_name", "cause"),
        )
        for cause, found in self._read().items():
            family.add_metric((self._model, cause), found)
        yield family


class CounterCollector(Collector):
    """Rising counts that somebody else owns."""

    def __init__(self, read: Callable[[], Mapping[str, int]], model_name: str, prefix: str) -> None:
        self._read = read
        self._model = model_name
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for name, count in self._read().items():
            family = CounterMetricFamily(
                f"{self._prefix}router_{name}",
                f"{name.replace('_', ' ').capitalize()}, since the router started.",
                labels=("model_name",),
            )
            family.add_metric((self._model,), count)
            yield family
