"""Long rows in one call: the same as row by row, by a plain function of varlen_attn's signature."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from pdserve.engine.attention import PagedAttention, paged_attention
from pdserve.engine.layout import LayerShape
from pdserve.engine.plan import plan_step
from pdserve.engine.step import Row
from pdserve.engine.triton_layer import TritonKernels
from pdserve.engine.varlen import grouped, load_varlen
from tests.engine.test_attention import ROWS, Scene, spelled_out


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    assert window_size[1] == 0
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    parts = []
    for row in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[row] : cu_seq_q[row + 1]].transpose(0, 1).double()
        here = slice(int(cu_seq_k[row]), int(cu_seq_k[row + 1]))
        k, v = (x[here].transpose(0, 1).double() for x in (key, value))
        parts.append(spelled_out(q, k, v, k.shape[1] - q.shape[1], scale, window_size[0] + 1, 0.0))
    return torch.cat(parts).to(query.dtype)


class PlainKernels(TritonKernels):
    """Every row is long, and what the layer's kernel would write is written by torch."""

    short_limit = 0

    def layer(self, pool: object, span: object) -> object:  # type: ignore[override]
        def write(step, query, key, value, out, scale, window, softcap) -> None:  # type: ignore[no-untyped-def]
            where = (step.slot_blocks, step.slot_offsets)
            view = pool.layers[1]  # type: ignore[attr-defined]
            view.keys[where], view.values[where] = key.transpose(0, 1), value.transpose(0, 1)

        return write


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("fresh", [False, True], ids=["grown", "fresh"])
def test_it_is_the_same_as_row_by_row(window: int, fresh: bool) -> None:
    called = []

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        called.append(arguments)
        return plain_varlen(*arguments, **options)  # type: ignore[arg-type]

    scene = Scene("float32", 16, LayerShape(2, 16, 16), 4, 77)
    chosen = [i for i, (start, _) in enumerate(ROWS) if not start or not fresh]
    rows = [Row([1] * ROWS[i][1], ROWS[i][0], scene.tables[i]) for i in chosen]
    modules = [torch.nn.Module() for _ in range(3)]
    attention = PagedAttention(modules, scene.pool, PlainKernels(None, counted))

    def line(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([parts[i][:, -ROWS[i][1] :] for i in chosen], 1)[None]

    new = (line(part) for part in (scene.queries, scene.keys, scene.values))
    with attention.step(plan_step(rows, 16, attention.short_limit)):
        found, _ = paged_attention(modules[1], *new, None, scaling=0.2, sliding_window=window)
    expected = torch.cat(
        [
            spelled_out(
                scene.queries[i].double(),
                scene.keys[i].double(),
                scene.values[i].double(),
                ROWS[i][0],
                0.2,
                window,
                0.0,
            )
            for i in chosen
        ]
    )
    assert len(called) == 1, "all rows in one call"
    assert float((found[0].double() - expected).abs().max()) < 1e-5


def test_a_soft_cap_goes_row_by_row() -> None:
    def never(*arguments: object, **options: object) -> torch.Tensor:
        raise AssertionError("it has no soft cap")

    scene = Scene("float32", 16, LayerShape(2, 16, 16), 4, 78)
    modules = [torch.nn.Module() for _ in range(3)]
    attention = PagedAttention(modules, scene.pool, PlainKernels(None, never))
    row = Row([1] * 37, 0, scene.tables[1])
    parts = (x[1][None] for x in (scene.queries, scene.keys, scene.values))
    with attention.step(plan_step([row], 16, 0)):
        found, _ = paged_attention(modules[1], *parts, None, scaling=0.2, softcap=5.0)
    expected = spelled_out(
        scene.queries[1].double(), scene.keys[1].double(), scene.values[1].double(), 0, 0.2, 0, 5.0
    )
    assert float((found[0].double() - expected).abs().max()) < 1e-5


def test_torch_s_function_takes_what_it_is_given() -> None:
    parameters = inspect.signature(varlen_attn).parameters
    assert set(inspect.signature(plain_varlen).parameters) <= set(parameters)
    assert list(parameters)[:7] == list(inspect.signature(plain_varlen).parameters)[:7]
    cuda = torch.device("cuda")
    found = load_varlen(cuda, torch.bfloat16)
    assert isinstance(found, partial)
    assert found.func is varlen_attn
    assert found.keywords == {"enable_gqa": True}
    assert load_varlen(cuda, torch.float32) is None
    assert load_varlen(torch.device("cpu"), torch.bfloat16) is None


def test_an_older_torch_is_not_told_of_shared_heads() -> None:
    """Until 2.11 it has no word for them, and refuses one that it does not know."""

    def older(query: object, *, scale: float, window_size: tuple[int, int]) -> None: ...
    def oldest(query: object, *, is_causal: bool) -> None: ...

    assert grouped(older) is older
    assert grouped(oldest) is None
