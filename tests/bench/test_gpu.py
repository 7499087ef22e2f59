"""bench/gpu.sh: without a GPU it measures nothing and says so; its parts work here, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from bench import gpu
from bench.gpu_hand_off import SPAN, reading
from bench.gpu_model import bench_model, random_model
from bench.record import Record

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent
SMALL = transformers.LlamaConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_nothing_is_measured() -> None:
    """And neither Ray nor Redis is needed to find out."""
    code = (
        "import sys\nsys.modules['ray'] = sys.modules['redis'] = None\n"
        "from bench.gpu import main\nsys.exit(main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == gpu.NOTHING_MEASURED, done.stderr
    assert done.stdout == "no CUDA device is here: nothing was measured\n"
    script = (ROOT / "bench" / "gpu.sh").read_text("utf-8")
    assert "-m bench.gpu" in script


def test_decode_prefill_and_answers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STEPS", 1)
    bench = bench_model(random_model(SMALL, CPU), 256, 4)
    weights = sum(p.numel() for p in bench.loaded.model.parameters()) * 2
    assert bench.step_bytes == weights - 2 * 1024 * 64
    record = Record("gpu")
    gpu.decode(record, "small", bench, 4, context=40)
    gpu.prefill(record, "small", bench, 100, matrix=64)
    assert gpu.answer(bench, 2, 20, 3) > 0
    names = [line.name for line in record.lines]
    assert names == [
        "small, decode, 4 streams of 40 tokens: step",
        "small, decode, 4 streams of 40 tokens: bound / step",
        "small, prefill, 100 tokens",
        "small, prefill, 100 tokens / matrix product",
    ]
    assert all(line.found.value > 0 for line in record.lines)


def test_a_hand_off_moves_every_block() -> None:
    with reading(CPU, 3) as (read, size):
        assert size == 3 * SPAN
        read()
        read()


def test_a_part_that_fails_is_said_to_be_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    missing: list[str] = []

    def fails() -> None:
        raise RuntimeError("CUDA error: out of memory\nand more")

    gpu.part(missing, "decode", fails)
    assert missing == ["decode: RuntimeError: CUDA error: out of memory"]
    record = Record("gpu")
    record.notes["device"] = "a card"
    gpu.table(record, missing)
    assert "not measured: decode: RuntimeError" in capsys.readouterr().out
