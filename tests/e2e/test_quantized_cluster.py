"""Promise 1 with quantized weights: a separated cluster writes what one process writes.

``exact``: against the model as transformers runs it, its weights replaced by the dequantized ones.
``fast``: in the kernels that multiply with codes, against a runner in this process.
"""

from __future__ import annotations

import os
import random
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from pdserve.engine.model import load_model
from pdserve.engine.quantized import Quantization, can_quantize, dequantize, quantize
from pdserve.engine.quantized_linear import groups_work
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


FAST = ("model.numerics=fast", "model.dtype=auto", "model.quantization=int8")
LEAST_WAIT_S = 0.01  # to ask for a turn that nobody else has takes far less
IN_KERNELS = Variant(SMOLLM2, "tcp", "roomy", settings=FAST)


def test_the_kernels_write_the_same_tokens_on_both_sides_of_a_hand_off(clusters: Clusters) -> None:
    asked = prompts(49_000)
    assert answers(clusters, IN_KERNELS, asked) == one_process(clusters.model(SMOLLM2), asked)


@pytest.mark.skipif(not groups_work(kernel()), reason="its layers are not fused here: no turns")
def test_workers_on_the_same_cores_tell_what_they_wait_for_each_other(clusters: Clusters) -> None:
    cluster = clusters.get(IN_KERNELS)
    draw = random.Random(SEED)
    # The later ones are read while the first are written.
    asked = [tuple(draw.randrange(5, 49_000) for _ in range(200)) for _ in range(8)]
    before = {worker["id"]: worker["turn_wait_s"] for worker in cluster.workers()}
    cluster.caller.ask_all(asked, ROOM)

    def waited() -> bool:
        now = {worker["id"]: worker["turn_wait_s"] for worker in cluster.workers()}
        print(before, now)
        return all(now[worker] > before[worker] + LEAST_WAIT_S for worker in before)

    cluster.wait(waited, 10.0)
    with urllib.request.urlopen(cluster.http + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    told = [line for line in lines if line.startswith("pdserve:engine_turn_wait_seconds_total{")]
    assert len(told) == 2
    assert all(float(line.rsplit(" ", 1)[1]) > LEAST_WAIT_S for line in told)


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
