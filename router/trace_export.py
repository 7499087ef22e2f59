"""Ended requests on their way to an OTLP collector, on a thread of their own.

    offer(timeline)   never waits: a full queue drops it, and counts that
    thread            timelines -> spans, with the times that they had -> one export per batch
    close             what waits is sent, within CLOSE_S

Nothing imports this module, and OpenTelemetry with it, unless traces are exported (router/tracing).
Headers, certificates and further attributes come from OpenTelemetry's own environment variables
(OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE, OTEL_RESOURCE_ATTRIBUTES).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from pdserve.config import TracesConfig
from pdserve.telemetry.trace_context import TraceContext
from router.timelines import Timeline
from router.trace_shape import plan_spans

log = logging.getLogger(__name__)

BATCH_REQUESTS = 64
CLOSE_S = 3.0
_IDS = 2**64


class _TraceIds(IdGenerator):
    """Traces that begin here have the id that the request was given when it came."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.next_trace = 0

    def generate_trace_id(self) -> int:
        return self.next_trace

    def generate_span_id(self) -> int:
        return self._random.generate_span_id()


class _Batch(SpanProcessor):
    """Spans that ended and were not exported."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class TraceExporter:
    """``offer`` and ``close`` on the event loop's side; the rest belongs to the thread."""

    def __init__(self, config: TracesConfig) -> None:
        self._ratio = config.ratio
        self._queue: queue.Queue[Timeline | None] = queue.Queue(config.queue)
        self._exporter = OTLPSpanExporter(
            endpoint=config.endpoint,
            insecure=config.endpoint.startswith("http://"),
            timeout=config.timeout_s,
        )
        self._ids = _TraceIds()
        self._batch = _Batch()
        provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": "pdserve"}),
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        provider.add_span_processor(self._batch)
        self._tracer = provider.get_tracer("pdserve")
        self._dropped = 0  # written by the event loop alone
        self._failed = 0  # this and the next by the thread alone
        self._exported = 0
        self._thread = threading.Thread(target=self._run, name="trace-export", daemon=True)
        self._thread.start()

    def offer(self, timeline: Timeline) -> None:
        """Queues it, if its caller or the ratio wants it traced. Never waits."""
        if not self._sampled(timeline.trace):
            return
        try:
            self._queue.put_nowait(timeline)
        except queue.Full:
            self._dropped += 1

    def counts(self) -> Mapping[str, int]:
        """Requests by what became of their traces; for /metrics."""
        return {
            "traces_exported": self._exported,
            "traces_dropped": self._dropped,
            "traces_failed": self._failed,
        }

    def close(self) -> None:
        """Waits CLOSE_S at most for what is queued, then gives it up."""
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            log.warning("the collector takes no traces: %d are lost", self._queue.qsize())
        else:
            self._thread.join(CLOSE_S)
        self._exporter.shutdown()  # ends an export that is being repeated

    def _sampled(self, context: TraceContext) -> bool:
        if context.sampled is not None:
            return context.sampled
        return int(context.trace_id, 16) % _IDS < self._ratio * _IDS

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        more = True
        while more:
            batch = [self._queue.get()]
            while len(batch) < BATCH_REQUESTS and not self._queue.empty():
                batch.append(self._queue.get())
            timelines = [each for each in batch if each is not None]
            more = len(timelines) == len(batch)
            if timelines:
                self._export(timelines)

    def _export(self, timelines: Sequence[Timeline]) -> None:
        try:
            for timeline in timelines:
                self._record(timeline)
            result = self._exporter.export(self._batch.spans)
        except Exception:
            log.exception("traces of %d requests could not be exported", len(timelines))
            result = SpanExportResult.FAILURE
        self._batch.spans = []
        if result is SpanExportResult.SUCCESS:
            self._exported += len(timelines)
        else:
            self._failed += len(timelines)

    def _record(self, timeline: Timeline) -> None:
        """The spans of one request; they end up in the batch."""
        self._ids.next_trace = int(timeline.trace.trace_id, 16)
        outside = _caller(timeline.trace)
        spans: list[trace.Span] = []
        for planned in plan_spans(timeline):
            parent = outside if planned.parent is None else spans[planned.parent]
            kind = trace.SpanKind.SERVER if planned.parent is None else trace.SpanKind.INTERNAL
            span = self._tracer.start_span(
                planned.name,
                context=trace.set_span_in_context(parent),
                kind=kind,
                attributes=planned.attributes,
                start_time=planned.start_ns,
            )
            if planned.error:
                span.set_status(trace.StatusCode.ERROR, planned.error)
            span.end(max(planned.start_ns, planned.end_ns))
            spans.append(span)


def _caller(context: TraceContext) -> trace.Span:
    """The span that the request came from; an invalid one where the trace begins here."""
    if not context.parent_id:
        return trace.INVALID_SPAN
    return trace.NonRecordingSpan(
        trace.SpanContext(
            trace_id=int(context.trace_id, 16),
            span_id=int(context.parent_id, 16),
            is_remote=True,
            trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
            trace_state=trace.TraceState(context.state),
        )
    )
