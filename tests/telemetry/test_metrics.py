"""The metrics that a scrape sees, read back with Prometheus's own parser."""

from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from pdserve.telemetry import metrics
from pdserve.types import (
    CachedTokens,
    Fingerprint,
    FinishReason,
    Incarnation,
    Load,
    ModelFacts,
    Numerics,
    Role,
    TierBlocks,
    Usage,
    WorkerFacts,
    WorkerId,
    WorkerState,
)


def scrape(made: metrics.RouterMetrics) -> dict[tuple[str, ...], float]:
    """(name, engine if any, other labels) -> value; checks the model's label on the way."""
    body, content_type = made.render()
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if not sample.name.startswith("pdserve:"):
                continue
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            engine = [labels.pop("engine")] if "engine" in labels else []
            key = (sample.name.removeprefix("pdserve:"), *engine, *labels.values())
            found[key] = sample.value
    return found


@pytest.fixture
def made() -> metrics.RouterMetrics:
    return metrics.RouterMetrics(CollectorRegistry(), "m", max_model_len=8192)


def test_a_request_that_finished_is_counted_in_every_place(made: metrics.RouterMetrics) -> None:
    timer = made.request_started()
    assert scrape(made)["requests_in_flight", "0"] == 1
    timer.tokens(1)
    timer.tokens(1)
    timer.tokens(3)
    timer.tokens(0)
    usage = Usage(
        prompt_tokens=40,
        completion_tokens=5,
        cached_tokens=CachedTokens(16, 4, 2),
        kv_bytes_transferred=1000,
        kv_transport="shm",
        preemptions=1,
        resumes=2,
    )
    timer.finished(FinishReason.LENGTH, usage)
    timer.failed("cancelled")  # late: the request has ended
    found = scrape(made)
    expected = {
        ("requests_in_flight", "0"): 0,
        ("request_success_total", "0", "length"): 1,
        ("request_success_total", "0", "stop"): 0,
        ("request_success_total", "0", "abort"): 0,
        ("prompt_tokens_total", "0"): 40,
        ("generation_tokens_total", "0"): 5,
        ("request_prompt_tokens_sum", "0"): 40,
        ("request_generation_tokens_sum", "0"): 5,
        ("time_to_first_token_seconds_count", "0"): 1,
        ("inter_token_latency_seconds_count", "0"): 4,
        ("request_time_per_output_token_seconds_count", "0"): 1,
        ("e2e_request_latency_seconds_count", "0"): 1,
        ("prefix_cache_queries_total", "0"): 40,
        ("prefix_cache_hits_total", "0"): 22,
        ("prefix_cache_tier_hits_total", "0", "host"): 4,
        ("num_preemptions_total", "0"): 1,
        ("request_resumes_total", "0"): 2,
        ("kv_transfers_total", "0", "shm"): 1,
        ("kv_transfer_bytes_total", "0", "shm"): 1000,
    }
    assert {name: found[name] for name in expected} == expected
    assert not [name for name in found if name[0].startswith("kv_transfers_skipped")]


def test_what_went_wrong_is_counted_by_code(made: metrics.RouterMetrics) -> None:
    made.rejected("overloaded", 0.003)
    made.request_started().failed("worker_lost")
    made.request_started().failed("cancelled")
    made.request_started().finished(
        FinishReason.STOP, Usage(1, 1, kv_skipped_reason="little_uncached")
    )
    found = scrape(made)
    assert found["requests_rejected_total", "0", "overloaded"] == 1
    assert found["requests_failed_total", "0", "worker_lost"] == 1
    assert found["request_success_total", "0", "error"] == 1
    assert found["request_success_total", "0", "abort"] == 1
    assert found["request_success_total", "0", "stop"] == 1
    assert found["kv_transfers_skipped_total", "0", "little_uncached"] == 1
    assert found["requests_in_flight", "0"] == 0


def test_times_fall_into_the_buckets_that_dashboards_expect(made: metrics.RouterMetrics) -> None:
    made.first_token(0.03)
    made.tokens(2, 0.12)  # 60 ms each
    found = scrape(made)
    assert found["time_to_first_token_seconds_bucket", "0", "0.02"] == 0
    assert found["time_to_first_token_seconds_bucket", "0", "0.04"] == 1
    assert found["inter_token_latency_seconds_bucket", "0", "0.05"] == 0
    assert found["inter_token_latency_seconds_bucket", "0", "0.075"] == 2
    # Bounds, +Inf aside.
    counts = {"time_to_first_token_seconds": 22, "inter_token_latency_seconds": 19}
    counts["e2e_request_latency_seconds"] = 21
    for name, bounds in counts.items():
        assert len([key for key in found if key[0] == f"{name}_bucket"]) == bounds + 1
    assert metrics.length_buckets(8192)[-3:] == (1000, 2000, 5000)
    assert metrics.length_buckets(1) == (1,)


@dataclass(frozen=True)
class View:
    facts: WorkerFacts
    state: WorkerState
    load: Load = field(default_factory=Load)


def worker(name: str, role: Role) -> WorkerFacts:
    model = ModelFacts("p", 8, 8, 8, "float32", Numerics.EXACT, Fingerprint(bytes(32)))
    return WorkerFacts(WorkerId(name), Incarnation(bytes(16)), role, 1, "n", "a", model, 10)


def test_workers_are_read_at_each_scrape(made: metrics.RouterMetrics) -> None:
    views: list[View] = []
    made.watch_workers(lambda: views)
    assert scrape(made)["workers", "decode", "ready"] == 0
    views.append(
        View(
            worker("decode-0", Role.DECODE),
            WorkerState.READY,
            Load(
                running=3,
                waiting=2,
                blocks_used=4,
                blocks_cached=5,
                blocks_total=16,
                late_events=6,
                late_kv_reads=7,
                turn_wait_s=1.5,
                turns_forced=8,
                tiers=TierBlocks(redis_unsent=9, redis_rejected=10),
            ),
        )
    )
    views.append(View(worker("prefill-0", Role.PREFILL), WorkerState.DEAD, Load(running=9)))
    found = scrape(made)
    assert found["workers", "decode", "ready"] == 1
    assert found["workers", "prefill", "dead"] == 1
    assert found["num_requests_running", "decode-0"] == 3
    assert found["num_requests_waiting", "decode-0"] == 2
    assert found["kv_cache_usage_perc", "decode-0"] == 0.25
    assert found["kv_blocks", "decode-0", "cached"] == 5
    assert found["engine_degraded", "decode-0"] == 0
    assert found["worker_late_total", "decode-0", "event"] == 6
    assert found["worker_late_total", "decode-0", "kv_read"] == 7
    assert found["engine_turn_wait_seconds_total", "decode-0"] == 1.5
    assert found["engine_turns_forced_total", "decode-0"] == 8
    assert found["redis_blocks_lost_total", "decode-0", "unsent"] == 9
    assert found["redis_blocks_lost_total", "decode-0", "rejected"] == 10
    assert ("num_requests_running", "prefill-0") not in found
    views[0] = View(views[0].facts, WorkerState.READY, Load(degraded="redis unreachable"))
    assert scrape(made)["engine_degraded", "decode-0"] == 1
    views.clear()
    assert scrape(made)["workers", "decode", "ready"] == 0


def test_every_cause_of_a_shortfall_has_a_series(made: metrics.RouterMetrics) -> None:
    causes = {"kv_not_moved": False, "tier_unreached": True}
    made.watch_shortfalls(lambda: causes)
    found = scrape(made)
    assert found["shortfall", "kv_not_moved"] == 0
    assert found["shortfall", "tier_unreached"] == 1


def test_counters_of_other_owners_are_served_too(made: metrics.RouterMetrics) -> None:
    counts = {"late_events": 0, "attempts": 7}
    made.watch_counters(lambda: counts)
    counts["late_events"] += 2
    found = scrape(made)
    assert found["router_late_events_total",] == 2
    assert found["router_attempts_total",] == 7


def test_open_metrics_is_answered_to_who_asks_for_it(made: metrics.RouterMetrics) -> None:
    body, content_type = made.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    # The names are the same ones; a library that escapes would write pdserve_.
    assert b"\npdserve:requests_in_flight{" in body
    assert b"pdserve_" not in body
    assert b'"pdserve:' not in body
