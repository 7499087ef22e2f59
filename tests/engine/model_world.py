"""What the model half's tests share: families on disk, the native kernel, a plain scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pdserve.engine.layout import block_layout
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.native import load_native
from pdserve.engine.pool_view import pool_view
from pdserve.engine.runner import ModelRunner
from pdserve.engine.step import Row, RowResult, SamplerState
from pdserve.engine.turns import Turn
from pdserve.types import Numerics, Sampling
from tests.models import lasting_folder, tiny_model

GREEDY = Sampling(max_tokens=64, temperature=0.0)
CPU = torch.device("cpu")


# Kernels differ by what the processor multiplies (kernels/vectors.h); one can build its lessers'.
HERE = "this processor"
PROCESSORS: Mapping[str, tuple[str, ...]] = {
    HERE: (),
    "BF16 dot product, emulated": ("-DEMULATE_BF16_DOT",),
    "AVX-512 without BF16": ("-mno-avx512bf16",),
    "AVX2": ("-mno-avx512f",),
}


@cache
def kernel_folder() -> Path:
    """Holds the native kernels that were built; what looks for them here builds none again."""
    return lasting_folder("kernel")


@cache
def kernel(processor: str = HERE) -> CDLL:
    """The native kernel, built once for the test run."""
    loading = load_native(kernel_folder(), PROCESSORS[processor])
    assert loading.kernels is not None, loading.reason
    return loading.kernels


@cache
def family_folder(family: str, seed: int = 3) -> Path:
    return tiny_model(family, lasting_folder(family), seed)


@cache
def family_model(family: str, dtype: str = "float64") -> LoadedModel:
    return load_model(family_folder(family), dtype=dtype, numerics=Numerics.EXACT, device=CPU)


@cache
def oracle(family: str) -> Any:
    """The family's model as anybody would load it, without a token that ends a sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        family_folder(family), dtype=torch.float64
    )
    model.generation_config.eos_token_id = None
    return model


def generate(family: str, prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """``count`` greedy tokens, and the smallest margin between the two best logits on the way."""
    out = oracle(family).generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = torch.stack(out.scores)[:, 0].topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    return out.sequences[0, len(prompt) :].tolist(), margin


@contextmanager
def running(
    loaded: LoadedModel,
    block_size: int,
    blocks: int,
    library: CDLL | None,
    turn: Turn | None = None,
    pin: bool = False,
) -> Iterator[ModelRunner]:
    """A runner over a pool that is full of NaN: whatever is read before it is written shows."""
    layout = block_layout(block_size, loaded.dtype, loaded.shapes)
    pool = pool_view(torch.zeros((blocks, layout.span_bytes), dtype=torch.uint8), layout)
    pool.blocks.fill_(float("nan"))
    runner = ModelRunner(loaded, pool, library, turn, pin)
    try:
        yield runner
    finally:
        runner.detach()


@dataclass
class Track:
    """One sequence on its way through ``drive``."""

    tokens: list[int]  # prompt, then what was generated
    sampler: SamplerState
    table: np.ndarray[Any, np.dtype[np.int32]]
    computed: int = 0
    results: list[RowResult] = field(default_factory=list)
    prompt_len: int = 0

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_len :]


def drive(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    count: int,
    block_size: int,
    chunks: Sequence[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[Track]:
    """Generates ``count`` tokens for every prompt, all together, by the barest of schedulers.

    Sequence i reads its prompt in pieces of ``chunks[(i + piece) % len(chunks)]`` tokens, so that
    prompts and answers mix in one step; blocks are dealt out in random order.
    """
    needs = [-(-(len(prompt) + count) // block_size) for prompt in prompts]
    order = np.random.default_rng(seed).permutation(sum(needs)).astype(np.int32)
    tables = np.split(order, np.cumsum(needs)[:-1])
    tracks = [
        Track(
            list(prompt),
            runner.open_sampler(sampling, list(prompt), len(prompt)),
            table,
            prompt_len=len(prompt),
        )
        for prompt, table in zip(prompts, tables, strict=True)
    ]
    piece = 0
    while busy := [track for track in tracks if len(track.generated) < count]:
        rows = []
        for index, track in enumerate(busy):
            size = min(len(track.tokens) - track.computed, chunks[(index + piece) % len(chunks)])
            end = track.computed + size
            rows.append(
                Row(
                    tokens=track.tokens[track.computed : end],
                    start=track.computed,
                    block_table=track.table,
                    sampler=track.sampler if end == len(track.tokens) else None,
                )
            )
            track.computed = end
        for track, result in zip(busy, runner.step(rows), strict=True):
            if result.token is not None:
                track.results.append(result)
                track.tokens.append(result.token.token_id)
                track.sampler.append(result.token.token_id)
        piece += 1
    return tracks
