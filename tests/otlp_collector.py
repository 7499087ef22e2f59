"""A collector of traces: a real gRPC server of OTLP's TraceService that remembers what it got."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ROOT = "request"


@dataclass(frozen=True)
class Trace:
    """The spans of one request."""

    spans: tuple[Span, ...]

    @property
    def root(self) -> Span:
        (one,) = self.named(ROOT)
        return one

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def parent(self, span: Span) -> Span | None:
        return next((s for s in self.spans if s.span_id == span.parent_span_id), None)

    def attributes(self, span: Span) -> dict[str, Any]:
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


class Collector(pb_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.services: set[str] = set()
        self.calls = 0
        self.open = threading.Event()  # not set: calls hang
        self.open.set()

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        self.open.wait(30)
        with self._lock:
            self.calls += 1
            for resource in request.resource_spans:
                for attribute in resource.resource.attributes:
                    if attribute.key == "service.name":
                        self.services.add(attribute.value.string_value)
                for scope in resource.scope_spans:
                    self._spans.extend(scope.spans)
        return pb.ExportTraceServiceResponse()

    def traces(self, trace_id: str) -> list[Trace]:
        """The requests of a trace: each root with all below it."""
        with self._lock:
            spans = [span for span in self._spans if span.trace_id.hex() == trace_id]
        found = []
        for root in (span for span in spans if span.name == ROOT):
            family, grown = [root], True
            while grown:
                known = {span.span_id for span in family}
                more = [s for s in spans if s.parent_span_id in known and s.span_id not in known]
                family += more
                grown = bool(more)
            found.append(Trace(tuple(family)))
        assert sum(len(trace.spans) for trace in found) == len(spans), "a span without its root"
        return found

    def wait_for(self, trace_id: str, count: int = 1, seconds: float = 10.0) -> list[Trace]:
        end = time.monotonic() + seconds
        while len(found := self.traces(trace_id)) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} requests in {trace_id}"
            time.sleep(0.02)
        return found


@contextmanager
def collecting(port: int = 0) -> Iterator[tuple[Collector, str]]:
    """A collector, and the endpoint that reaches it."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        collector.open.set()
        server.stop(0).wait()
