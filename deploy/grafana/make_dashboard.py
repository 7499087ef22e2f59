"""Writes dashboard.json: ``python deploy/grafana/make_dashboard.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WIDTH, HEIGHT = 8, 8
PER_ROW = 24 // WIDTH
CHOSEN = 'job=~"$job",model_name=~"$model"'


@dataclass(frozen=True)
class Panel:
    """One graph: queries with their legends."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str
    stacked: bool = False


def rate(name: str, by: str = "", match: str = "") -> str:
    chosen = f"{CHOSEN},{match}" if match else CHOSEN
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate(pdserve:{name}{{{chosen}}}[$__rate_interval]))"


def quantiles(name: str) -> tuple[tuple[str, str], ...]:
    inner = rate(f"{name}_bucket", "le")
    return tuple(
        (f"histogram_quantile({share}, {inner})", f"p{share[2:]}")
        for share in ("0.50", "0.95", "0.99")
    )


def gauge(name: str, by: str, match: str = "") -> str:
    chosen = f"{CHOSEN},{match}" if match else CHOSEN
    return f"sum by ({by}) (pdserve:{name}{{{chosen}}})"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Requests",
        (
            Panel(
                "Requests ended",
                "reqps",
                ((rate("request_success_total", "finished_reason"), "{{finished_reason}}"),),
                "Requests a second by how they ended.",
                stacked=True,
            ),
            Panel(
                "In flight",
                "short",
                ((f"sum(pdserve:requests_in_flight{{{CHOSEN}}})", "in flight"),),
                "Accepted and not ended.",
            ),
            Panel(
                "Refused and failed",
                "reqps",
                (
                    (rate("requests_rejected_total", "code"), "refused: {{code}}"),
                    (rate("requests_failed_total", "code"), "failed: {{code}}"),
                ),
                "By error code. Refused ones were never started.",
            ),
            Panel(
                "Time to the first token",
                "s",
                quantiles("time_to_first_token_seconds"),
                "From acceptance, prefill and hand-off included.",
            ),
            Panel(
                "Between tokens",
                "s",
                quantiles("inter_token_latency_seconds"),
                "Between a token and the next of one stream.",
            ),
            Panel(
                "Whole request",
                "s",
                quantiles("e2e_request_latency_seconds"),
                "From acceptance to the end.",
            ),
            Panel(
                "Tokens",
                "short",
                (
                    (rate("prompt_tokens_total"), "prompt"),
                    (rate("generation_tokens_total"), "generated"),
                ),
                "Tokens a second.",
            ),
            Panel(
                "Mean lengths",
                "short",
                (
                    (
                        f"{rate('request_prompt_tokens_sum')}"
                        f" / {rate('request_prompt_tokens_count')}",
                        "prompt",
                    ),
                    (
                        f"{rate('request_generation_tokens_sum')}"
                        f" / {rate('request_generation_tokens_count')}",
                        "answer",
                    ),
                ),
                "Tokens of a request.",
            ),
            Panel(
                "Time to refuse",
                "s",
                quantiles("request_rejection_seconds"),
                "How long a request that is refused had to wait for that.",
            ),
        ),
    ),
    (
        "Pools",
        (
            Panel(
                "Workers",
                "short",
                ((gauge("workers", "role, state") + " > 0", "{{role}} {{state}}"),),
                "Workers by role and state.",
            ),
            Panel(
                "Running",
                "short",
                ((gauge("num_requests_running", "engine"), "{{engine}}"),),
                "Requests that each worker computes.",
            ),
            Panel(
                "Waiting",
                "short",
                ((gauge("num_requests_waiting", "engine"), "{{engine}}"),),
                "Requests that wait on each worker.",
            ),
            Panel(
                "KV pool in use",
                "percentunit",
                ((f"max by (engine) (pdserve:kv_cache_usage_perc{{{CHOSEN}}})", "{{engine}}"),),
                "Blocks in use of all, by worker.",
            ),
            Panel(
                "Blocks",
                "short",
                ((gauge("kv_blocks", "kind"), "{{kind}}"),),
                "KV blocks of all workers: used, cached, in all.",
            ),
            Panel(
                "Degraded",
                "short",
                ((gauge("engine_degraded", "engine"), "{{engine}}"),),
                "Workers of which a part, such as a cache tier, does not work; see /workers.",
            ),
            Panel(
                "Shortfalls",
                "short",
                ((gauge("shortfall", "cause"), "{{cause}}"),),
                "What the cluster was asked for and does not do.",
            ),
            Panel(
                "Preempted and resumed",
                "reqps",
                (
                    (rate("num_preemptions_total"), "preempted"),
                    (rate("request_resumes_total"), "resumed elsewhere"),
                ),
                "Sequences that gave up blocks; requests that went on on other workers.",
            ),
            Panel(
                "Turns on shared cores",
                "short",
                (
                    (rate("engine_turn_wait_seconds_total", "engine"), "{{engine}} waits"),
                    (rate("engine_turns_forced_total", "engine"), "{{engine}} forced"),
                ),
                "Seconds a second that steps wait for other engines; steps nobody let in.",
            ),
        ),
    ),
    (
        "Hand-off and caches",
        (
            Panel(
                "Hand-offs",
                "reqps",
                (
                    (rate("kv_transfers_total", "transport"), "moved by {{transport}}"),
                    (rate("kv_transfers_skipped_total", "reason"), "not moved: {{reason}}"),
                ),
                "Requests whose KV moved, and why it did not.",
                stacked=True,
            ),
            Panel(
                "KV moved",
                "Bps",
                ((rate("kv_transfer_bytes_total", "transport"), "{{transport}}"),),
                "Bytes a second by transport.",
            ),
            Panel(
                "Cache share",
                "percentunit",
                (
                    (
                        f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}",
                        "found",
                    ),
                ),
                "Prompt tokens that some cache held.",
            ),
            Panel(
                "Found by tier",
                "short",
                ((rate("prefix_cache_tier_hits_total", "tier"), "{{tier}}"),),
                "Prompt tokens a second that each tier held.",
                stacked=True,
            ),
            Panel(
                "Attempts",
                "reqps",
                (
                    (rate("router_attempts_total"), "made"),
                    (rate("router_attempts_failed_total"), "failed"),
                    (rate("router_takeovers_total"), "taken over by a client"),
                    (rate("router_recoveries_delayed_total"), "delayed by the budget"),
                ),
                "The router's attempts on workers.",
            ),
            Panel(
                "Dropped",
                "short",
                (
                    (rate("router_late_events_total"), "late events"),
                    (rate("worker_late_total"), "late on workers"),
                    (rate("redis_blocks_lost_total", "kind"), "blocks for Redis: {{kind}}"),
                    (rate("router_protocol_errors_total"), "protocol errors"),
                    (rate("router_parked_total"), "parked"),
                ),
                "What came too late, what nobody should send, answers that nobody read.",
            ),
        ),
    ),
)


def panel_object(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "fillOpacity": 20 if panel.stacked else 5,
                    "stacking": {"mode": "normal" if panel.stacked else "none"},
                },
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "expr": expr,
                "legendFormat": legend,
                "datasource": source,
            }
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "gridPos": place,
                "collapsed": False,
                "panels": [],
            }
        )
        y += 1
        for index, panel in enumerate(row):
            x = index % PER_ROW * WIDTH
            found.append(panel_object(panel, len(found) + 1, x, y + index // PER_ROW * HEIGHT))
        y += -(-len(row) // PER_ROW) * HEIGHT
    return found


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "allValue": ".*",
        "refresh": 2,
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }
    return {
        "uid": "pdserve",
        "title": "pdserve",
        "tags": ["pdserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                source,
                variable("job", "Job", "label_values(pdserve:requests_in_flight, job)"),
                variable(
                    "model",
                    "Model",
                    'label_values(pdserve:requests_in_flight{job=~"$job"}, model_name)',
                ),
            ]
        },
        "annotations": {"list": []},
        "panels": panels(),
    }


def render() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    (HERE / "dashboard.json").write_text(render(), encoding="utf-8")
