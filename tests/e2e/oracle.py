"""The oracle: what one process running the model alone writes (transformers' ``generate``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    margin: float  # smallest distance between the two best logits on the way


class Oracle:
    """One model in this process; answers are kept."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model.eval()
        self._answers: dict[tuple[tuple[int, ...], int], Answer] = {}

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.vocab_size)

    def greedy(self, prompt: tuple[int, ...], max_tokens: int) -> Answer:
        key = (prompt, max_tokens)
        if key not in self._answers:
            self._answers[key] = self._generate(prompt, max_tokens)
        return self._answers[key]

    def prompt_logprobs(self, prompt: tuple[int, ...]) -> list[float]:
        """Of each token but the first, given those before it."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            logits = self._model(ids).logits[0].double()
        chosen = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])
        return [float(value) for value in chosen[:, 0]]

    def _generate(self, prompt: tuple[int, ...], max_tokens: int) -> Answer:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        margins = []
        for step in out.logits:
            best, second = step[0].double().topk(2).values.tolist()
            margins.append(best - second)
        return Answer(tuple(out.sequences[0, len(prompt) :].tolist()), min(margins))


@lru_cache(maxsize=4)
def oracle(folder: Path, dtype: str) -> Oracle:
    return Oracle(folder, dtype)
