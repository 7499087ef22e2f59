"""One request's way through a whole cluster, as its timeline and its trace tell it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from pdserve.faults import Action, Step
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.ask import request
from tests.e2e.clusters import BLOCK, CHUNK, Clusters, Running, Variant
from tests.e2e.test_faults import FAST_TIMERS
from tests.otlp_collector import Collector, Trace, collecting

PROMPT = [(7 * i + 3) % 90 + 5 for i in range(2 * CHUNK + BLOCK + 3)]
BLOCKS = -(-len(PROMPT) // BLOCK)
ANSWER = 24
CALLER = "00f067aa0ba902b7"
# Each process of a host measures its clocks once; how far two may be apart.
CLOCK_MS = 5.0
Span = dict[str, Any]

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as made:
        yield made


@pytest.fixture
def running(clusters: Clusters, collector: tuple[Collector, str]) -> Running:
    """Two workers of each role, pools that few long answers fill, and a collector."""
    settings = (*FAST_TIMERS, f"telemetry.traces.endpoint={collector[1]}")
    made = clusters.get(Variant("llama", "shm", "tight", prefill=2, decode=2, settings=settings))
    made.wait_whole()
    return made


def ask(running: Running, max_tokens: int, request_id: str, trace_id: str = "") -> int:
    """The number of tokens that came."""
    message = request(PROMPT, max_tokens, request_id=request_id, ignore_eos=True)
    message.cache_salt = request_id
    parent = (("traceparent", f"00-{trace_id or secrets.token_hex(16)}-{CALLER}-01"),)
    with grpc.insecure_channel(running.caller.address) as channel:
        stream = pb_grpc.InferenceStub(channel).Generate(message, timeout=60, metadata=parent)
        return sum(len(chunk.token_ids) for chunk in stream)


def spans(shown: dict[str, Any], name: str, who: str = "", attempt: int = 0) -> list[Span]:
    return [
        span
        for span in shown["spans"]
        if span["name"] == name
        and span["who"].startswith(who)
        and attempt in (0, span["attributes"].get("attempt"))
    ]


def only(shown: dict[str, Any], name: str, who: str = "") -> Span:
    (span,) = spans(shown, name, who)
    return span


def end(span: Span) -> float:
    return float(span["start_ms"] + span["duration_ms"])


def within(inner: Span, outer: Span) -> bool:
    begins = outer["start_ms"] - CLOCK_MS <= inner["start_ms"]
    return bool(begins and end(inner) <= end(outer) + CLOCK_MS)


def test_every_station_of_a_hand_off_is_there_and_in_order(running: Running) -> None:
    request_id = secrets.token_hex(8)
    with running.writes_held():  # else the decode worker may find a finished chunk in Redis
        assert ask(running, ANSWER, request_id) == ANSWER
    shown = running.get(f"/requests/{request_id}")
    usage = shown["usage"]
    attempt = only(shown, "attempt")
    for span in shown["spans"]:
        assert span["start_ms"] + CLOCK_MS >= 0
        assert end(span) <= shown["duration_ms"] + CLOCK_MS
        assert span["who"] == "router" or within(span, attempt), span
    prefill, decode = only(shown, "prefill", "prefill"), only(shown, "decode", "decode")
    chunks = spans(shown, "chunk", "prefill")
    assert [chunk["attributes"]["tokens"] for chunk in chunks] == [CHUNK, CHUNK, BLOCK + 3]
    assert all(within(chunk, prefill) for chunk in chunks)
    for before, after in itertools.pairwise(chunks):
        assert end(before) <= after["start_ms"]
    for role in ("prefill", "decode"):
        assert only(shown, "queue", role)["duration_ms"] >= 0
        tiers = {span["attributes"]["tier"] for span in spans(shown, "tier_read", role)}
        assert {"host", "redis"} <= tiers
    transfers = spans(shown, "transfer", "decode")
    assert sum(span["attributes"]["blocks"] for span in transfers) == BLOCKS
    assert sum(span["attributes"]["bytes"] for span in transfers) == usage["kv_bytes_transferred"]
    assert {span["attributes"]["transport"] for span in transfers} == {"shm"}
    grant = only(shown, "grant", "decode")
    assert grant["attributes"]["blocks"] == BLOCKS
    assert prefill["start_ms"] <= grant["start_ms"] + CLOCK_MS
    for transfer in transfers:
        # A block moves once it was granted and computed, and before the answer goes on here.
        assert transfer["start_ms"] >= end(grant)
        assert transfer["start_ms"] >= end(chunks[0]) - CLOCK_MS
        assert end(transfer) <= decode["start_ms"]
    assert decode["attributes"]["tokens"] == ANSWER
    assert (prefill["who"], decode["who"]) == (usage["prefill_worker"], usage["decode_worker"])


def test_one_trace_tells_the_same(running: Running, collector: tuple[Collector, str]) -> None:
    request_id, trace_id = secrets.token_hex(8), secrets.token_hex(16)
    ask(running, ANSWER, request_id, trace_id)
    (trace,) = collector[0].wait_for(trace_id)
    shown = running.get(f"/requests/{request_id}")
    assert shown["trace_id"] == trace_id
    assert trace.root.parent_span_id.hex() == CALLER
    names = sorted(span.name for span in trace.spans)
    assert names == sorted(["request", *(span["name"] for span in shown["spans"])])
    wanted = {"prefill", "queue", "tier_read", "chunk", "grant", "transfer", "decode"}
    assert wanted <= set(names)
    for name, parent in PARENTS.items():
        for span in trace.named(name):
            above = trace.parent(span)
            assert above is not None
            assert above.name in parent, (name, above.name)
    starts = {(span.name, span.start_time_unix_nano) for span in trace.spans}
    origin = trace.root.start_time_unix_nano
    for span in shown["spans"]:
        at = origin + span["start_ms"] * 1e6
        assert any(n == span["name"] and abs(t - at) < 1000 for n, t in starts), span


PARENTS = {
    "attempt": ("request",),
    "prefill": ("attempt",),
    "chunk": ("prefill",),
    "grant": ("attempt",),
    "transfer": ("attempt",),
    "decode": ("attempt",),
    "queue": ("prefill", "attempt"),
    "tier_read": ("prefill", "attempt"),
}


def test_preemptions_and_their_ends_are_spans(
    running: Running, collector: tuple[Collector, str]
) -> None:
    ids = [(secrets.token_hex(8), secrets.token_hex(16)) for _ in range(8)]
    with ThreadPoolExecutor(len(ids)) as pool:
        made = list(pool.map(lambda each: ask(running, 160, *each), ids))
    assert made == [160] * len(ids)
    preempted = 0
    for request_id, trace_id in ids:
        shown = running.get(f"/requests/{request_id}")
        gaps = spans(shown, "preempted", "decode")
        assert len(gaps) == shown["usage"]["preemptions"]
        decode = only(shown, "decode", "decode")
        assert all(gap["duration_ms"] > 0 and within(gap, decode) for gap in gaps)
        (trace,) = collector[0].wait_for(trace_id)
        assert len(trace.named("preempted")) == len(gaps)
        preempted += len(gaps)
    assert preempted > 0


def test_a_resume_after_a_kill_is_one_trace_with_both_attempts(
    running: Running, collector: tuple[Collector, str]
) -> None:
    victim = running.arm("decode", Step.DECODE_TOKENS, Action.KILL, 6)
    ids = [(secrets.token_hex(8), secrets.token_hex(16)) for _ in range(2)]
    for each in ids:  # in turn: one of them comes to the victim
        assert ask(running, ANSWER, *each) == ANSWER
    assert running.was_struck(victim)
    details = {trace: running.get(f"/requests/{request}") for request, trace in ids}
    ((trace_id, shown),) = ((t, d) for t, d in details.items() if d["attempts"] > 1)
    first, *_, last = spans(shown, "attempt")
    assert first["attributes"]["decode_worker"] == victim.id
    assert first["attributes"]["reason"] == "worker_lost"
    assert last["attributes"]["reason"] == "finished"
    told = [span["attributes"]["tokens"] for span in (first, last)]
    assert sum(told) == ANSWER
    assert min(told) > 0
    # The dead worker had told of the hand-off with its first token; what came after is lost.
    assert spans(shown, "transfer", victim.id, attempt=1)
    assert not spans(shown, "decode", attempt=1)
    recover = spans(shown, "recover")[0]
    assert end(first) <= recover["start_ms"] + 1 < end(recover) + 2 <= last["start_ms"] + 3
    (trace,) = collector[0].wait_for(trace_id)
    check_family(trace, len(spans(shown, "attempt")))
    running.wait_whole()


def check_family(trace: Trace, attempts: int) -> None:
    assert len(trace.named("attempt")) == attempts > 1
    owners = {trace.parent(span).span_id for span in trace.named("transfer")}  # type: ignore[union-attr]
    assert len(owners) == attempts
