"""Arrivals, traces and prompts, against values known beforehand."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from pdserve.bench import traces, workload
from pdserve.bench.prompts import TokenRange, token_ids
from pdserve.bench.workload import Request
from pdserve.errors import ConfigError

IDS = TokenRange(1000, 30000)


def test_poisson_gaps_have_the_mean_and_spread_of_their_rate() -> None:
    dues = workload.poisson_arrivals(20001, 4.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(dues)]
    assert dues[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    # Exponential: the deviation equals the mean, and e^-1 of the gaps exceed it.
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.04)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.015)


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert workload.poisson_arrivals(9, 2.0, 5) == workload.poisson_arrivals(9, 2.0, 5)
    assert workload.poisson_arrivals(9, 2.0, 5) != workload.poisson_arrivals(9, 2.0, 6)
    assert workload.poisson_arrivals(3, float("inf"), 0) == (0, 0, 0)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="--rate"):
            workload.poisson_arrivals(3, rate, 0)


MOONCAKE = """\
{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}

{"timestamp": 3000, "input_length": 512, "output_length": 0, "hash_ids": [0], "more": 1}
"""


def test_mooncake_lines_become_requests() -> None:
    assert list(traces.parse_mooncake(MOONCAKE.splitlines())) == [
        Request(1.0, 1100, 5, (0, 1, 2), 512),
        Request(3.0, 512, 1, (0,), 512),  # a server writes at least one token
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1]}',
        '{"timestamp": -1, "input_length": 5, "output_length": 5, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 1e12, "output_length": 5, "hash_ids": [0]}',
        '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [-1]}',
        '{"timestamp": 0, "input_length": "5", "output_length": 5, "hash_ids": [0]}',
        '{"timestamp": 0, "output_length": 5, "hash_ids": []}',
        '{"timestamp": 0',
    ],
)
def test_a_wrong_mooncake_line_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match="line 4: "):
        list(traces.parse_mooncake([*MOONCAKE.splitlines(), line]))


AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,3180,8\r
2023-11-16 18:18:04,1,0"""


def test_azure_rows_become_requests() -> None:
    found = list(traces.parse_azure(AZURE.splitlines(keepends=True)))
    assert [request.due_s for request in found] == pytest.approx([0, 0.052, 60.02004])
    assert [(r.prompt_tokens, r.output_tokens) for r in found] == [(4808, 10), (3180, 8), (1, 1)]
    assert not any(request.blocks for request in found)


@pytest.mark.parametrize(
    "row",
    [
        "2023-11-16 18:17:03.9,5",
        "2023-11-16 18:17:05.x,5,5",
        "yesterday,5,5",
        "2023-11-16 18:19:05,-5,5",
        "2023-11-16 18:19:05,99999999999,5",
        "2023-11-16 18:00:00,5,5",
    ],
)
def test_a_wrong_azure_row_is_named(row: str) -> None:
    with pytest.raises(ConfigError, match="line 5: "):
        list(traces.parse_azure([*AZURE.splitlines(), row]))


def test_files_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(MOONCAKE)
    assert len(traces.read(str(path), None)) == 2
    assert len(traces.read(str(path), 1)) == 1
    path.write_text(AZURE, newline="")
    assert len(traces.read(str(path), None)) == 3
    for text in ("", "a,b\n1,2\n", '["x"]\n'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="neither JSON lines"):
            traces.read(str(path), None)
    path.write_text(AZURE.splitlines()[0])
    with pytest.raises(ConfigError, match="holds no request"):
        traces.read(str(path), None)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        traces.read(str(path), None)


def test_the_samples_are_whole() -> None:
    mooncake = traces.read("sample:mooncake", None)
    assert (len(mooncake), mooncake[-1].due_s, mooncake[0].prompt_tokens) == (200, 72.0, 6758)
    azure = traces.read("sample:azure", None)
    assert (len(azure), azure[0].prompt_tokens) == (300, 4808)


def test_scaling_keeps_what_is_shared() -> None:
    requests = [Request(0, 1100, 50, (0, 1, 2), 512), Request(0, 600, 1, (0, 7), 512)]
    first, second = workload.scaled(requests, 0.1)
    assert (first.block_tokens, first.prompt_tokens, first.output_tokens) == (51, 2 * 51 + 8, 5)
    assert (second.prompt_tokens, second.output_tokens) == (51 + 9, 1)
    a, b = (token_ids(one, at, IDS, 0, 0) for at, one in enumerate((first, second)))
    assert (len(a), len(b)) == (110, 60)
    assert a[:51] == b[:51]
    assert a[51:60] != b[51:60]
    (plain,) = workload.scaled([Request(0, 1000, 100)], 0.25)
    assert (plain.prompt_tokens, plain.output_tokens) == (250, 25)
    for scale in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="--scale"):
            workload.scaled(requests, scale)


def test_speed_shortens_the_gaps_and_a_rate_replaces_them() -> None:
    requests = [Request(5, 10, 1), Request(9, 20, 1)]
    assert [r.due_s for r in workload.at_speed(requests, 2.0)] == [0, 2]
    at_rate = workload.at_rate(requests, 3.0, 8)
    assert tuple(r.due_s for r in at_rate) == workload.poisson_arrivals(2, 3.0, 8)
    assert [r.prompt_tokens for r in at_rate] == [10, 20]
    for speed in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="--speed"):
            workload.at_speed(requests, speed)


def test_prompts_repeat_with_their_seed_and_differ_between_repeats() -> None:
    shared, own = Request(0, 700, 1, (3, 4), 512), Request(0, 700, 1)
    for request in (shared, own):
        tokens = token_ids(request, 0, IDS, 1, 0)
        assert len(tokens) == 700
        assert all(1000 <= token < 30000 for token in tokens)
        assert tokens == token_ids(request, 0, IDS, 1, 0)
        assert tokens != token_ids(request, 0, IDS, 2, 0)
        assert tokens != token_ids(request, 0, IDS, 1, 1)
    assert token_ids(shared, 0, IDS, 1, 0) == token_ids(shared, 1, IDS, 1, 0)
    assert token_ids(own, 0, IDS, 1, 0) != token_ids(own, 1, IDS, 1, 0)
