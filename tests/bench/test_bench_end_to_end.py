"""The whole command against a scripted server: what it measures is what the script did."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdserve.cli.main import main
from tests.bench.scripted import FIRST_S, GAP_S, Act, Scripted, serve


def bench(server: Scripted, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the result that was written."""
    status = main(["bench", "--url", server.url, "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_times_and_counts_are_those_of_the_script(tmp_path: Path) -> None:
    arguments = ("--rate", "40", "--requests", "8", "--repeats", "3", "--output-tokens", "6")
    with serve() as server:
        status, result = bench(server, tmp_path / "r.json", *arguments, "--input-tokens", "9")
    assert status == 0
    assert result["outcomes"]["answered"] == 24
    assert len(server.bodies) == 24 + 1  # one warms up
    assert all(len(body["prompt"]) == 9 and body["ignore_eos"] for body in server.bodies)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 25
    latencies = result["latencies_ms"]
    # Sleeps are never short; on a busy machine they are long.
    whole_s = FIRST_S + 5 * GAP_S
    for name, least_s in (("ttft", FIRST_S), ("itl", GAP_S), ("tpot", GAP_S), ("e2e", whole_s)):
        medians = latencies[name]["p50"]["repeats"]
        assert 0.8 * least_s * 1e3 <= min(medians) < least_s * 1e3 + 400, name
        assert latencies[name]["p50"]["value"] == pytest.approx(statistics.fmean(medians))
    for by_percent in latencies.values():
        for estimate in by_percent.values():
            assert len(estimate["repeats"]) == 3
            assert estimate["low"] <= estimate["value"] + 1e-9
            assert estimate["value"] <= estimate["high"] + 1e-9
    tokens = result["rates"]["output_tokens_per_s"]["repeats"]
    expected = [8 * 6 / wall for wall in result["wall_s"]]
    assert tokens == pytest.approx(expected)
    assert result["tokens_counted_by"] == {"usage": 24}


def test_a_row_is_one_line_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--rate", "inf", "--requests", "4", "--repeats", "3", "--output-tokens", "3")
    with serve() as server:
        bench(server, tmp_path / "r.json", *arguments)
    rows = capsys.readouterr().out.splitlines()
    (latency,) = (row for row in rows if "inter-token latency" in row)
    assert latency.count("(") == latency.count(")") == 3, "each cell has its interval in it"


def test_the_result_says_where_it_was_made(tmp_path: Path) -> None:
    with serve() as server:
        _, result = bench(server, tmp_path / "r.json", "--requests", "1", "--seed", "7")
    assert result["seed"] == 7
    assert result["options"]["requests"] == 1
    assert result["server"]["model"] == "scripted"
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["cpu"]
    assert {"pdserve", "python", "aiohttp"} <= set(result["versions"])
    assert "commit" in result
    assert [len(run) for run in result["samples"]] == [1]


def test_whatever_goes_wrong_is_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts = (Act.REFUSE, Act.BREAK, Act.FAIL_LATE, Act.CUT, Act.RESET, Act.GARBAGE, Act.HANG)
    # One at a time, so that the script meets the requests in their order.
    arguments = ("--rate", "inf", "--concurrency", "1", "--warmup", "0", "--timeout", "3")
    with serve(*acts, Act.SHORT) as server:
        status, result = bench(
            server, tmp_path / "r.json", *arguments, "--requests", "9", "--output-tokens", "3"
        )
    assert status == 0
    assert result["outcomes"] == {
        "answered": 2,
        "refused": 1,
        "failed": 3,
        "cut": 2,
        "timed out": 1,
    }
    assert result["details"] == {
        "HTTP 429 queue_full": 1,
        "HTTP 500": 1,
        "in the stream: worker_lost": 1,
        "no [DONE]": 1,
        "ClientPayloadError": 1,
        "not the API's events": 1,
        "no end within 3 s": 1,
    }
    assert result["short_answers"] == 1
    assert result["rates"]["slo_attainment"]["value"] == pytest.approx(2 / 9)
    shown = capsys.readouterr().out
    for part in ("9 requests: 2 answered", "1 x HTTP 429 queue_full", "1 x no [DONE]"):
        assert part in shown
    assert "1 answers have fewer tokens" in shown


def test_nothing_answered_is_a_failure_with_its_reasons_kept(tmp_path: Path) -> None:
    with serve(*[Act.REFUSE] * 4) as server:
        status, result = bench(
            server, tmp_path / "r.json", "--rate", "inf", "--requests", "4", "--warmup", "0"
        )
    assert status == 1
    assert result["outcomes"]["refused"] == 4
    assert result["latencies_ms"]["ttft"]["p50"] is None


def test_waiting_for_a_turn_counts_as_the_requests_own_time(tmp_path: Path) -> None:
    load = ("--rate", "inf", "--requests", "4", "--output-tokens", "2", "--warmup", "0")
    arguments = (*load, "--repeats", "3")
    with serve() as server:
        _, free = bench(server, tmp_path / "free.json", *arguments)
        assert server.in_flight_max == 4
    with serve() as server:
        _, capped = bench(server, tmp_path / "capped.json", *arguments, "--concurrency", "1")
        assert server.in_flight_max == 1
    # In the quickest of the repeats: a machine that stands still does not do so each time.
    longest = [
        min(max(s["ttft_s"] for s in run) for run in result["samples"]) for result in (free, capped)
    ]
    assert longest[0] < longest[1]
    assert longest[1] > 3 * (FIRST_S + GAP_S)
    assert capped["latencies_ms"]["send_delay"]["p99"]["value"] > 100


def test_a_slow_server_does_not_slow_the_arrivals(tmp_path: Path) -> None:
    """50 requests a second, each of which takes longer than ten gaps."""
    load = ("--rate", "50", "--requests", "10", "--output-tokens", "8", "--warmup", "0")
    with serve() as server:
        _, result = bench(server, tmp_path / "r.json", *load, "--repeats", "3")
    assert min(result["latencies_ms"]["send_delay"]["p50"]["repeats"]) < 100
    assert server.in_flight_max > 3
    assert result["workload"]["duration_s"] < result["wall_s"][0]


def test_goodput_counts_what_keeps_the_slo(tmp_path: Path) -> None:
    arguments = ("--rate", "inf", "--requests", "3", "--output-tokens", "4", "--warmup", "0")
    with serve() as server:
        slack = ("--slo-ttft-ms", "2000", "--slo-itl-ms", "1000")
        _, kept = bench(server, tmp_path / "kept.json", *arguments, *slack)
        _, late = bench(server, tmp_path / "late.json", *arguments, "--slo-ttft-ms", "5")
        _, slow = bench(server, tmp_path / "slow.json", *arguments, "--slo-itl-ms", "5")
    assert kept["rates"]["slo_attainment"]["value"] == 1
    assert late["rates"]["slo_attainment"]["value"] == 0
    assert slow["rates"]["goodput_requests_per_s"]["value"] == 0


def test_a_plain_server_is_asked_plainly_and_its_chunks_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(Act.TEXT_ONLY, Act.TEXT_ONLY) as server:
        _, result = bench(
            server, tmp_path / "r.json", "--plain", "--requests", "1", "--output-tokens", "3"
        )
    assert {"ignore_eos", "return_token_ids"}.isdisjoint(server.bodies[0])
    assert result["tokens_counted_by"] == {"chunks": 1}
    assert result["samples"][0][0]["output_tokens"] == 3
    assert "counted as chunks" in capsys.readouterr().out


def test_a_sample_trace_is_scaled_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--trace", "sample:mooncake", "--requests", "5", "--warmup", "0")
    with serve() as server:
        _, result = bench(server, tmp_path / "r.json", *arguments, "--scale", "0.01")
    shown = capsys.readouterr().out
    assert "scaled to 0.01 of what was recorded" in shown
    # All five begin with the block that the trace calls 0, of 5 tokens at this scale.
    assert len({tuple(body["prompt"][:5]) for body in server.bodies}) == 1
    assert len({tuple(body["prompt"][:10]) for body in server.bodies}) == 5
    assert result["workload"]["shared_blocks"] > 0
    with serve(*[Act.REFUSE] * 5) as server:
        bench(server, tmp_path / "r.json", *arguments)
    assert "4 of them exceed the server's 4096 tokens" in capsys.readouterr().out


def test_keys_are_sent_where_they_were_given_for(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-1\n")
    arguments = ("--requests", "1", "--warmup", "0")
    with serve() as server:
        bench(server, tmp_path / "r.json", *arguments)
        bench(server, tmp_path / "r.json", *arguments, "--api-key-file", str(keys))
    assert server.keys == [None, "Bearer secret-1"]
    assert "secret-1" not in (tmp_path / "r.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--url", "127.0.0.1:1"], "expected http://host:port"),
        (["--url", "http://127.0.0.1:1", "--rate", "0"], "--rate 0"),
        (["--url", "http://127.0.0.1:1", "--rate", "nan"], "--rate nan"),
        (["--url", "http://127.0.0.1:1", "--repeats", "0"], "--repeats 0"),
        (["--url", "http://127.0.0.1:1", "--timeout", "0"], "--timeout 0"),
        (["--url", "http://127.0.0.1:1", "--scale", "0.5"], "with --trace"),
        (["--url", "http://127.0.0.1:1", "--prompt-ids", "9:3"], "--prompt-ids '9:3'"),
        (["--url", "http://127.0.0.1:1", "--trace", "/no/such"], "the trace /no/such"),
        (["--url", "http://127.0.0.1:1", "--trace", "sample:x"], "azure, mooncake"),
        (["--url", "http://127.0.0.1:1", "--out", "/no/such/r.json"], "there is no folder"),
    ],
)
def test_a_wrong_option_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert main(["bench", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert part in lines[0]


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.startswith("pdserve bench: GET http://127.0.0.1:1/v1/models: ")


def test_another_model_than_is_served_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with serve() as server:
        assert main(["bench", "--url", server.url, "--model", "gpt"]) == 2
    assert "serves scripted" in capsys.readouterr().err


def test_the_load_generator_loads_no_engine() -> None:
    code = "import sys, pdserve.cli.bench; print({'torch', 'ray', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
