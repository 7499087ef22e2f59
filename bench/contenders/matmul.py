"""No engine, a ceiling: only a prompt's matrix products, on weights that oneDNN packed.

``python matmul.py MODEL_FOLDER``. All linear layers but the output one, each with weights of its
own, over the prompts' tokens, 256 rows at a time; nothing between them, and nothing is attended.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import transformers
from turns import Seen, Turn, take_turns  # type: ignore[import-not-found]

from pdserve.engine.linear import PackedLinear

ROWS = 256


def main(folder: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.AutoConfig.from_pretrained(folder)
    width, inner = config.hidden_size, config.intermediate_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    query, key = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = [(width, query), (width, key), (width, key), (query, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    linears = [
        PackedLinear(torch.nn.Linear(a, b, bias=False, dtype=torch.bfloat16))
        for _ in range(config.num_hidden_layers)
        for a, b in shapes
    ]
    inputs = {a: torch.randn(ROWS, a, dtype=torch.bfloat16) for a in {a for a, _ in shapes}}

    def answer(turn: Turn) -> Seen:
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(turn.streams * turn.prompt // ROWS):
                for linear in linears:
                    linear(inputs[linear.in_features])
        return Seen(time.perf_counter() - began, 0.0, 0)

    take_turns(answer, {"engine": "matrix products alone, packed by oneDNN"})


if __name__ == "__main__":
    main(sys.argv[1])
