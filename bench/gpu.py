"""``bench/gpu.sh``: what a GPU has to show, without Ray and Redis. Exits with 3 without a GPU.

    each shape: decode, prefill -> hand-off -> contract tests -> each shape: beside transformers
    -> table

Each part is measured beside what bounds it, in turns: the rate of a copy on the device, of a matrix
product, transformers' continuous batching. Kernels are probed before they are measured. A part that
cannot be measured is told as such, with the reason, and the others still run; what was measured is
kept after each part, and the slowest ones come last. Not run on a GPU yet; its parts are tested on
the CPU with small shapes (tests/bench/test_gpu.py).
"""

from __future__ import annotations

import argparse
import gc
import inspect
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.gpu_model import SHAPES, Bench, bench_model, random_model
from bench.record import REPEATS, RESULTS, Goal, Record, interleaved

NOTHING_MEASURED = 3
# The only ones that hold tests of a GPU; what others import need not be installed there.
CONTRACTS = (
    "tests/engine/test_triton_paged.py",
    "tests/engine/test_decode_graph.py",
    "tests/kv_transfer/test_contract.py",
    "tests/cache_tiers/test_device_spans.py",
)
CONTRACTS_S = 240.0
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
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device is here: nothing was measured")
        return NOTHING_MEASURED
    device = torch.device("cuda:0")
    record = Record("gpu")
    record.notes |= {"device": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda}
    measure(record, device, parsed.results, contract_tests if not parsed.skip_tests else None)
    table(record)
    print(f"kept in {record.write(parsed.results)}")
    if not record.lines:
        return NOTHING_MEASURED
    return 0 if record.notes["contract tests"] in ("not run", "passed") else 1


def measure(
    record: Record, device: torch.device, results: Path, tests: Callable[[], str] | None
) -> None:
    """All parts; what was measured is kept in ``results`` after each."""
    missing: list[str] = []
    record.notes |= {"contract tests": "not run", "not measured": missing}

    def kept(name: str, measured: Callable[[], object]) -> None:
        part(missing, name, measured)
        gc.collect()  # a model and what is bound to it refer to each other
        torch.cuda.empty_cache()
        record.write(results)

    for name in SHAPES:
        kept(name, partial(shape, record, name, device))
    kept("hand-off over CUDA IPC", lambda: hand_off(record, device))
    if tests is not None:
        record.notes["contract tests"] = tests()
    for name, config in SHAPES.items():
        kept(f"{name}, beside transformers", partial(beside, record, name, config, device))


def contract_tests(files: Sequence[str] = CONTRACTS, limit_s: float = CONTRACTS_S) -> str:
    """How the tests that are marked ``gpu`` ended."""
    where = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    try:
        code = subprocess.run(command, cwd=where, check=False, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {limit_s:g} s"
    return "passed" if code == 0 else f"exit status {code}"


def part(missing: list[str], name: str, measure: Callable[[], object]) -> None:
    """One part; what it raises is why it was not measured."""
    try:
        measure()
    except Exception as error:  # the other parts do not depend on this one
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        missing.append(f"{name}: {type(error).__name__}: {first}")


def table(record: Record) -> None:
    print(f"\n{record.notes['device']}, torch {torch.__version__}, {record.made.at:%Y-%m-%d}")
    print(f"  contract tests: {record.notes['contract tests']}")
    for line in record.lines:
        print(f"  {line.text()}")
    for name in record.notes["not measured"]:
        print(f"  not measured: {name}")


def shape(record: Record, name: str, device: torch.device) -> None:
    model = random_model(SHAPES[name], device)
    most = max(PROMPT, max(STREAMS) * (CONTEXT + 16))
    bench = bench_model(model, most, max(STREAMS))
    record.notes[f"{name}: how"] = bench.notes
    for streams in STREAMS:
        decode(record, name, bench, streams, CONTEXT)
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


def copy_rate(device: torch.device) -> Callable[[], float]:
    """Bytes/s that a copy on the device reads and writes, together."""
    size = COPIED
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: 2 * size / timed(device, lambda: target.copy_(source))


def decode(record: Record, name: str, bench: Bench, streams: int, context: int) -> None:
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


def prefill(record: Record, name: str, bench: Bench, tokens: int) -> None:
    """Rate of the linear layers' products alone, beside one large product's."""
    device, model = bench.loaded.device, bench.loaded.model
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    work = 2 * tokens * sum(m.weight.numel() for m in linears if m is not head)
    rows = bench.rows([tokens], [tokens])
    matrix = MATRIX
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
    device: torch.device,
    streams: int = PEER_STREAMS,
    prompt: int = PEER_PROMPT,
    tokens: int = PEER_ANSWER,
) -> None:
    """Tokens/s of whole answers, ours and transformers' continuous batching, on equal weights."""
    theirs = random_model(config, device)
    theirs.set_attn_implementation("sdpa")
    record.notes[f"{name}: transformers' attention"] = theirs.config._attn_implementation
    library: Any = transformers
    wanted = library.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    draw = np.random.default_rng(record.seed)
    # What it sets up takes seconds, and is not to be set up again for each batch.
    lasting = "persistent_manager" in inspect.signature(theirs.generate_batch).parameters
    more = {"persistent_manager": True} if lasting else {}
    record.notes[f"{name}: transformers keeps its manager"] = lasting

    def batched() -> float:
        # No two alike: it may share what prompts begin with, also those of a turn before.
        prompts = draw.integers(5, 1000, (streams, prompt)).tolist()
        answers = theirs.generate_batch(prompts, generation_config=wanted, **more)
        return streams * tokens / seconds_of(list(answers.values()), streams, tokens)

    model = random_model(config, device)
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
        if lasting:
            theirs.destroy_cached_continuous_batching_manager()
    what = f"{name}, {streams} streams, {prompt} in, {tokens} out"
    for way, rates in found.items():
        record.value(f"{what}: {way}", "tokens/s", rates)
    record.ratio(f"{what}: ours / transformers", found["ours"], found["transformers"], Goal(3.0))


def seconds_of(answers: Sequence[Any], count: int, tokens: int) -> float:
    """From a batch's first work to its last token, by the peer's own clock.

    Its set-up before and its end after, a second and more on a CPU, are no work on tokens.
    RuntimeError when it did less than it was asked for: its failures are hidden.
    """
    whole = [a for a in answers if not a.error and len(a.generated_tokens) == tokens]
    if len(whole) < count:
        errors = {str(answer.error) for answer in answers if answer.error}
        told = f": {', '.join(sorted(errors))}" if errors else ""
        raise RuntimeError(f"{len(whole)} of {count} answers are whole{told}")
    begun, ended = (min(a.lifespan[0] for a in whole), max(a.lifespan[1] for a in whole))
    if not 0 <= begun < ended:
        raise RuntimeError(f"answers began at {begun:g} and ended at {ended:g} by the peer's clock")
    return float(ended - begun)


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
