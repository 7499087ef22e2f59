"""Percentiles, intervals, goodput and event streams, against values worked out by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from pdserve.bench.samples import Outcome, Run, Sample
from pdserve.bench.sse import EVENT_BYTES_MAX, SseReader
from pdserve.bench.stats import estimate, percentile
from pdserve.bench.summary import Slo, summarize
from pdserve.bench.table import cell
from pdserve.errors import WorkerLost


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([3.0], 99) == 3
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile(range(101), 90) == 90
    assert percentile([0, 10], 99) == pytest.approx(9.9)


def test_one_repeat_has_no_interval_and_equal_ones_have_none_to_speak_of() -> None:
    assert estimate([], 0) is None
    one = estimate([5.0], 0)
    assert one is not None
    assert (one.value, one.low, one.high) == (5, None, None)
    same = estimate([5.0, 5.0, 5.0], 0)
    assert same is not None
    assert (same.low, same.high) == (5, 5)
    assert (cell(None), cell(one), cell(same)) == ("-", "5", "5 (5 to 5)")


def test_the_interval_of_two_repeats_is_known() -> None:
    """The mean of two draws is low, middle or high with 1/4, 1/2, 1/4: both ends are reached."""
    found = estimate([1.0, 3.0], 0)
    assert found is not None
    assert (found.value, found.low, found.high) == (2, 1, 3)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(200):
        found = estimate(rng.normal(10, 1, 20).tolist(), trial)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 10 <= found.high
    assert 0.87 <= covered / 200 <= 0.99


def sample(
    *token_s: float, outcome: Outcome = Outcome.ANSWERED, detail: str = "", asked: int = 3
) -> Sample:
    return Sample(
        outcome=outcome,
        detail=detail,
        due_s=0,
        sent_s=0,
        prompt_tokens=10,
        output_tokens=len(token_s),
        asked_tokens=asked,
        token_s=token_s,
        end_s=max(token_s, default=0.0),
    )


def test_a_summary_by_hand() -> None:
    first = Run((sample(0.1, 0.2, 0.4), sample(outcome=Outcome.REFUSED, detail="HTTP 429")), 2.0)
    second = Run((sample(0.3, 0.5, 0.7), sample(0.2, asked=1)), 4.0)
    found = summarize([first, second], Slo(ttft_ms=250, itl_ms=160), 0)
    assert found.outcomes["answered"] == 3
    assert found.outcomes["refused"] == 1
    assert found.details == {"HTTP 429": 1}
    assert found.short_answers == 0

    def value(name: str) -> float:
        rate = found.rates[name]
        assert rate is not None
        return rate.value

    ttft, itl, tpot = (found.latencies_ms[name][50] for name in ("ttft", "itl", "tpot"))
    assert ttft is not None
    assert itl is not None
    assert tpot is not None
    assert ttft.repeats == pytest.approx((100, 250))
    assert itl.repeats == pytest.approx((150, 200))
    assert tpot.repeats == pytest.approx((150, 200))
    assert value("answered_requests_per_s") == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert value("output_tokens_per_s") == pytest.approx((3 / 2 + 4 / 4) / 2)
    # In the second run one answer is late at its first token; the other has no second one.
    assert value("slo_attainment") == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert value("goodput_requests_per_s") == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_nothing_answered_has_no_latency_and_no_rate_but_zero() -> None:
    run = Run((sample(outcome=Outcome.FAILED, detail="HTTP 500"),), 1.0)
    found = summarize([run], Slo(), 0)
    assert found.latencies_ms["ttft"][99] is None
    attainment = found.rates["slo_attainment"]
    assert attainment is not None
    assert attainment.value == 0


STREAM = (
    b": hello\n\ndata: a\r\n\r\nevent: x\ndata:b\ndata: c\n\nid: 4\n\ndata: [DONE]\n\ndata: half"
)
EVENTS = [b"a", b"b\nc", b"[DONE]"]


@pytest.mark.parametrize("seed", range(5))
def test_events_come_out_however_the_stream_was_cut(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    cuts = sorted({0, len(STREAM), *(rng.randrange(len(STREAM)) for _ in range(12))})
    reader = SseReader()
    events = []
    for begin, end in itertools.pairwise(cuts):
        events += reader.feed(STREAM[begin:end])
    assert events == EVENTS


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_endless_event_is_given_up(end: bytes) -> None:
    reader = SseReader()
    part = b"data: " + b"y" * (EVENT_BYTES_MAX // 3) + end
    assert reader.feed(part) == reader.feed(part) == []
    with pytest.raises(WorkerLost):
        reader.feed(part)
