"""Promise 1 with quantized weights: a separated cluster writes what one process writes.

``exact``: against the model as transformers runs it, its weights replaced by the dequantized ones.
``fast``: in the kernels that multiply with codes, against a runner in this process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pdserve.engine.model import load_model
from pdserve.engine.quantized import Quantization, can_quantize, dequantize, quantize
from pdserve.types import Numerics
from tests.e2e.clusters import BLOCK, CHUNK, SMOLLM2, Clusters, Variant
from tests.e2e.oracle import Oracle
from tests.engine.model_world import CPU, drive, kernel, running

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("PDSERVE_TEST_SEED", "20"))
PROMPTS = (1, BLOCK + 1, 3 * CHUNK + 5)
ROOM = 16


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    return [tuple(draw.randrange(5, vocab_size) for _ in range(length)) for length in PROMPTS]


def answers(clusters: Clusters, variant: Variant, asked: Sequence[tuple[int, ...]]) -> list[object]:
    cluster = clusters.get(variant)
    found = []
    for prompt in asked:
        answer = cluster.caller.ask(prompt, ROOM)
        assert answer.usage.kv_bytes_transferred > 0
        found.append(answer.tokens)
    cluster.check_idle()
    return found


def test_exact_numerics_serve_the_dequantized_weights(clusters: Clusters) -> None:
    oracle = Oracle(clusters.model("llama"), "float64")
    plain = [oracle.greedy(prompt, ROOM).tokens for prompt in prompts(oracle.vocab_size)]
    oracle = Oracle(clusters.model("llama"), "float64")
    with torch.no_grad():
        for layer in oracle._model.modules():
            if type(layer) is nn.Linear and can_quantize(layer):
                layer.weight.copy_(dequantize(quantize(layer.weight, 4)))
    asked = prompts(oracle.vocab_size)
    expected = [oracle.greedy(prompt, ROOM).tokens for prompt in asked]
    assert expected != plain, "these weights change nothing, so this would prove nothing"
    variant = Variant("llama", "shm", "roomy", settings=("model.quantization=int4",))
    assert answers(clusters, variant, asked) == expected


def test_the_kernels_write_the_same_tokens_on_both_sides_of_a_hand_off(clusters: Clusters) -> None:
    settings = ("model.numerics=fast", "model.dtype=auto", "model.quantization=int8")
    variant = Variant(SMOLLM2, "tcp", "roomy", settings=settings)
    asked = prompts(49_000)
    assert answers(clusters, variant, asked) == one_process(clusters.model(SMOLLM2), asked)


def one_process(folder: Path, asked: Sequence[tuple[int, ...]]) -> list[object]:
    loaded = load_model(
        folder,
        dtype="bfloat16",
        numerics=Numerics.FAST,
        device=CPU,
        quantization=Quantization.INT8,
        library=kernel(),
    )
    found = []
    with running(loaded, BLOCK, 64, kernel()) as runner:
        for prompt in asked:
            (track,) = drive(runner, [prompt], ROOM, BLOCK, (CHUNK,))
            found.append(tuple(track.generated))
    return found
