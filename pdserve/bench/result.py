"""The result as it is kept: figures, what they were made of, and what is needed to repeat them."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.bench.load import Plan
from pdserve.bench.provenance import Made
from pdserve.bench.samples import Outcome, Run, Sample
from pdserve.bench.server import Served
from pdserve.bench.stats import CONFIDENCE, Estimate
from pdserve.bench.summary import Slo, Summary
from pdserve.bench.workload import Request
from pdserve.errors import ConfigError

SCHEMA = 1


def default_path(made: Made) -> Path:
    return Path(f"pdserve-bench-{made.at:%Y%m%dT%H%M%SZ}.json")


def describe(requests: Sequence[Request]) -> dict[str, Any]:
    """A workload in a few figures; lengths in tokens, after scaling."""
    prompts = [request.prompt_tokens for request in requests]
    last = max(request.due_s for request in requests)
    blocks = [block for request in requests for block in request.blocks]
    return {
        "requests": len(requests),
        "duration_s": last,
        "requests_per_s": (len(requests) - 1) / last if last else None,
        "prompt_tokens_mean": statistics.fmean(prompts),
        "prompt_tokens_max": max(prompts),
        "output_tokens_mean": statistics.fmean(request.output_tokens for request in requests),
        # Of all blocks asked for, those that an earlier request of the run asked for too.
        "shared_blocks": 1 - len(set(blocks)) / len(blocks) if blocks else 0.0,
    }


def document(
    made: Made,
    server: Mapping[str, Any],
    served: Served,
    options: Mapping[str, Any],
    plan: Plan,
    slo: Slo,
    runs: Sequence[Run],
    summary: Summary,
) -> dict[str, Any]:
    """Everything in one JSON object. Times in ms where a name ends so, else in seconds."""
    return {
        "schema": SCHEMA,
        "made": f"{made.at:%Y-%m-%dT%H:%M:%SZ}",
        "machine": dataclasses.asdict(made.machine),
        "versions": made.versions,
        "commit": made.commit,
        "server": {**server, **dataclasses.asdict(served)},
        "seed": plan.seed,
        "options": dict(options),
        "workload": describe(plan.requests),
        "slo": dataclasses.asdict(slo),
        "confidence": CONFIDENCE,
        "outcomes": summary.outcomes,
        "details": summary.details,
        "short_answers": summary.short_answers,
        "tokens_counted_by": summary.counted_by,
        "latencies_ms": {
            name: {f"p{percent}": _estimate(found) for percent, found in by_percent.items()}
            for name, by_percent in summary.latencies_ms.items()
        },
        "rates": {name: _estimate(found) for name, found in summary.rates.items()},
        "wall_s": list(summary.wall_s),
        "samples": [[_sample(sample) for sample in run.samples] for run in runs],
    }


def _estimate(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else dataclasses.asdict(found)


def _sample(sample: Sample) -> dict[str, Any]:
    """One request: when each of its chunks came is told by the summary of the gaps."""
    kept: dict[str, Any] = {
        "outcome": sample.outcome.value,
        "due_s": sample.due_s,
        "sent_s": sample.sent_s,
        "end_s": sample.end_s,
        "prompt_tokens": sample.prompt_tokens,
        "output_tokens": sample.output_tokens,
    }
    if sample.detail:
        kept["detail"] = sample.detail
    if sample.outcome is Outcome.ANSWERED:
        kept |= {
            "ttft_s": sample.ttft_s,
            "tpot_s": sample.tpot_s,
            "gap_max_s": max(sample.gaps_s, default=None),
            "chunks": len(sample.token_s),
        }
    return kept


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all. ConfigError when it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"the result {path} cannot be written: {error}") from error
