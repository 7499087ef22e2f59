"""Series that are read from their owner at each scrape instead of being counted a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

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
        yield self._gauge(
            "num_requests_running",
            "Requests that a worker computes.",
            {worker.facts.id: worker.load.running for worker in live},
        )
        yield self._gauge(
            "num_requests_waiting",
            "Requests that wait on a worker.",
            {worker.facts.id: worker.load.waiting for worker in live},
        )
        yield self._gauge(
            "kv_cache_usage_perc",
            "KV blocks in use; 1 means all.",
            {worker.facts.id: _usage(worker.load) for worker in live},
        )
        yield self._gauge(
            "engine_degraded",
            "1 while a part of a worker, such as a cache tier, does not work; /workers says which.",
            {worker.facts.id: float(bool(worker.load.degraded)) for worker in live},
        )
        yield self._blocks(live)
        yield self._late(live)
        yield self._counter(
            "engine_turn_wait_seconds",
            "What steps waited for other engines on the same cores (engine.turn_ms).",
            {worker.facts.id: worker.load.turn_wait_s for worker in live},
        )
        yield self._counter(
            "engine_turns_forced",
            "Steps that began although no other engine on the same cores let them in.",
            {worker.facts.id: worker.load.turns_forced for worker in live},
        )

    def _gauge(self, name: str, text: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=("model_name", "engine"))
        for engine, value in values.items():
            family.add_metric((self._model, engine), value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=("model_name", "engine"))
        for engine, value in values.items():
            family.add_metric((self._model, engine), value)
        return family

    def _late(self, workers: Sequence[WorkerLike]) -> Metric:
        family = CounterMetricFamily(
            self._prefix + "worker_late",
            "What came to a worker after its attempt was over, dropped: of its engine, KV reads.",
            labels=("model_name", "engine", "kind"),
        )
        self._fill(
            family, workers, lambda load: {"event": load.late_events, "kv_read": load.late_kv_reads}
        )
        return family

    def _fill(
        self,
        family: CounterMetricFamily | GaugeMetricFamily,
        workers: Sequence[WorkerLike],
        read: Callable[[Load], Mapping[str, int]],
    ) -> None:
        for worker in workers:
            for kind, count in read(worker.load).items():
                family.add_metric((self._model, worker.facts.id, kind), count)

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

    def _blocks(self, workers: Sequence[WorkerLike]) -> Metric:
        family = GaugeMetricFamily(
            self._prefix + "kv_blocks",
            "KV blocks of a worker.",
            labels=("model_name", "engine", "kind"),
        )
        self._fill(
            family,
            workers,
            lambda load: {
                "used": load.blocks_used,
                "cached": load.blocks_cached,
                "total": load.blocks_total,
            },
        )
        return family


def _usage(load: Load) -> float:
    return load.blocks_used / load.blocks_total if load.blocks_total else 0.0


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
