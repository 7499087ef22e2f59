"""The engines' five shapes as whole runs over HTTP: our cluster beside vLLM's server.

Each shape is one burst of requests, from the first byte sent to the last token received; prompts
come once. Rates count prompt tokens where one token is answered, else answered tokens. Ours runs as
one prefill and one decode worker, and as one mixed worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np

from bench.engines import SHAPES, Shape
from bench.live import prompt_ids
from bench.record import Goal, Record, interleaved
from bench.served import POOLS, Server, burst, served


def run() -> Record:
    record = Record("servers", seed=int.from_bytes(os.urandom(3), "big"))
    seeds = itertools.count(record.seed)
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(served(name)) for name in (*POOLS, "vllm")}
        for shape in SHAPES:
            cases = {name: _case(server, shape, seeds) for name, server in running.items()}
            rates = interleaved(cases)
            for name, repeats in rates.items():
                record.value(f"{shape.name}: {name}", "tokens/s", repeats)
            for name in POOLS:
                record.ratio(f"{shape.name}: {name} / vllm", rates[name], rates["vllm"], Goal(1.0))
    return record


def _case(server: Server, shape: Shape, seeds: Iterator[int]) -> Callable[[], float]:
    def turn() -> float:
        rng = np.random.default_rng(next(seeds))
        prompts = [prompt_ids(shape.prompt, rng) for _ in range(shape.streams)]
        with server.turn():
            samples = asyncio.run(burst(server.target, prompts, shape.tokens))
        counted = shape.prompt if shape.tokens == 1 else shape.tokens
        return shape.streams * counted / max(sample.end_s for sample in samples)

    return turn
