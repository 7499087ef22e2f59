"""Packed linear layers compute what the plain ones do, and stand in for them everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdserve.engine.linear import LinearPacker, PackedLinear, can_pack, onednn_packs
from pdserve.engine.model import load_model
from pdserve.engine.probe import relative_difference
from pdserve.engine.step import Row
from pdserve.types import Numerics
from tests.engine.model_world import CPU, drive, family_folder, kernel, running

pytestmark = pytest.mark.skipif(
    not onednn_packs(), reason="this processor does not multiply bfloat16"
)
SEED = 8


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (192, 48), (5, 96), (1536, 576)])
def test_packed_equals_plain(shape: tuple[int, int], bias: bool) -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    plain = torch.nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
    packed = PackedLinear(plain)
    with torch.inference_mode():
        for rows in (1, 2, 31, 256):
            x = torch.randn(1, rows, shape[1], dtype=torch.bfloat16)
            exact = torch.nn.functional.linear(
                x.double(), plain.weight.double(), plain.bias.double() if bias else None
            )
            error = (packed(x).double() - exact).abs().max()
            assert packed(x).shape == exact.shape
            # Rounding of the result to bfloat16, and no more.
            assert float(error) <= float(exact.abs().max()) * 2**-8 + 2**-10
    assert torch.equal(packed.weight, plain.weight)


def test_every_plain_layer_is_packed_and_the_model_stays_the_same() -> None:
    folder = family_folder("qwen2")
    options = {"dtype": "bfloat16", "numerics": Numerics.FAST, "device": CPU}
    plain = load_model(folder, **options, pack=False)  # type: ignore[arg-type]
    packed = load_model(folder, **options)  # type: ignore[arg-type]
    assert not any(type(m) is torch.nn.Linear for m in packed.model.modules())
    assert sum(isinstance(m, PackedLinear) for m in packed.model.modules()) == 3 * 7 + 1
    assert packed.weights_bytes == plain.weights_bytes
    assert packed.identity == plain.identity
    prompt = torch.randint(5, 500, (40,), generator=torch.Generator().manual_seed(SEED)).tolist()
    with running(plain, 16, 8, kernel()) as runner:
        (before,) = drive(runner, [prompt], 2, 16, (40,))
        expected = runner.logits([_row(prompt)])
    with running(packed, 16, 8, kernel()) as runner:
        (after,) = drive(runner, [prompt], 2, 16, (40,))
        found = runner.logits([_row(prompt)])
    assert relative_difference(found, expected) < 0.05
    assert before.prompt_len == after.prompt_len


def test_exact_numerics_are_never_packed() -> None:
    assert not can_pack(torch.float32, CPU, kernel())
    packer = LinearPacker()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    packer.replace_all(model)
    assert (type(model[0]), packer.packed_bytes) == (torch.nn.Linear, 0)


def _row(prompt: list[int]) -> Row:
    return Row(prompt, 0, np.arange(8, dtype=np.int32))
