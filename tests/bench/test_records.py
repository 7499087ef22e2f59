"""Records of bench/: turns are taken, ratios and misses are what they say, files are whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench_main
from bench import report
from bench.__main__ import missed_lines
from bench.record import Goal, Record, interleaved, ratio
from pdserve.bench import provenance


def test_cases_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def case(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({"a": lambda: case("a"), "b": lambda: case("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_ratio_is_of_the_means_and_lies_in_its_interval() -> None:
    found = ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    assert found.value == pytest.approx(12 / 5)
    assert found.low is not None
    assert found.high is not None
    assert 2.0 <= found.low <= found.value <= found.high <= 3.0
    assert found.repeats == (2.0, 2.0, 3.0)
    assert ratio([3.0], [2.0]).low is None
    with pytest.raises(ValueError, match="2 and 1 repeats"):
        ratio([1.0, 2.0], [1.0])


def test_a_miss_is_named_and_kept(tmp_path: Path) -> None:
    record = Record("sample", seed=7)
    record.ratio("too slow", [1.0, 1.0], [4.0, 4.0], Goal(0.5))
    record.value("fast", "ms", [1.0, 3.0], Goal(5, at_least=False))
    assert [line.missed for line in record.lines] == [True, False]
    assert "MISSED" in record.lines[0].text()
    kept = json.loads(record.write(tmp_path).read_text("utf-8"))
    assert [line["missed"] for line in kept["lines"]] == [True, False]
    assert kept["lines"][1]["repeats"] == [1.0, 3.0]
    assert kept["seed"] == 7
    assert kept["machine"]["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["sample.json"]
    assert missed_lines(tmp_path / "sample.json") == ["too slow: 0.25 x, goal >= 0.5"]


def test_the_page_of_figures_names_each_miss_and_what_was_not_measured(tmp_path: Path) -> None:
    record = Record("handoff")
    record.ratio("shared memory", [1.0, 1.0], [4.0, 4.0], Goal(0.5))
    record.value("socket", "GB/s", [1.25])
    record.write(tmp_path)
    told = "\n".join(report.page(tmp_path)).split("## ")
    handoff = next(part for part in told if part.startswith("handoff"))
    assert "| shared memory | 0.25 x | 0.25 to 0.25 | >= 0.5 | **missed** |" in handoff
    assert "| socket | 1.25 GB/s |  |  |  |" in handoff
    assert (
        next(part for part in told if part.startswith("engines")).strip().endswith("Not measured.")
    )


def test_a_measurement_that_fails_is_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_main, "MEASUREMENTS", {"no_such": "fails", "sample": "is there"})
    monkeypatch.setattr(bench_main, "RESULTS", tmp_path)
    record = Record("sample")
    record.value("slow", "ms", [9.0, 9.0], Goal(5, at_least=False))
    record.write(tmp_path)
    run = subprocess.run

    def runs(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        """The one that is there has run already."""
        own = command if command[-1] == "no_such" else [sys.executable, "-c", ""]
        return run(own, check=check)

    monkeypatch.setattr(subprocess, "run", runs)
    assert bench_main.main([]) == 1
    told = capfd.readouterr().err
    assert "failed: no_such" in told
    assert "missed: sample: slow: 9 ms, goal <= 5" in told
    assert bench_main.main(["--budget", "0"]) == 0
    told = capfd.readouterr().err
    assert "no time left for: no_such" in told
    assert "no time left for: sample" in told


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_kept_result_is_no_change_of_the_code_that_made_it(tmp_path: Path) -> None:
    folder = tmp_path / "pdserve" / "bench"
    code, kept = folder / "provenance.py", tmp_path / "bench" / "results" / "handoff.json"
    for path in (code, kept):
        path.parent.mkdir(parents=True)
        path.write_text("first\n", "utf-8")
    _git(tmp_path, "init", "--quiet")
    assert provenance.commit(folder) is None, "nothing was committed"
    _git(tmp_path, "add", ".")
    _git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    head = _git(tmp_path, "rev-parse", "HEAD")

    assert provenance.commit(folder) == head
    kept.write_text("second\n", "utf-8")
    assert provenance.commit(folder) == head
    code.write_text("second\n", "utf-8")
    assert provenance.commit(folder) == head + "+"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
