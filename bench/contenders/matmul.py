"""No engine, a ceiling: only a prompt's matrix products, on weights that oneDNN packed.

``python matmul.py MODEL_FOLDER``. All linear layers but the output one, each with weights of its
own, over the prompts' tokens, 256 rows at a time; nothing between them, and nothing is attended. In
bfloat16 or float32, whichever this processor multiplies faster.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from turns import Seen, Turn, take_turns  # type: ignore[import-not-found]

from pdserve.engine.linear import PackedLinear, onednn_packs

ROWS = 256
DTYPES = (torch.bfloat16, torch.float32) if onednn_packs() else (torch.float32,)
Products = Callable[[], None]


def _products(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Products:
    """The products of ROWS rows with a weight of each of these shapes (inputs, outputs)."""
    linears = [PackedLinear(torch.nn.Linear(a, b, bias=False, dtype=dtype)) for a, b in shapes]
    inputs = {a: torch.randn(ROWS, a, dtype=dtype) for a in {a for a, _ in shapes}}

    def products() -> None:
        with torch.inference_mode():
            for linear in linears:
                linear(inputs[linear.in_features])

    return products


def timed(products: Products) -> float:
    products()
    began = time.perf_counter()
    products()
    return time.perf_counter() - began


def main(folder: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.AutoConfig.from_pretrained(folder)
    width, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query, key = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = [(width, query), (width, key), (width, key), (query, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    dtype = min(DTYPES, key=lambda each: timed(_products(shapes, each)))
    products = _products(shapes * config.num_hidden_layers, dtype)

    def answer(turn: Turn) -> Seen:
        began = time.perf_counter()
        for _ in range(turn.streams * turn.prompt // ROWS):
            products()
        return Seen(time.perf_counter() - began, 0.0, 0)

    take_turns(answer, {"engine": f"matrix products alone, packed by oneDNN, {dtype}"})


if __name__ == "__main__":
    main(sys.argv[1])
