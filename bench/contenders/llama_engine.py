"""llama.cpp, one stream: ``python llama_engine.py FILE.gguf``, in its environment."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from turns import Seen, Turn, seen, take_turns  # type: ignore[import-not-found]


def main(file: str) -> None:
    llama: Any = importlib.import_module("llama_cpp")
    numpy: Any = importlib.import_module("numpy")
    threads = len(os.sched_getaffinity(0))
    model = llama.Llama(
        model_path=file,
        n_ctx=2048,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=False,
        verbose=False,
    )
    vocabulary = model.n_vocab()

    def step(tokens: Sequence[int]) -> int:
        line = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(model.ctx, llama.llama_batch_get_one(line, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = llama.llama_get_logits_ith(model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def answer(turn: Turn) -> Seen:
        if turn.streams != 1:
            raise ValueError(f"streams is {turn.streams}: this runs one")
        (prompt,) = turn.prompts()
        llama.llama_memory_clear(llama.llama_get_memory(model.ctx), True)
        times = []
        began = time.perf_counter()
        following = prompt
        for _ in range(turn.tokens):
            following = [step(following)]
            times.append(time.perf_counter())
        return seen(began, [times])

    take_turns(answer, {"engine": f"llama.cpp (llama-cpp-python {llama.__version__})"})


if __name__ == "__main__":
    main(sys.argv[1])
