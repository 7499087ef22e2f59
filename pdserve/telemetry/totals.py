"""The router's own series as plain numbers, for whoever shows rates and latencies of recent times.

    before = read_totals(registry) ... after = read_totals(registry)
    after.generated - before.generated;  after.first_token.quantile_since(before.first_token, 0.5)

Reading costs the same however many requests there were: the series are sums already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.metrics_core import Metric

from pdserve.types import Tier

_PREFIX = "pdserve:"
_COUNTS = (
    "requests_in_flight",
    "request_success_total",
    "requests_rejected_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_tier_hits_total",
    "kv_transfer_bytes_total",
)
_HISTOGRAMS = (
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
)
# What to ask a registry for.
SERIES = tuple(_PREFIX + name for name in (*_COUNTS, *_HISTOGRAMS))
_FAILED = ("abort", "error")

_Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


class Source(Protocol):
    def collect(self) -> Iterable[Metric]: ...


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram: ``counts[i]`` observations of at most ``bounds[i]`` seconds."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    def quantile_since(self, earlier: Buckets, share: float) -> float | None:
        """Seconds that ``share`` of the observations since ``earlier`` stayed within.

        Straight lines within buckets; the last finite bound for what lies beyond it. None when
        nothing was observed.
        """
        counts = [now - then for now, then in zip(self.counts, earlier.counts, strict=True)]
        total = counts[-1] if counts else 0
        if total <= 0:
            return None
        rank = share * total
        low, below = 0.0, 0.0
        for bound, count in zip(self.bounds, counts, strict=True):
            if bound == float("inf"):
                break
            if count >= rank:
                return low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return low


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the router started, except ``in_flight``."""

    in_flight: int
    finished: int
    failed: int
    rejected: int
    prompt: int  # tokens of requests that ended well; so are the cached ones
    cached: Mapping[Tier, int]
    generated: int
    kv_bytes: int
    first_token: Buckets
    inter_token: Buckets
    end_to_end: Buckets


def read_totals(source: Source) -> Totals:
    """``source``: a registry that was restricted to SERIES, so that nothing else is computed."""
    found: defaultdict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
    for family in source.collect():
        for sample in family.samples:
            found[sample.name.removeprefix(_PREFIX)].append((sample.labels, sample.value))
    ended = found["request_success_total"]
    tiers = {labels["tier"]: value for labels, value in found["prefix_cache_tier_hits_total"]}
    return Totals(
        in_flight=_sum(found, "requests_in_flight"),
        finished=int(sum(n for labels, n in ended if labels["finished_reason"] not in _FAILED)),
        failed=int(sum(n for labels, n in ended if labels["finished_reason"] in _FAILED)),
        rejected=_sum(found, "requests_rejected_total"),
        prompt=_sum(found, "prompt_tokens_total"),
        cached={tier: int(tiers.get(tier.value, 0)) for tier in Tier},
        generated=_sum(found, "generation_tokens_total"),
        kv_bytes=_sum(found, "kv_transfer_bytes_total"),
        first_token=_buckets(found, "time_to_first_token_seconds_bucket"),
        inter_token=_buckets(found, "inter_token_latency_seconds_bucket"),
        end_to_end=_buckets(found, "e2e_request_latency_seconds_bucket"),
    )


def _sum(found: _Samples, name: str) -> int:
    return int(sum(value for _, value in found[name]))


def _buckets(found: _Samples, name: str) -> Buckets:
    samples = sorted((float(labels["le"]), value) for labels, value in found[name])
    return Buckets(tuple(bound for bound, _ in samples), tuple(count for _, count in samples))
