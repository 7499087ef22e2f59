"""The summary as tables for people, on a terminal or in a file."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from pdserve.bench.stats import PERCENTILES, Estimate
from pdserve.bench.summary import Slo, Summary

_LATENCIES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2e": "end to end",
    "send_delay": "sent late by",
}
_RATES = {
    "answered_requests_per_s": "requests/s answered",
    "prompt_tokens_per_s": "prompt tokens/s",
    "output_tokens_per_s": "output tokens/s",
    "goodput_requests_per_s": "requests/s within the SLO",
    "slo_attainment": "share within the SLO",
}


def show(console: Console, summary: Summary, slo: Slo, repeats: int) -> None:
    note = "mean of the repeats, 95 % interval over them" if repeats > 1 else "one repeat"
    latencies = Table(title=f"latency in ms ({note})", title_justify="left")
    latencies.add_column("")
    for percent in PERCENTILES:
        latencies.add_column(f"p{percent}", justify="right")
    for name, text in _LATENCIES.items():
        found = summary.latencies_ms[name]
        latencies.add_row(text, *(cell(found[percent]) for percent in PERCENTILES))
    console.print(latencies)
    rates = Table(show_header=False)
    rates.add_column()
    rates.add_column(justify="right")
    for name, text in _RATES.items():
        rates.add_row(text, cell(summary.rates[name]))
    console.print(rates)
    for line in remarks(summary, slo):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def cell(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return _figure(found.value)
    return f"{_figure(found.value)} ({_figure(found.low)} to {_figure(found.high)})"


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def remarks(summary: Summary, slo: Slo) -> Iterator[str]:
    """What no average shows: every request that was not answered, and what was odd."""
    total = sum(summary.outcomes.values())
    counts = ", ".join(f"{n} {name}" for name, n in summary.outcomes.items() if n)
    yield f"{total} requests: {counts}"
    for detail, count in summary.details.items():
        yield f"  {count} x {detail}"
    if summary.short_answers:
        yield f"{summary.short_answers} answers have fewer tokens than were asked for"
    if summary.counted_by.get("chunks"):
        yield "tokens were counted as chunks: the server tells neither usage nor token ids"
    limits = [
        f"{name} {limit:g} ms"
        for name, limit in (("first token", slo.ttft_ms), ("mean per token", slo.itl_ms))
        if limit is not None
    ]
    yield "SLO: " + (", ".join(limits) or "none set; every answer keeps it")
