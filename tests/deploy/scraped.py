"""A router's metrics with something in every series, so that each query has an answer."""

from prometheus_client import CollectorRegistry

from pdserve.telemetry.metrics import RouterMetrics
from pdserve.types import (
    CachedTokens,
    FinishReason,
    Load,
    Role,
    Usage,
    WorkerState,
)
from router.counters import Counters
from router.separation import Cause
from tests.telemetry.test_metrics import View, worker


def busy_metrics() -> RouterMetrics:
    made = RouterMetrics(CollectorRegistry(), "m", max_model_len=8192)
    load = Load(running=3, waiting=2, blocks_used=4, blocks_cached=5, blocks_total=16)
    ready = WorkerState.READY
    views = [View(worker(f"{role.value}-0", role), ready, load) for role in Role]
    made.watch_workers(lambda: views)
    made.watch_counters(Counters().read)
    made.watch_shortfalls(lambda: {cause.value: False for cause in Cause})
    serve_some(made)
    return made


def serve_some(made: RouterMetrics) -> None:
    """A request that moved, one that did not, one that failed, one that was refused."""
    moved = Usage(
        prompt_tokens=40,
        completion_tokens=5,
        cached_tokens=CachedTokens(16, 4, 2),
        kv_bytes_transferred=1000,
        kv_transport="tcp",
        preemptions=1,
        resumes=20,
    )
    for usage in (moved, Usage(9, 3, kv_skipped_reason="no_prefill_worker")):
        timer = made.request_started()
        for _ in range(4):
            timer.tokens(1)
        timer.finished(FinishReason.STOP, usage)
    made.request_started().failed("worker_lost")
    made.rejected("overloaded", 0.01)
