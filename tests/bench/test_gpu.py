"""bench/gpu.sh: without a GPU it measures nothing and says so; its parts work here, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


# Dependencies of other parts; a machine that is there for its GPU need not have them.
NOT_NEEDED = ("ray", "redis", "gguf", "msgspec", "zmq", "grpc_health", "grpc_reflection")


def without(code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in an interpreter that has none of NOT_NEEDED."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_nothing_is_measured() -> None:
    """And neither Ray nor Redis is needed to find out."""
    done = without("import bench.gpu_hand_off\nfrom bench.gpu import main\nsys.exit(main([]))")
    assert done.returncode == gpu.NOTHING_MEASURED, done.stderr
    assert done.stdout == "no CUDA device is here: nothing was measured\n"
    script = (ROOT / "bench" / "gpu.sh").read_text("utf-8")
    assert "-m bench.gpu" in script


def test_the_contract_tests_of_a_gpu_are_all_there_and_need_no_more() -> None:
    done = without(
        "import pytest\nfrom bench.gpu import CONTRACTS\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', *CONTRACTS]))"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in gpu.CONTRACTS:
        assert file in done.stdout, f"{file} holds no test of a GPU"
    marked = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in file.read_text("utf-8") and file != Path(__file__)
    }
    assert marked == set(gpu.CONTRACTS)


def test_how_the_contract_tests_ended_is_told(tmp_path: Path) -> None:
    test = tmp_path / "test_one.py"

    def ended(body: str, limit_s: float = 60.0) -> str:
        test.write_text(f"import pytest, time\n@pytest.mark.gpu\ndef test_it(): {body}\n", "utf-8")
        return gpu.contract_tests([str(test)], limit_s)

    assert ended("pass") == "passed"
    assert ended("assert 1 == 2") == "exit status 1"
    assert ended("time.sleep(600)", 0.5) == "did not end within 0.5 s"


def test_a_peer_that_did_less_has_no_rate() -> None:
    def answer(tokens: int, error: str | None = None, begun: float = 1.0) -> SimpleNamespace:
        return SimpleNamespace(
            generated_tokens=[1] * tokens, error=error, lifespan=(begun, begun + 2)
        )

    assert gpu.seconds_of([answer(3), answer(3, begun=1.5)], 2, 3) == 2.5
    with pytest.raises(RuntimeError, match=r"^1 of 2 answers are whole$"):
        gpu.seconds_of([answer(3), answer(2)], 2, 3)
    with pytest.raises(RuntimeError, match=r"^0 of 1 answers are whole: out of blocks$"):
        gpu.seconds_of([answer(3, "out of blocks")], 1, 3)
    with pytest.raises(RuntimeError, match=r"^0 of 1"):
        gpu.seconds_of([], 1, 3)
    with pytest.raises(RuntimeError, match="began at -1"):
        gpu.seconds_of([answer(3, begun=-1.0)], 1, 3)


def test_all_parts_work_together_in_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the real peer; one shape that cannot be measured keeps no other from it."""
    small = {"SHAPES": {"small": SMALL, "none": None}, "STREAMS": (1, 3), "CONTEXT": 40, "STEPS": 1}
    small |= {"PROMPT": 100, "MATRIX": 64, "COPIED": 4096, "HANDED": 3}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.beside, "__defaults__", (2, 20, 4))
    record = Record("gpu")
    record.notes["device"] = "this processor"
    kept_before: list[int] = []

    def tests() -> str:
        kept = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
        kept_before.append(len(kept["lines"]))
        return "passed"

    gpu.measure(record, CPU, tmp_path, tests)
    assert kept_before == [8], "decode, prefill and hand-off are kept before the tests begin"
    names = [line.name for line in record.lines]
    assert names[-1] == "small, 2 streams, 20 in, 4 out: ours / transformers"
    assert all(line.found.value > 0 for line in record.lines)
    missing = [line.partition(":")[0] for line in record.notes["not measured"]]
    assert missing == ["none", "none, beside transformers"]
    gpu.table(record)
    assert "contract tests: passed" in capsys.readouterr().out


def test_decode_prefill_and_answers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("STEPS", 1), ("MATRIX", 64), ("COPIED", 4096)):
        monkeypatch.setattr(gpu, name, value)
    bench = bench_model(random_model(SMALL, CPU), 256, 4)
    assert bench.notes[0] == "attention: native kernel"
    assert bench.notes[-1].startswith("probe: ")
    weights = sum(p.numel() for p in bench.loaded.model.parameters()) * 2
    assert bench.step_bytes == weights - 2 * 1024 * 64
    record = Record("gpu")
    gpu.decode(record, "small", bench, 4, context=40)
    gpu.prefill(record, "small", bench, 100)
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
    record.notes |= {"device": "a card", "contract tests": "exit status 1"}
    record.notes["not measured"] = missing
    gpu.table(record)
    told = capsys.readouterr().out
    assert "not measured: decode: RuntimeError" in told
    assert "contract tests: exit status 1" in told
