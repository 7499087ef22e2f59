"""What ``pdserve status`` draws fits its terminal, whatever its width, and says what is wrong."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from pdserve.cli import snapshot
from pdserve.cli.picture import picture
from pdserve.cli.status import lacking, table
from pdserve.errors import WorkerLost

URL = "http://127.0.0.1:1"
BLOCKS = {"used": 123, "cached": 45678, "total": 65536}
TIERS = {"host": 1234, "host_total": 8192, "redis_written": 99999}
LOAD = {"running": 16, "waiting": 128, "blocks": BLOCKS}
QUANTILES = {"p50": 0.1234, "p95": 1.9876}
RATES = ("finished", "failed", "rejected", "generated", "computed", "device", "host", "redis")


def worker(name: str, state: str, degraded: str = "") -> dict[str, Any]:
    where = {"role": name.partition("-")[0], "pid": 1234567, "node": "machine-17.example"}
    return {"id": name, "state": state, **where, **LOAD, "tiers": TIERS, "degraded": degraded}


def moment(**changed: Any) -> dict[str, Any]:
    rates = dict.fromkeys(RATES, 12345.678) | {"in_flight": 77, "kv_bytes": 5e9}
    return {
        "version": "0.1.0",
        "model": "a-model-of-some-name",
        "numerics": "fast",
        "ready": True,
        "reason": "",
        "missing": [],
        "shortfalls": [],
        "headline": rates | {"first_token": QUANTILES, "inter_token": QUANTILES},
        "pools": [{"role": "prefill", "workers": 1, "ready": 1, **LOAD}],
        "workers": [worker("prefill-0", "starting"), worker("decode-10", "draining")],
        **changed,
    }


def draw(width: int, trouble: str = "", **changed: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=False)
    console.print(picture(snapshot.read(moment(**changed), URL), width, trouble))
    drawn = console.file
    assert isinstance(drawn, io.StringIO)
    return [line.rstrip() for line in drawn.getvalue().splitlines()]


def headings(lines: Sequence[str]) -> list[str]:
    (found,) = [line for line in lines if line.startswith("worker ")]
    return re.split(r" {2,}", found)


def test_less_room_leaves_out_what_matters_least() -> None:
    wide = draw(160)
    order = ["worker", "state", "role", "pid", "node", "running", "waiting"]
    order += ["used", "cached", "total", "host", "Redis written"]
    assert headings(wide) == order
    assert [line.split()[4] for line in wide if "-17." in line] == ["machine-17.example"] * 2
    usual = headings(draw(80))
    assert [name for name in order if name in usual] == usual
    assert {"state", "pid", "running", "waiting", "used", "cached", "total"} <= set(usual)
    assert headings(draw(40)) == ["worker", "state", "running", "waiting"]


@pytest.mark.parametrize("width", range(24, 161))
def test_every_line_fits_and_states_are_whole(width: int) -> None:
    lines = draw(width)
    assert max(map(len, lines)) <= width
    drawn = dict(line.split()[:2] for line in lines if re.match(r"(prefill|decode)-\d", line))
    assert drawn == {"prefill-0": "starting", "decode-10": "draining"}
    assert not any("…" in line for line in lines if width >= 35)
    joined = " ".join(" ".join(lines).split())
    for said in ("in flight 77", "KV 5000.00 MB/s", "between tokens 123 ms, p95 1988 ms"):
        assert said in joined


def test_a_name_too_long_is_cut_before_the_state() -> None:
    lines = draw(40, workers=[worker("decode-" + "0" * 60, "suspect")])
    (line,) = [line for line in lines if line.startswith("decode-0")]
    assert line.split()[1] == "suspect"
    assert len(line) <= 40


def test_what_is_wrong_stands_above_the_tables_and_is_no_markup() -> None:
    broken = worker("decode-0", "ready", "Redis [bold]refuses[/bold] writes")
    lines = draw(80, "the router is gone", workers=[broken], ready=False, reason="no decode")
    assert lines[0].endswith("not ready: no decode")
    assert lines[1] == "the router is gone"
    assert lines[2] == "decode-0 is degraded: Redis [bold]refuses[/bold] writes"
    assert table([broken]).splitlines()[-1] == lines[2]


def test_a_planned_worker_that_never_came_is_named() -> None:
    said = "decode-1 has not joined: it starts, or no node has room for it (ray status)"
    assert said in draw(120, missing=["decode-1"])
    assert lacking(moment(missing=["decode-1"])) == [said]


def test_what_the_cluster_falls_short_of_is_told_once() -> None:
    why = "KV does not move between workers: prefill_failed"
    assert draw(80, shortfalls=[why])[1] == f"degraded: {why}"
    unready = draw(120, shortfalls=[why], ready=False, reason=why)
    assert [line for line in unready if why in line] == unready[:1]
    assert lacking(moment(shortfalls=[why])) == [f"degraded: {why}"]
    assert lacking(moment(shortfalls=[why], ready=False, reason=why)) == [f"not ready: {why}"]
    assert lacking(moment()) == []
    assert table([], lacking(moment(shortfalls=[why]))).splitlines()[-1] == f"degraded: {why}"


def test_an_idle_cluster_without_workers_can_be_drawn() -> None:
    nothing = {"p50": None, "p95": None}
    headline = moment()["headline"] | {"first_token": nothing, "inter_token": nothing}
    lines = draw(80, headline=headline, pools=[], workers=[])
    assert any("first token -" in line for line in lines)


def test_an_answer_of_another_kind_is_one_clear_error() -> None:
    with pytest.raises(WorkerLost, match=r"127\.0\.0\.1:1/live\.json: .*workers"):
        snapshot.read(moment(workers=3), URL)
