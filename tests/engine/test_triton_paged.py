"""Triton's paged attention against the reference, in Triton's interpreter (a process of its own:
the interpreter has to be chosen before anything imports triton)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdserve.engine.triton_layer import load_triton, parts_for, power

SCRIPT = "tests.engine.triton_run"
# Where make test puts triton: without CUDA the product has no use for it.
BESIDE = Path(sys.prefix) / "interpreted"
HERE = importlib.util.find_spec("triton") is not None or (BESIDE / "triton").is_dir()


def check_run(module: str, *arguments: str, **environment: str) -> str:
    """What a process of its own printed; it has to end well."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    print(done.stdout, done.stderr[-4000:])
    assert done.returncode == 0
    return done.stdout


@pytest.mark.skipif(not HERE, reason="triton is not installed: make test")
def test_the_kernels_compute_what_the_reference_does() -> None:
    """And a small model, whose decode steps are replayed, writes what ``generate`` does."""
    check_run(SCRIPT, "cpu", TRITON_INTERPRET="1", PYTHONPATH=str(BESIDE))


@pytest.mark.skipif(not HERE, reason="triton is not installed: make test")
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    own = {"PYTHONPATH": str(BESIDE), "TRITON_CACHE_DIR": str(tmp_path)}
    told = check_run("tests.engine.triton_compile", TRITON_INTERPRET="0", **own)
    assert len(told.splitlines()) == 11


@pytest.mark.gpu
def test_the_kernels_compute_what_the_reference_does_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    check_run(SCRIPT, "cuda")


def test_where_it_cannot_be_used_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "for CUDA devices, not cpu" in load_triton(torch.device("cpu"), torch.bfloat16).reason
    assert "do not compute in torch.float64" in load_triton(cuda, torch.float64).reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_triton(cuda, torch.bfloat16).reason == "triton is not installed"


def test_parts_fill_the_device_for_few_tokens_alone() -> None:
    assert [power(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [parts_for(n) for n in (0, 1, 8, 64, 256, 1024)] == [16, 16, 16, 4, 1, 1]
