"""Traces on their way out: a real OTLP collector, a caller's context, and what happens without."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from fronts_world import ScriptedDispatcher, World, default_script, running_world
from http_talk import call, post
from scripted_worker import job

from pdserve.cli import up
from pdserve.cli.checks.software import traces
from pdserve.cli.main import main
from pdserve.client import Client
from pdserve.config import Config, TelemetryConfig, TracesConfig
from pdserve.config_load import load_config
from pdserve.errors import ConfigError, WorkerLost
from pdserve.rpc.identity import Caller, mint
from pdserve.telemetry.timeline import Phase, PhaseName
from pdserve.types import FinishReason, Usage
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from router import fronts
from router.boot import RouterBoot
from router.timelines import Timeline
from router.trace_export import TraceExporter
from router.trace_shape import plan_spans
from router.tracing import open_exporter
from tests.otlp_collector import Collector, collecting
from tests.source_tree import ROOT

SPAN = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collected() -> Iterator[tuple[Collector, str]]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def traced(model_folder, collected) -> Iterator[World]:
    telemetry = TelemetryConfig(traces=TracesConfig(endpoint=collected[1]))
    with running_world(model_folder, telemetry=telemetry) as world:
        world.says("the fox jumps")
        yield world


def new_id() -> str:
    return secrets.token_hex(16)


def complete(world: World, trace_id: str, flags: str = "01", **body) -> None:
    headers = {"traceparent": f"00-{trace_id}-{SPAN}-{flags}", "tracestate": "congo=t61"}
    reply = post(world.http, "/v1/completions", {"prompt": "the dog", **body}, headers)
    assert reply.status == 200, reply.body


def metric(world: World, name: str) -> float:
    lines = call(world.http, "GET", "/metrics").body.decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"pdserve:router_{name}_total{{"))
    return float(line.rsplit(" ", 1)[1])


def test_a_request_over_http_is_a_child_of_its_callers_span(traced, collected) -> None:
    trace_id, before = new_id(), time.time_ns()
    complete(traced, trace_id, request_id="traced-1")
    (trace,) = collected[0].wait_for(trace_id)
    root = trace.root
    assert (root.parent_span_id.hex(), root.trace_state) == (SPAN, "congo=t61")
    assert before <= root.start_time_unix_nano <= root.end_time_unix_nano <= time.time_ns()
    said = trace.attributes(root)
    assert said["pdserve.request_id"] == "traced-1"
    assert said["gen_ai.response.finish_reasons"] == "stop"
    assert said["gen_ai.usage.output_tokens"] > 0
    assert collected[0].services == {"pdserve"}
    assert "fox" not in str(trace)
    shown = call(traced.http, "GET", "/requests/traced-1").json
    assert shown["trace_id"] == trace_id


def test_the_choices_of_one_request_share_its_trace(traced, collected) -> None:
    trace_id = new_id()
    complete(traced, trace_id, n=3, temperature=1.0)
    assert len(collected[0].wait_for(trace_id, 3)) == 3


def test_a_request_over_grpc_takes_its_context_from_metadata(traced, collected) -> None:
    trace_id = new_id()
    request = pb.GenerateRequest(text="the dog", sampling=pb.SamplingParams(max_tokens=4))
    metadata = (("traceparent", f"00-{trace_id}-{SPAN}-01"),)
    with grpc.insecure_channel(traced.grpc) as channel:
        list(pb_grpc.InferenceStub(channel).Generate(request, metadata=metadata, timeout=10))
    (trace,) = collected[0].wait_for(trace_id)
    assert trace.root.parent_span_id.hex() == SPAN


def test_the_client_library_keeps_its_trace_through_a_resume(traced, collected) -> None:
    trace_id = new_id()
    traced.dispatcher.fail_after = {2: WorkerLost("gone")}
    with Client(traced.grpc) as client:
        answer = client.generate(
            "the dog", max_tokens=8, traceparent=f"00-{trace_id}-{SPAN}-01", tracestate="a=b"
        )
    assert answer.token_ids
    first, second = collected[0].wait_for(trace_id, 2)
    states = {trace.attributes(trace.root)["pdserve.state"] for trace in (first, second)}
    assert states == {"failed", "finished"}
    failed = next(t for t in (first, second) if t.attributes(t.root)["pdserve.state"] == "failed")
    assert failed.root.status.message == "worker_lost"
    assert {trace.root.trace_state for trace in (first, second)} == {"a=b"}


def test_who_asks_not_to_be_traced_is_not(traced, collected) -> None:
    silent, heard = new_id(), new_id()
    complete(traced, silent, flags="00")
    complete(traced, heard)
    collected[0].wait_for(heard)
    assert collected[0].traces(silent) == []


def test_the_ratio_is_for_traces_that_begin_here(model_folder, collected) -> None:
    telemetry = TelemetryConfig(traces=TracesConfig(endpoint=collected[1], ratio=0.0))
    with running_world(model_folder, telemetry=telemetry) as world:
        world.says("the fox")
        reply = post(world.http, "/v1/completions", {"prompt": "x", "request_id": "own"})
        assert reply.status == 200
        own = call(world.http, "GET", "/requests/own").json["trace_id"]
        trace_id = new_id()
        complete(world, trace_id)
        collected[0].wait_for(trace_id)
        assert collected[0].traces(own) == []


def test_a_collector_that_hangs_costs_traces_and_no_request(model_folder) -> None:
    with collecting() as (collector, endpoint):
        collector.open.clear()
        traces = TracesConfig(endpoint=endpoint, queue=2, timeout_s=1.0)
        with running_world(model_folder, telemetry=TelemetryConfig(traces=traces)) as world:
            world.says("the fox")
            for _ in range(12):
                began = time.monotonic()
                complete(world, new_id())
                assert time.monotonic() - began < 1.0
            assert metric(world, "traces_dropped") >= 6
            collector.open.set()
            trace_id, end = new_id(), time.monotonic() + 20
            while not collector.traces(trace_id):
                assert time.monotonic() < end
                complete(world, trace_id)
                time.sleep(0.2)
            assert metric(world, "traces_exported") > 0


def test_what_waits_is_sent_before_the_end_and_an_absent_collector_delays_it_little() -> None:
    with collecting() as (collector, endpoint):
        exporter = TraceExporter(TracesConfig(endpoint=endpoint))
        ended = [ended_timeline() for _ in range(100)]
        for timeline in ended:
            exporter.offer(timeline)
        exporter.close()
        assert all(len(collector.traces(each.trace.trace_id)) == 1 for each in ended)
        assert collector.calls < 100
    exporter = TraceExporter(TracesConfig(endpoint=endpoint, timeout_s=60.0))
    exporter.offer(ended_timeline())
    began = time.monotonic()
    exporter.close()
    assert time.monotonic() - began < 8.0


def ended_timeline() -> Timeline:
    timeline = Timeline(job())
    timeline.enter(PhaseName.PLACE)
    timeline.enter(PhaseName.ATTEMPT, prefill_worker="p0", decode_worker="d0")
    now = time.time_ns()
    timeline.add(
        [
            Phase(PhaseName.PREFILL, now, 100, "p0", tokens=9),
            Phase(PhaseName.QUEUE, now, 10, "p0"),
            Phase(PhaseName.CHUNK, now + 10, 90, "p0", tokens=9),
            Phase(PhaseName.QUEUE, now, 20, "d0"),
            Phase(PhaseName.TRANSFER, now + 90, 20, "d0", bytes=5),
            Phase(PhaseName.CHUNK, now + 200, 20, "p0", tokens=9),
        ]
    )
    timeline.finish(FinishReason.LENGTH, Usage(9, 4))
    return timeline


def test_spans_hang_where_they_belong() -> None:
    spans = plan_spans(ended_timeline())

    def parents(name: str) -> list[str]:
        found = [span.parent for span in spans if span.name == name]
        return ["" if place is None else spans[place].name for place in found]

    assert parents("request") == [""]
    assert parents("prepare") == parents("place") == parents("attempt") == ["request"]
    assert parents("prefill") == parents("transfer") == ["attempt"]
    assert sorted(parents("queue")) == ["attempt", "prefill"]
    assert sorted(parents("chunk")) == ["attempt", "prefill"]
    assert all(span.parent is None or span.parent < at for at, span in enumerate(spans))


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://x:1", "http://", "http://x:1/v1"])
def test_an_endpoint_that_cannot_be_is_refused_with_its_name(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.traces\.endpoint"):
        load_config(None, [f"telemetry.traces.endpoint={endpoint}"], {})


def test_without_opentelemetry_the_error_names_the_key_and_the_extra(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "router.trace_export")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"telemetry\.traces\.endpoint .*\.\[otel\]"):
        open_exporter(TracesConfig(endpoint="http://127.0.0.1:4317"))


@pytest.mark.parametrize("lacking", ["opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc"])
def test_only_a_start_is_refused_without_opentelemetry(monkeypatch, capsys, lacking: str) -> None:
    """Whoever only asks a cluster with that configuration needs none of it."""
    asked = ["telemetry.traces.endpoint=http://127.0.0.1:4317"]
    assert traces(load_config(None, asked, {})).good
    monkeypatch.setitem(sys.modules, lacking, None)
    assert not traces(load_config(None, asked, {})).good
    assert traces(load_config(None, [], {})).good
    monkeypatch.setattr(up, "open_cluster", None)  # is not come to
    assert main(["up", "--set", *asked]) == 2
    told = capsys.readouterr().err
    assert re.search(r"telemetry\.traces\.endpoint .*\.\[otel\]", told), told


def test_a_start_that_fails_leaves_no_exporter(model_folder, monkeypatch) -> None:
    """Whatever it is that fails once the exporter's thread runs."""
    config = Config(telemetry=TelemetryConfig(traces=TracesConfig(endpoint="http://127.0.0.1:9")))
    boot = RouterBoot(config, str(model_folder), "m", mint("t", Caller.ROUTER), b"k" * 32, "")
    dispatcher = ScriptedDispatcher(default_script, 400, 2)
    before = set(threading.enumerate())

    def fails(*_: object) -> None:
        raise ConfigError("made to fail")

    for part in ("TokenService", "Service", "start_grpc"):
        with monkeypatch.context() as patch:
            patch.setattr(fronts, part, fails)
            with pytest.raises(ConfigError, match="made to fail"):
                asyncio.run(fronts.start_fronts(boot, dispatcher))
        assert {t for t in threading.enumerate() if t.is_alive()} <= before, part


def test_off_imports_nothing_of_opentelemetry(model_folder) -> None:
    """A whole pair of fronts that answered a request with a traceparent, in its own process."""
    code = f"""
import sys
from pathlib import Path
from fronts_world import running_world
from http_talk import post
with running_world(Path({str(model_folder)!r})) as world:
    world.says("the fox")
    headers = {{"traceparent": "00-{new_id()}-{SPAN}-01"}}
    reply = post(world.http, "/v1/completions", {{"prompt": "x"}}, headers)
    assert reply.status == 200, reply.body
import router.server
print([name for name in sys.modules if name.partition(".")[0] == "opentelemetry"])
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "router")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
