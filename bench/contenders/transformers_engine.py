"""transformers' ``generate`` on one batch: ``python transformers_engine.py MODEL_FOLDER``."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import transformers
from turns import Seen, Turn, seen, take_turns  # type: ignore[import-not-found]


class _Clock(transformers.StoppingCriteria):
    """Never stops; notes when it was asked, which is after every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main(folder: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def answer(turn: Turn) -> Seen:
        prompts = torch.tensor(turn.prompts())
        clock = _Clock()
        began = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=turn.tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        return seen(began, [clock.times] * turn.streams)

    take_turns(answer, {"engine": f"transformers {transformers.__version__}, generate"})


if __name__ == "__main__":
    main(sys.argv[1])
