"""The native kernel and the gathering reference against attention that is spelled out in full."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdserve.engine.attention import PagedAttention, paged_attention
from pdserve.engine.layout import LayerShape, block_layout
from pdserve.engine.plan import plan_step
from pdserve.engine.pool_view import PoolView, pool_view
from pdserve.engine.step import Row
from tests.engine.model_world import kernel

DTYPES = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
# start and length of each row of a step: fresh and grown prompts, decode rows, borders of blocks
ROWS = ((0, 1), (0, 37), (31, 1), (32, 1), (33, 1), (20, 25), (150, 1), (64, 8), (15, 3))


def spelled_out(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """float64 attention of one row, query by query: [T, H, value_size]."""
    heads, count, _ = query.shape
    group = heads // keys.shape[0]
    out = torch.empty(count, heads, values.shape[2], dtype=torch.float64)
    for t in range(count):
        last = start + t
        first = max(0, last - window + 1) if window else 0
        for h in range(heads):
            scores = keys[h // group, first : last + 1] @ query[h, t] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, h] = torch.softmax(scores, 0) @ values[h // group, first : last + 1]
    return out


class Scene:
    """Random keys and values of several rows; what precedes a row is in the pool already."""

    def __init__(self, dtype: str, block_size: int, shape: LayerShape, heads: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        layout = block_layout(block_size, dtype, (shape, shape, shape))
        needs = [layout.blocks_for(start + count) for start, count in ROWS]
        order = np.random.default_rng(seed).permutation(sum(needs) + 3).astype(np.int32)
        self.tables = np.split(order[: sum(needs)], np.cumsum(needs)[:-1])
        self.pool: PoolView = pool_view(
            torch.zeros((sum(needs) + 3, layout.span_bytes), dtype=torch.uint8), layout
        )
        # Any read beside what was written shows as NaN.
        self.pool.blocks.fill_(float("nan"))
        kind = self.pool.blocks.dtype

        def rand(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64).to(kind)

        self.keys = [rand(shape.heads, s + n, shape.key_size) for s, n in ROWS]
        self.values = [rand(shape.heads, s + n, shape.value_size) for s, n in ROWS]
        self.queries = [rand(heads, n, shape.key_size) for _, n in ROWS]
        view = self.pool.layers[1]
        for (start, _), table, keys, values in zip(
            ROWS, self.tables, self.keys, self.values, strict=True
        ):
            for at in range(start):
                view.keys[table[at // block_size], at % block_size] = keys[:, at]
                view.values[table[at // block_size], at % block_size] = values[:, at]

    def attend(self, native: bool, scale: float, window: int, softcap: float) -> torch.Tensor:
        modules = [torch.nn.Module() for _ in range(3)]
        attention = PagedAttention(modules, self.pool, kernel() if native else None)
        rows = [
            Row([1] * count, start, table)
            for (start, count), table in zip(ROWS, self.tables, strict=True)
        ]
        block_size = self.pool.layout.block_size

        def line(parts: list[torch.Tensor]) -> torch.Tensor:
            new = [p[:, -count:] for p, (_, count) in zip(parts, ROWS, strict=True)]
            # As models hand it over: [1, heads, T, size], with tokens outermost in memory.
            packed = torch.cat(new, 1).transpose(0, 1).contiguous()
            return packed.transpose(0, 1)[None]

        with attention.step(plan_step(rows, block_size, attention.short_limit)):
            out, _ = paged_attention(
                modules[1],
                line(self.queries),
                line(self.keys),
                line(self.values),
                None,
                scaling=scale,
                sliding_window=window or None,
                softcap=softcap or None,
            )
        return out[0]

    def expected(self, scale: float, window: int, softcap: float) -> torch.Tensor:
        return torch.cat(
            [
                spelled_out(q.double(), k.double(), v.double(), start, scale, window, softcap)
                for q, k, v, (start, _) in zip(
                    self.queries, self.keys, self.values, ROWS, strict=True
                )
            ]
        )


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("native", [True, False], ids=["native", "gather"])
@pytest.mark.parametrize(
    ("heads", "shape"),
    [
        (9, LayerShape(3, 64, 64)),
        (4, LayerShape(4, 128, 128)),
        (6, LayerShape(2, 12, 12)),
        (8, LayerShape(1, 16, 24)),
    ],
    ids=["gqa64", "mha128", "gqa12", "mqa16-24"],
)
def test_attention_over_the_pool(dtype: str, native: bool, heads: int, shape: LayerShape) -> None:
    seed = 1000 + heads
    print(f"seed {seed}")
    for block_size in (4, 16, 96):
        for window, softcap in ((0, 0.0), (24, 0.0), (0, 5.0), (7, 2.0)):
            scene = Scene(dtype, block_size, shape, heads, seed)
            scale = 0.7 * shape.key_size**-0.5
            found = scene.attend(native, scale, window, softcap).double()
            expected = scene.expected(scale, window, softcap)
            error = float((found - expected).abs().max())
            assert error <= DTYPES[dtype] * 4, (block_size, window, softcap, error)


def test_both_paths_leave_the_same_pool() -> None:
    shape = LayerShape(2, 16, 24)
    pools = []
    for native in (True, False):
        scene = Scene("float32", 16, shape, 4, 7)
        scene.attend(native, 0.2, 0, 0.0)
        pools.append(scene.pool.blocks.clone())
    assert torch.equal(pools[0].isnan(), pools[1].isnan())
    assert torch.equal(pools[0].nan_to_num(), pools[1].nan_to_num())
    assert bool(pools[0].isnan().any()), "blocks that belong to no row were written"


def test_a_token_s_result_depends_on_no_other_row() -> None:
    """Decode results are bit-equal alone and in a batch, on one thread and on several."""
    scene = Scene("float32", 16, LayerShape(3, 64, 64), 9, 5)
    batch = scene.attend(True, 0.125, 0, 0.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(scene.attend(True, 0.125, 0, 0.0), batch)
    finally:
        torch.set_num_threads(threads)


def test_large_scores_do_not_overflow() -> None:
    scene = Scene("float32", 16, LayerShape(3, 64, 64), 9, 6)
    scene.queries = [q * 1e4 for q in scene.queries]
    found = scene.attend(True, 1.0, 0, 0.0).double()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, scene.expected(1.0, 0, 0.0), atol=1e-5, rtol=1e-4)
