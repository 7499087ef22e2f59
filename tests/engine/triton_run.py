"""Runs Triton's kernels on random steps and compares (test_triton_paged.py starts it)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
import torch

from pdserve.engine import triton_paged
from pdserve.engine.decode_graph import cuda_capture, graph_sizes
from pdserve.engine.device_plan import DevicePlan, pack_plan, packed_size
from pdserve.engine.layout import LayerShape, block_layout
from pdserve.engine.plan import plan_step
from pdserve.engine.pool_view import pool_view
from pdserve.engine.runner import ModelRunner
from pdserve.engine.step import Row
from pdserve.engine.triton_layer import TritonKernels
from tests.engine.model_world import drive, family_model, generate
from tests.engine.test_attention import spelled_out
from tests.models import VOCAB

# Tolerances are of the kinds' own rounding, as for the native kernel.
KINDS = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 8e-3}
CONTEXTS = (1, 4, 5, 63, 64, 65, 150)


def check(
    kind: str, block: int, heads: int, shape: LayerShape, window: int, softcap: float, device: str
) -> float:
    """The largest error of a step of single tokens, padded to more."""
    draw = torch.Generator().manual_seed(heads * block)
    layout = block_layout(block, kind, (shape, shape))
    needs = [layout.blocks_for(context) for context in CONTEXTS]
    order = np.random.default_rng(3).permutation(sum(needs) + 2).astype(np.int32)
    tables = np.split(order[: sum(needs)], np.cumsum(needs)[:-1])
    memory = torch.zeros((sum(needs) + 2, layout.span_bytes), dtype=torch.uint8)
    pool = pool_view(memory.to(device), layout)
    pool.blocks.fill_(float("nan"))  # what is read beside what was written shows
    dtype = pool.blocks.dtype

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw).to(dtype)

    keys = [rand(shape.heads, context, shape.key_size) for context in CONTEXTS]
    values = [rand(shape.heads, context, shape.value_size) for context in CONTEXTS]
    view = pool.layers[1]
    for context, table, key, value in zip(CONTEXTS, tables, keys, values, strict=True):
        for at in range(context - 1):
            view.keys[int(table[at // block]), at % block] = key[:, at].to(device)
            view.values[int(table[at // block]), at % block] = value[:, at].to(device)
    queries = rand(heads, len(CONTEXTS), shape.key_size)
    rows = [Row([1], c - 1, table) for c, table in zip(CONTEXTS, tables, strict=True)]
    plan = plan_step(rows, block, 1)
    size = len(CONTEXTS) + 3
    packed = pack_plan(plan, size)
    assert len(packed) == packed_size(size, size, plan.tables.size)
    padded = torch.full((heads, 3, shape.key_size), 7.0, dtype=dtype)
    fresh = [torch.stack([p[:, -1] for p in part], 1) for part in (keys, values)]
    more = [torch.full((shape.heads, 3, p.shape[2]), 7.0, dtype=dtype) for p in fresh]
    line = [torch.cat([a, b], 1).to(device) for a, b in zip(fresh, more, strict=True)]
    untouched = pool.blocks.isnan().sum()
    out = torch.full((size, heads, shape.value_size), 9.0, dtype=dtype, device=device)
    layer = TritonKernels(triton_paged).layer(pool, layout.layers[1])
    step = DevicePlan(torch.from_numpy(packed).to(device), size, size)
    scale = 0.7 * shape.key_size**-0.5
    query = torch.cat([queries, padded], 1).to(device)
    layer(step, query, line[0], line[1], out, scale, window, softcap)
    written = len(CONTEXTS) * shape.heads * (shape.key_size + shape.value_size)
    assert int(untouched - pool.blocks.isnan().sum()) == written, "padding wrote, or KV was lost"
    assert not out[len(CONTEXTS) :].any(), "a token that sees no key gets zeros"
    expected = torch.cat(
        [
            spelled_out(
                queries[:, i : i + 1].double(),
                k.double(),
                v.double(),
                c - 1,
                scale,
                window,
                softcap,
            )
            for i, (c, k, v) in enumerate(zip(CONTEXTS, keys, values, strict=True))
        ]
    )
    return float((out[: len(CONTEXTS)].double().cpu() - expected).abs().max())


def replayed_model(device: str) -> int:
    """How many sequences differ from ``generate`` when decode steps are replayed; a tiny model."""
    loaded = family_model("llama", "float32")
    if device != "cpu":
        loaded = dataclasses.replace(
            loaded, device=torch.device(device), model=loaded.model.to(device)
        )
    layout = block_layout(16, "float32", loaded.shapes)
    memory = torch.zeros((24, layout.span_bytes), dtype=torch.uint8, device=device)
    runner = ModelRunner(loaded, pool_view(memory, layout), TritonKernels(triton_paged))
    captured, replayed = [], []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)

        def replay() -> None:
            replayed.append(run)
            run()

        return replay

    runner.use_graphs(capture if device == "cpu" else cuda_capture(loaded.device), 4)
    draw = np.random.default_rng(4)
    prompts = [draw.integers(5, VOCAB, count).tolist() for count in (3, 16, 40)]
    tracks = drive(runner, prompts, 4, 16, (64,))
    if device == "cpu":
        assert len(captured) == len(graph_sizes(4)), "every size, before any step"
        assert replayed == [captured[0]] * 3, "three rows, so the largest; four tokens each"
    wrong = 0
    for prompt, track in zip(prompts, tracks, strict=True):
        expected, margin = generate("llama", prompt, 4)
        print(f"{len(prompt)} tokens: {track.generated}, {expected}, smallest margin {margin:.2g}")
        wrong += track.generated != expected
    return wrong


def main(device: str) -> int:
    failed = 0
    cases = [
        ("float32", 16, 6, LayerShape(2, 64, 64), 0, 0.0),
        ("float32", 4, 4, LayerShape(4, 12, 24), 24, 0.0),
        ("float32", 96, 8, LayerShape(1, 16, 16), 0, 5.0),
        ("float32", 16, 4, LayerShape(2, 16, 16), 7, 2.0),
        ("bfloat16", 16, 8, LayerShape(2, 32, 32), 0, 0.0),
        ("float16", 16, 4, LayerShape(2, 128, 128), 70, 0.0),
        ("bfloat16", 16, 8, LayerShape(2, 128, 128), 0, 0.0),  # as the models that are measured
    ]
    if device == "cpu":
        cases = [case for case in cases if case[0] != "bfloat16"]  # the interpreter has none
    for case in cases:
        error = check(*case, device)
        good = error <= KINDS[case[0]]
        failed += not good
        print(f"{case}: {error:.2g}{'' if good else ' WRONG'}", flush=True)
    failed += replayed_model(device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
