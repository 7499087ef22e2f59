"""The router's metrics: vLLM's names after ``pdserve:``, with its labels and buckets.

timer = metrics.request_started();  timer.tokens(n)...;  timer.finished(reason, usage)
                                                      |  timer.failed(code)
metrics.rejected(code, seconds)             a request that was never accepted
metrics.watch_workers(read), .watch_shortfalls(read), .watch_counters(read)   read at each scrape
metrics.render()                            -> body and content type
metrics.totals()                            -> the same as plain numbers, for the live page

How a request was made (transport, bytes, tiers, resumes, why nothing moved) comes from its Usage
when it ends, so no other part has to count it as well. Used on one event loop; calls are a few
microseconds each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

from pdserve.telemetry.collectors import (
    CounterCollector,
    ShortfallCollector,
    WorkerCollector,
    WorkerLike,
)
from pdserve.telemetry.totals import SERIES, Totals, read_totals
from pdserve.types import FinishReason, Tier, Usage

PREFIX = "pdserve:"
# vLLM labels every series with the model and with an engine; what the router measures over all
# workers has engine "0", what a worker reports has the worker's id there.
ROUTER_ENGINE = "0"
LABELS = ("model_name", "engine")

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

REJECTION_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


def length_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to ``longest`` tokens."""
    found: list[int] = []
    step = 1
    while step <= longest:
        found.extend(step * digit for digit in (1, 2, 5) if step * digit <= longest)
        step *= 10
    return tuple(found)


class RequestTimer:
    """One accepted request: measures, and reports to its RouterMetrics. Ends exactly once."""

    __slots__ = ("_first", "_last", "_metrics", "_open", "_started", "_tokens")

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._started = self._first = self._last = time.monotonic()
        self._tokens = 0
        self._open = True

    def tokens(self, count: int) -> None:
        """``count`` more tokens reached the client's stream together."""
        if count <= 0:
            return
        now = time.monotonic()
        if self._tokens == 0:
            self._first = now
            self._metrics.first_token(now - self._started, count)
        else:
            self._metrics.tokens(count, now - self._last)
        self._tokens += count
        self._last = now

    def finished(self, reason: FinishReason, usage: Usage) -> None:
        if self._close():
            self._metrics.finished(reason, usage, time.monotonic() - self._started)
            if self._tokens > 1:
                self._metrics.token_pace((self._last - self._first) / (self._tokens - 1))

    def failed(self, code: str) -> None:
        """``code``: of a PdserveError; ``cancelled`` when the client went away."""
        if self._close():
            self._metrics.failed(code, time.monotonic() - self._started)

    def _close(self) -> bool:
        was_open, self._open = self._open, False
        return was_open


class RouterMetrics:
    """Every series that the router serves, in a registry of its own or the one given."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, *, max_model_len: int = 131_072
    ) -> None:
        # Else each counter would have a second series with the time of its creation.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry
        self._model = model_name
        self._make_requests()
        self._make_tokens(length_buckets(max_model_len))
        self._make_handoffs()
        ProcessCollector(registry=registry)

    # ---- what happens to requests ---------------------------------------------------------------

    def request_started(self) -> RequestTimer:
        self._in_flight.inc()
        return RequestTimer(self)

    def rejected(self, code: str, seconds: float) -> None:
        """A request that was refused ``seconds`` after it was there; it was never started."""
        self._rejection.observe(seconds)
        self._rejected.labels(self._model, ROUTER_ENGINE, code).inc()

    def first_token(self, seconds: float, count: int = 1) -> None:
        self._first_token.observe(seconds)
        self._generation_tokens.inc(count)

    def tokens(self, count: int, seconds: float) -> None:
        """``count`` tokens, ``seconds`` after the ones before them."""
        self._generation_tokens.inc(count)
        each = seconds / count
        for _ in range(count):
            self._inter_token.observe(each)

    def token_pace(self, seconds: float) -> None:
        """A finished request's mean time per token after its first."""
        self._per_token.observe(seconds)

    def finished(self, reason: FinishReason, usage: Usage, seconds: float) -> None:
        self._in_flight.dec()
        self._success[reason.value].inc()
        self._e2e.observe(seconds)
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._request_prompt_tokens.observe(usage.prompt_tokens)
        self._request_generation_tokens.observe(usage.completion_tokens)
        self._cache_queries.inc(usage.prompt_tokens)
        self._cache_hits.inc(usage.cached_tokens.total)
        for tier, hits in self._tier_hits.items():
            hits.inc(getattr(usage.cached_tokens, tier.value))
        self._preemptions.inc(usage.preemptions)
        self._resumes.inc(usage.resumes)
        if usage.kv_transport:
            self._transfers.labels(self._model, ROUTER_ENGINE, usage.kv_transport).inc()
            self._transfer_bytes.labels(self._model, ROUTER_ENGINE, usage.kv_transport).inc(
                usage.kv_bytes_transferred
            )
        else:
            reason_text = usage.kv_skipped_reason or "unknown"
            self._skipped.labels(self._model, ROUTER_ENGINE, reason_text).inc()

    def failed(self, code: str, seconds: float) -> None:
        self._in_flight.dec()
        self._success["abort" if code == "cancelled" else "error"].inc()
        self._e2e.observe(seconds)
        self._failed.labels(self._model, ROUTER_ENGINE, code).inc()

    # ---- what is read at each scrape ------------------------------------------------------------

    def watch_workers(self, read: Callable[[], Sequence[WorkerLike]]) -> None:
        """``read``: the registry's snapshot, e.g. Dispatcher.workers."""
        self._registry.register(WorkerCollector(read, self._model, PREFIX))

    def watch_shortfalls(self, read: Callable[[], Mapping[str, bool]]) -> None:
        """``read``: every cause by name, and whether the cluster falls short by it now."""
        self._registry.register(ShortfallCollector(read, self._model, PREFIX))

    def watch_counters(self, read: Callable[[], Mapping[str, int]]) -> None:
        """``read``: rising counts by name; each becomes ``pdserve:router_<name>_total``."""
        self._registry.register(CounterCollector(read, self._model, PREFIX))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type of /metrics. ``accept``: the request's header."""
        encode, content_type = choose_encoder(accept)
        if content_type.startswith("application/openmetrics-text"):
            # Its encoder would write the colon of our names as an underscore, which no name needs.
            body: bytes = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
                self._registry, escaping=openmetrics.ALLOWUTF8
            )
            return body, openmetrics.CONTENT_TYPE_LATEST
        return encode(self._registry), content_type

    def totals(self) -> Totals:
        """Costs about as much as a scrape of these few series."""
        return read_totals(self._registry.restricted_registry(SERIES))

    # ---- the series -----------------------------------------------------------------------------

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(PREFIX + name, text, (*LABELS, *more), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(PREFIX + name, text, LABELS, buckets=buckets, registry=self._registry)
        return made.labels(self._model, ROUTER_ENGINE)

    def _only(self, counter: Counter, *more: str) -> Counter:
        return counter.labels(self._model, ROUTER_ENGINE, *more)

    def _make_requests(self) -> None:
        in_flight = Gauge(
            PREFIX + "requests_in_flight",
            "Requests that were accepted and have not ended.",
            LABELS,
            registry=self._registry,
        )
        self._in_flight = in_flight.labels(self._model, ROUTER_ENGINE)
        success = self._counter("request_success", "Requests that ended.", "finished_reason")
        self._success = {
            reason: self._only(success, reason) for reason in ("stop", "length", "abort", "error")
        }
        self._rejected = self._counter("requests_rejected", "Requests refused at once.", "code")
        self._rejection = self._histogram(
            "request_rejection_seconds", "From a request to its refusal.", REJECTION_BUCKETS
        )
        self._failed = self._counter("requests_failed", "Accepted requests that failed.", "code")
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From acceptance to the end.", REQUEST_BUCKETS
        )

    def _make_tokens(self, lengths: Sequence[float]) -> None:
        self._prompt_tokens = self._only(self._counter("prompt_tokens", "Prompt tokens."))
        self._generation_tokens = self._only(
            self._counter("generation_tokens", "Tokens that were generated.")
        )
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", lengths
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", lengths
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From acceptance to the first token.",
            FIRST_TOKEN_BUCKETS,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between a token and the next.", TOKEN_BUCKETS
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time per token after its first.",
            TOKEN_BUCKETS,
        )

    def _make_handoffs(self) -> None:
        self._cache_queries = self._only(
            self._counter("prefix_cache_queries", "Prompt tokens looked up in the caches.")
        )
        self._cache_hits = self._only(
            self._counter("prefix_cache_hits", "Prompt tokens found in the caches.")
        )
        by_tier = self._counter("prefix_cache_tier_hits", "Prompt tokens found, by tier.", "tier")
        self._tier_hits = {tier: self._only(by_tier, tier.value) for tier in Tier}
        self._preemptions = self._only(self._counter("num_preemptions", "Preempted sequences."))
        self._resumes = self._only(
            self._counter("request_resumes", "Continuations on other workers.")
        )
        self._transfers = self._counter("kv_transfers", "Requests whose KV moved.", "transport")
        self._transfer_bytes = self._counter("kv_transfer_bytes", "KV bytes moved.", "transport")
        self._skipped = self._counter(
            "kv_transfers_skipped", "Requests whose KV did not move.", "reason"
        )
