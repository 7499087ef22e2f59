"""vLLM's engine, stepped by hand: ``python vllm_engine.py MODEL_FOLDER``, in its environment."""

from __future__ import annotations

import importlib
import os
import sys
import time

from turns import Seen, Turn, seen, take_turns  # type: ignore[import-not-found]


def main(folder: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    saved = os.dup(1)
    os.dup2(2, 1)
    vllm = importlib.import_module("vllm")
    began = time.perf_counter()
    engine = vllm.LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    ).llm_engine

    def answer(turn: Turn) -> Seen:
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=turn.tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        times: dict[str, list[float]] = {}
        for index, prompt in enumerate(turn.prompts()):
            name = f"{turn.seed}-{index}"
            times[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                own = times[output.request_id]
                own += [now] * (len(output.outputs[0].token_ids) - len(own))
        return seen(began, list(times.values()))

    os.dup2(saved, 1)
    loading = f"{time.perf_counter() - began:.1f}"
    take_turns(answer, {"engine": f"vLLM {vllm.__version__}", "loading_s": loading})


if __name__ == "__main__":
    main(sys.argv[1])
