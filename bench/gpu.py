"""``bench/gpu.sh``: what a GPU has to show, without Ray and Redis. Exits with 3 without a GPU.

    contract tests -> each shape: beside transformers, decode, prefill -> hand-off -> table, JSON

Each part is measured beside what bounds it, in turns: the rate of a copy on the device, of a matrix
product, transformers' continuous batching. A part that cannot be measured is told as such, with the
reason, and the others still run. Not run on a GPU yet; its parts are tested on the CPU with small
shapes (tests/bench/test_gpu.py).
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.gpu_model import SHAPES, Bench, bench_model, random_model
from bench.record import REPEATS, Goal, Record, interleaved

NOTHING_MEASURED = 3
STREAMS = (1, 32, 128)
CONTEXT = 512  # tokens of each stream that decodes
STEPS = 20  # in a turn
PROMPT = 8192
PEER_STREAMS, PEER_PROMPT, PEER_ANSWER = 32, 256, 128
MATRIX = 8192
COPIED = 2**30
HANDED = 256  # blocks in a hand-off


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--skip-tests", action="store_true", help="measure alone")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured")
        return NOTHING_MEASURED
    device = torch.device("cuda:0")
    record = Record("gpu")
    record.notes["device"] = torch.cuda.get_device_name(device)
    record.notes["CUDA"] = torch.version.cuda
    missing: list[str] = []
    tests = 0 if parsed.skip_tests else contract_tests()
    record.notes["contract tests"] = "not run" if parsed.skip_tests else f"exit status {tests}"
    for name in SHAPES:
        part(missing, name, partial(shape, record, missing, name))
        gc.collect()  # a model and what is bound to it refer to each other
        torch.cuda.empty_cache()
    part(missing, "hand-off over CUDA IPC", lambda: hand_off(record, device))
    record.notes["not measured"] = missing
    table(record, missing)
    print(f"kept in {record.write()}")
    if not record.lines:
        return NOTHING_MEASURED
    return 1 if tests else 0


def contract_tests() -> int:
    """The exit status of the tests that are marked ``gpu``."""
    where = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    command += ["tests/engine", "tests/kv_transfer", "tests/cache_tiers/test_device_spans.py"]
    return subprocess.run(command, cwd=where, check=False).returncode


def part(missing: list[str], name: str, measure: Callable[[], object]) -> None:
    """One part; what it raises is why it was not measured."""
    try:
        measure()
    except Exception as error:  # the other parts do not depend on this one
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        missing.append(f"{name}: {type(error).__name__}: {first}")


def table(record: Record, missing: Sequence[str]) -> None:
    print(f"\n{record.notes['device']}, torch {torch.__version__}, {record.made.at:%Y-%m-%d}")
    for line in record.lines:
        print(f"  {line.text()}")
    for name in missing:
        print(f"  not measured: {name}")


def shape(record: Record, missing: list[str], name: str) -> None:
    device, config = torch.device("cuda:0"), SHAPES[name]
    model = random_model(config, device)
    part(missing, f"{name}, beside transformers", lambda: beside(record, name, config, model))
    most = max(PROMPT, max(STREAMS) * (CONTEXT + 16))
    bench = bench_model(model, most, max(STREAMS))
    record.notes[f"{name}: attention"] = bench.kernel
    for streams in STREAMS:
        decode(record, name, bench, streams)
    prefill(record, name, bench, PROMPT)
    bench.runner.detach()


def timed(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def copy_rate(device: torch.device, size: int = COPIED) -> Callable[[], float]:
    """Bytes/s that a copy on the device reads and writes, together."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: 2 * size / timed(device, lambda: target.copy_(source))


def decode(record: Record, name: str, bench: Bench, streams: int, context: int = CONTEXT) -> None:
    """Time of a step beside the time that reading weights and KV takes at the copy's rate."""
    device = bench.loaded.device
    rows = bench.rows([context] * streams, [1] * streams)
    read = bench.step_bytes + streams * context * bench.layout.bytes_per_token
    rate = copy_rate(device)

    def steps() -> float:
        return timed(device, lambda: [bench.runner.step(rows) for _ in range(STEPS)]) / STEPS

    found = interleaved({"step": steps, "bound": lambda: read / rate()})
    what = f"{name}, decode, {streams} streams of {context} tokens"
    record.value(f"{what}: step", "ms", [1000 * one for one in found["step"]])
    record.ratio(f"{what}: bound / step", found["bound"], found["step"], Goal(0.7))


def prefill(record: Record, name: str, bench: Bench, tokens: int, matrix: int = MATRIX) -> None:
    """Rate of the linear layers' products alone, beside one large product's."""
    device, model = bench.loaded.device, bench.loaded.model
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    work = 2 * tokens * sum(m.weight.numel() for m in linears if m is not head)
    rows = bench.rows([tokens], [tokens])
    a, b = (torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = interleaved(
        {
            "prompt": lambda: work / timed(device, lambda: bench.runner.step(rows)),
            "product": lambda: 2 * matrix**3 / timed(device, lambda: a @ b),
        }
    )
    what = f"{name}, prefill, {tokens} tokens"
    record.value(what, "tokens/s", [tokens * one / work for one in found["prompt"]])
    record.ratio(f"{what} / matrix product", found["prompt"], found["product"], Goal(0.55))


def answer(bench: Bench, streams: int, prompt: int, tokens: int) -> float:
    """Seconds until ``streams`` prompts have ``tokens`` tokens each; all steps, no scheduler."""

    most = prompt + tokens

    def run() -> None:
        bench.runner.step(bench.rows([prompt] * streams, [prompt] * streams, most))
        for at in range(1, tokens):
            bench.runner.step(bench.rows([prompt + at] * streams, [1] * streams, most))

    return timed(bench.loaded.device, run)


def beside(
    record: Record,
    name: str,
    config: Any,
    model: Any,
    streams: int = PEER_STREAMS,
    prompt: int = PEER_PROMPT,
    tokens: int = PEER_ANSWER,
) -> None:
    """Tokens/s of whole answers, ours and transformers' continuous batching, on equal weights."""
    device = next(model.parameters()).device
    theirs = random_model(config, device)
    theirs.set_attn_implementation("sdpa")
    library: Any = transformers
    wanted = library.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = [[5 + at % 900 for at in range(prompt)] for _ in range(streams)]

    def batched() -> float:
        took = timed(device, lambda: theirs.generate_batch(prompts, generation_config=wanted))
        return streams * tokens / took

    bench = bench_model(model, streams * (prompt + tokens), streams)
    try:
        found = interleaved(
            {
                "ours": lambda: streams * tokens / answer(bench, streams, prompt, tokens),
                "transformers": batched,
            },
            repeats=REPEATS,
        )
    finally:
        bench.runner.detach()
    what = f"{name}, {streams} streams, {prompt} in, {tokens} out"
    for way, rates in found.items():
        record.value(f"{what}: {way}", "tokens/s", rates)
    record.ratio(f"{what}: ours / transformers", found["ours"], found["transformers"], Goal(3.0))


def hand_off(record: Record, device: torch.device) -> None:
    """Blocks read from another process's pool on this device, beside a copy on it."""
    # Imported here: without CUDA IPC nothing of it is needed.
    from bench.gpu_hand_off import reading  # noqa: PLC0415

    rate = copy_rate(device)
    with reading(device, HANDED) as (read, size):
        found = interleaved(
            {
                "hand-off": lambda: size / timed(device, read),
                # A copy's rate counts what it reads and what it writes.
                "copy": lambda: rate() / 2,
            }
        )
    record.value("hand-off over CUDA IPC", "GB/s", [one / 1e9 for one in found["hand-off"]])
    record.ratio("hand-off over CUDA IPC / copy", found["hand-off"], found["copy"], Goal(0.8))


if __name__ == "__main__":
    sys.exit(main())
