"""From the samples of all repeats to the figures that are shown and kept. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.bench.samples import Outcome, Run, Sample
from pdserve.bench.stats import PERCENTILES, Estimate, estimate, percentile


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good answer keeps to: its time to first token, and its mean time per token after
    that. Milliseconds; None sets no limit."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def kept_by(self, sample: Sample) -> bool:
        if sample.outcome is not Outcome.ANSWERED:
            return False
        tpot = sample.tpot_s
        return (self.ttft_ms is None or sample.ttft_s * 1e3 <= self.ttft_ms) and (
            self.itl_ms is None or tpot is None or tpot * 1e3 <= self.itl_ms
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """``latencies_ms``: metric -> percentile -> estimate, of the answered requests only.
    An estimate is None where nothing was there to measure."""

    outcomes: dict[str, int]
    details: dict[str, int]
    short_answers: int  # answered with fewer tokens than were asked for
    counted_by: dict[str, int]
    latencies_ms: dict[str, dict[int, Estimate | None]]
    rates: dict[str, Estimate | None]
    wall_s: tuple[float, ...]


_LATENCIES: dict[str, Callable[[Sample], Sequence[float]]] = {
    "ttft": lambda sample: (sample.ttft_s,),
    "itl": lambda sample: sample.gaps_s,
    "tpot": lambda sample: () if sample.tpot_s is None else (sample.tpot_s,),
    "e2e": lambda sample: (sample.end_s,),
    "send_delay": lambda sample: (sample.sent_s,),
}


def summarize(runs: Sequence[Run], slo: Slo, seed: int) -> Summary:
    every = [sample for run in runs for sample in run.samples]
    good = [sample for sample in every if sample.outcome is Outcome.ANSWERED]
    outcomes = Counter(sample.outcome.value for sample in every)
    return Summary(
        outcomes={outcome.value: outcomes[outcome.value] for outcome in Outcome},
        details=dict(Counter(sample.detail for sample in every if sample.detail).most_common()),
        short_answers=sum(sample.output_tokens < sample.asked_tokens for sample in good),
        counted_by=dict(Counter(sample.counted_by for sample in good)),
        latencies_ms={
            name: {percent: _latency(runs, values, percent, seed) for percent in PERCENTILES}
            for name, values in _LATENCIES.items()
        },
        rates=_rates(runs, slo, seed),
        wall_s=tuple(run.wall_s for run in runs),
    )


def _latency(
    runs: Sequence[Run], values: Callable[[Sample], Sequence[float]], percent: int, seed: int
) -> Estimate | None:
    each = []
    for run in runs:
        found = [v * 1e3 for sample in _answered(run) for v in values(sample)]
        if found:
            each.append(percentile(found, percent))
    return estimate(each, seed)


def _rates(runs: Sequence[Run], slo: Slo, seed: int) -> dict[str, Estimate | None]:
    """Per second of the run's wall time; what failed adds to the time and not to the rest."""

    def over(count: Callable[[Run], float]) -> Estimate | None:
        return estimate([count(run) / run.wall_s for run in runs if run.wall_s > 0], seed)

    def kept(run: Run) -> int:
        return sum(map(slo.kept_by, run.samples))

    return {
        "answered_requests_per_s": over(lambda run: len(_answered(run))),
        "prompt_tokens_per_s": over(lambda run: sum(s.prompt_tokens for s in _answered(run))),
        "output_tokens_per_s": over(lambda run: sum(s.output_tokens for s in _answered(run))),
        "goodput_requests_per_s": over(kept),
        "slo_attainment": estimate(
            [kept(run) / len(run.samples) for run in runs if run.samples], seed
        ),
    }


def _answered(run: Run) -> list[Sample]:
    return [sample for sample in run.samples if sample.outcome is Outcome.ANSWERED]
