"""The fused decoder computes what transformers' own layers compute, whatever a step is made of.

The reference is the same checkpoint through transformers' layers in float64 over a pool of the same
shape. A fused step rounds to bfloat16 where the layers do, so what is compared is how far each of
both bfloat16 ways lies from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pdserve.engine.fused import why_not_fused
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.probe import relative_difference
from pdserve.engine.step import Row
from pdserve.engine.tiles import PANEL, TiledLinear, pack, tiles_work
from pdserve.types import Numerics
from tests.engine.model_world import (
    CPU,
    HERE,
    PROCESSORS,
    drive,
    family_folder,
    kernel,
    running,
)
from tests.models import VOCAB, lasting_folder, randomize, write_tokenizer

pytestmark = pytest.mark.skipif(
    not tiles_work(kernel()), reason="this processor has neither AVX-512 nor AVX2, or has AMX"
)
every_processor = pytest.mark.parametrize("processor", list(PROCESSORS))
BLOCK = 16
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
    "eos_token_id": 1,
}
SHAPES = {
    "llama, 3 heads of 32 under 1": lambda: transformers.LlamaConfig(
        **_COMMON, num_attention_heads=3, num_key_value_heads=1
    ),
    "llama, 6 heads of 64 under 2, tied": lambda: transformers.LlamaConfig(
        **_COMMON,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama, scaled rotation": lambda: transformers.LlamaConfig(
        **_COMMON,
        num_attention_heads=3,
        num_key_value_heads=3,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2, biases": lambda: transformers.Qwen2Config(
        **_COMMON, num_attention_heads=3, num_key_value_heads=3
    ),
    "qwen3, norms over heads of 128": lambda: transformers.Qwen3Config(
        **_COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=128
    ),
    "mistral without a window": lambda: transformers.MistralConfig(
        **_COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=None
    ),
}


@cache
def folder_of(name: str) -> Path:
    folder = lasting_folder("fused")
    model = transformers.AutoModelForCausalLM.from_config(SHAPES[name](), dtype=torch.float64)
    randomize(model, 17)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@cache
def loaded(name: str, kind: str, processor: str = HERE) -> LoadedModel:
    exact = kind == "exact"
    return load_model(
        folder_of(name),
        dtype="float64" if exact else "bfloat16",
        numerics=Numerics.EXACT if exact else Numerics.FAST,
        device=CPU,
        library=kernel(processor) if kind == "fused" else None,
    )


def _steps(draw: np.random.Generator) -> list[list[tuple[int, int]]]:
    """Steps of (sequence, tokens): chunks of many lengths and single tokens, mixed."""
    return [
        [(0, 61), (1, 9)],
        [(0, int(draw.integers(1, 8))), (1, 1), (2, 130)],
        [(1, int(draw.integers(9, 40))), (2, 1), (0, 1), (3, 3)],
        [(3, 1), (2, int(draw.integers(100, 300))), (1, 1)],
        [(0, 1), (1, 1), (2, 1), (3, 1)],
        [(2, 1)],
    ]


def run_steps(
    model: LoadedModel, seed: int, processor: str = HERE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all tokens of all steps, and the pool afterwards with the unwritten as NaN."""
    draw = np.random.default_rng(seed)
    steps = _steps(draw)
    tokens = draw.integers(5, VOCAB, (4, 512))
    tables = np.split(draw.permutation(4 * 32).astype(np.int32), 4)
    done, parts = [0] * 4, []
    with running(model, BLOCK, 4 * 32, kernel(processor)) as runner:
        for step in steps:
            rows = []
            for seq, count in step:
                own: Sequence[int] = tokens[seq, done[seq] : done[seq] + count].tolist()
                rows.append(Row(own, done[seq], tables[seq]))
                done[seq] += count
            parts.append(runner.logits(rows).double())
        pool = runner._pool.blocks.double().clone()
    return torch.cat(parts), pool


@every_processor
@pytest.mark.parametrize("name", list(SHAPES))
def test_fused_layers_are_as_near_to_the_truth_as_plain_ones(name: str, processor: str) -> None:
    assert why_not_fused(loaded(name, "fused", processor)) == ""
    assert why_not_fused(loaded(name, "plain")) != ""
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    exact, exact_pool = run_steps(loaded(name, "exact"), seed)
    plain, _ = run_steps(loaded(name, "plain"), seed)
    fused, fused_pool = run_steps(loaded(name, "fused", processor), seed, processor)
    assert relative_difference(fused, exact) < 1.25 * relative_difference(plain, exact) < 0.1
    worst = (fused - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(worst.max()) < 0.25, "one token lies far off"
    # What was never written stays unwritten, and nothing else does.
    assert torch.equal(fused_pool.isnan(), exact_pool.isnan())


@every_processor
def test_the_number_of_threads_and_the_batch_change_no_bit_of_a_decoded_token(
    processor: str,
) -> None:
    model = loaded("llama, 6 heads of 64 under 2, tied", "fused", processor)
    threads = torch.get_num_threads()
    prompts = [list(range(5, 5 + n)) for n in (40, 3, 77)]

    def last(count: int, which: Sequence[int]) -> torch.Tensor:
        torch.set_num_threads(count)
        with running(model, BLOCK, 32, kernel(processor)) as runner:
            for i, prompt in enumerate(prompts):
                runner.logits([Row(prompt, 0, np.arange(8 * i, 8 * i + 8, dtype=np.int32))])
            rows = [
                Row([9], len(prompts[i]), np.arange(8 * i, 8 * i + 8, dtype=np.int32))
                for i in which
            ]
            return runner.logits(rows)

    try:
        together = last(1, (0, 1, 2))
        assert torch.equal(last(2, (0, 1, 2)), together)
        assert torch.equal(last(5, (0, 1, 2)), together)
        assert torch.equal(last(2, (2,))[0], together[2])
    finally:
        torch.set_num_threads(threads)


def test_greedy_tokens_follow_the_exact_model_where_it_is_sure() -> None:
    name = "llama, 3 heads of 32 under 1"
    prompts = [list(range(5 + i, 60 + 9 * i)) for i in range(3)]
    with running(loaded(name, "exact"), BLOCK, 64, kernel()) as runner:
        right = drive(runner, prompts, 12, BLOCK, (23, 64))
    with running(loaded(name, "fused"), BLOCK, 64, kernel()) as runner:
        found = drive(runner, prompts, 12, BLOCK, (23, 64))
        assert runner.layers_note == "fused"
    same = sum(a.generated[0] == b.generated[0] for a, b in zip(right, found, strict=True))
    assert same == len(prompts)


@pytest.mark.parametrize(("n", "k"), [(64, 6), (45, 70), (1, 2)])
def test_packed_weights_lie_pair_by_pair(n: int, k: int) -> None:
    weight = torch.randn(n, 2 * k).to(torch.bfloat16)[:, :k]  # also from a slice of another
    packed = pack(weight)
    panels = -(-n // PANEL)
    assert packed.shape == (panels, k // 2, PANEL, 2)
    padded = torch.cat([weight, weight.new_zeros(panels * PANEL - n, k)])
    for panel, pair, output, odd in itertools.product(
        range(panels), range(k // 2), range(PANEL), range(2)
    ):
        found = packed[panel, pair, output, odd]
        assert found == padded[panel * PANEL + output, 2 * pair + odd]


@pytest.mark.parametrize("shape", [(64, 64), (192, 48), (5, 96), (1536, 576), (33, 2)])
@pytest.mark.parametrize("bias", [True, False])
@every_processor
def test_a_tiled_layer_equals_the_plain_one(
    shape: tuple[int, int], bias: bool, processor: str
) -> None:
    torch.manual_seed(8)
    plain = torch.nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
    tiled = TiledLinear(plain, kernel(processor))
    with torch.inference_mode():
        for rows in (1, 2, 14, 15, 31, 113, 256):
            x = torch.randn(1, rows, shape[1], dtype=torch.bfloat16)
            exact = torch.nn.functional.linear(
                x.double(), plain.weight.double(), plain.bias.double() if bias else None
            )
            error = (tiled(x).double() - exact).abs().max()
            assert tiled(x).shape == exact.shape
            assert float(error) <= float(exact.abs().max()) * 2**-8 + 2**-10
    assert torch.equal(tiled.weight, plain.weight)


def test_models_with_other_layers_run_one_by_one() -> None:
    for family in ("gemma", "gemma2", "mistral"):
        model = load_model(
            family_folder(family),
            dtype="bfloat16",
            numerics=Numerics.FAST,
            device=CPU,
            library=kernel(),
        )
        assert why_not_fused(model)
        with running(model, BLOCK, 8, kernel()) as runner:
            assert runner.layers_note.startswith("one by one, because")
            logits = runner.logits([Row([7, 8, 9], 0, np.arange(1, dtype=np.int32))])
            assert bool(logits.isfinite().all())


def test_exact_numerics_are_never_fused() -> None:
    assert "not packed" in why_not_fused(loaded("qwen2, biases", "exact"))
