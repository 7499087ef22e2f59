"""Quantized weights: what the bits mean, the kernels against plain layers, GGUF's own blocks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from pdserve.config_load import load_config
from pdserve.engine.fused import why_not_fused
from pdserve.engine.gguf_blocks import blocks_file, keep_blocks, read_blocks
from pdserve.engine.layout import block_layout, fingerprint
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.probe import probe, relative_difference
from pdserve.engine.quantized import GROUP, Quantization, dequantize, quantize
from pdserve.engine.quantized_linear import QuantizedLinear, groups_work
from pdserve.errors import ConfigError, ModelRefused
from pdserve.types import Numerics
from tests.engine.model_world import CPU, HERE, family_folder, kernel
from tests.engine.test_fused import SHAPES, folder_of, run_steps
from tests.models import lasting_folder, write_tokenizer

needs_kernels = pytest.mark.skipif(
    not kernel().pdserve_has_groups(), reason="this processor has no AVX-512 with VBMI"
)
every_processor = pytest.mark.parametrize(
    "processor", [HERE, "BF16 dot product, emulated", "AVX-512 without BF16"]
)
KINDS = (Quantization.INT8, Quantization.INT4)


def fresh_seed() -> int:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return seed


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_moves_by_more_than_half_a_step(bits: int) -> None:
    draw = torch.Generator().manual_seed(fresh_seed())
    weight = torch.randn(50, 4 * GROUP, generator=draw) * torch.logspace(-3, 2, 50)[:, None]
    weight[3, :GROUP] = 0.0
    weight[4, :GROUP] = 2.5
    quantized = quantize(weight, bits)
    found = dequantize(quantized)
    assert quantized.bits == bits
    assert quantized.codes.abs().max() <= (127 if bits == 8 else 15)
    steps = quantized.scales.float().repeat_interleave(GROUP, dim=1)
    # The outermost codes also bear the rounding of scale and minimum to float16.
    rounding = weight.abs().view(50, -1, GROUP).amax(-1) * 2**-9
    allowed = steps / 2 + rounding.repeat_interleave(GROUP, dim=1)
    assert bool(((found - weight).abs() <= allowed + 1e-6).all())
    assert torch.equal(found[3, :GROUP], weight[3, :GROUP])
    # What was quantized stays what it is.
    assert float((dequantize(quantize(found, bits)) - found).abs().max()) < float(steps.max()) / 50


def test_weights_without_a_scale_are_refused() -> None:
    for bad in (float("nan"), float("inf"), 1e8):
        weight = torch.ones(2, GROUP)
        weight[1, 5] = bad
        for bits in (8, 4):
            with pytest.raises(ModelRefused, match=r"model\.quantization to none"):
                quantize(weight, bits)


@needs_kernels
@every_processor
def test_kernels_that_are_there_pass_their_own_check(processor: str) -> None:
    """Else they are not used, and no layer would say so."""
    assert groups_work(kernel(processor))


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 64), (192, 96), (5, 32), (1536, 576), (33, 288)])
@every_processor
def test_the_kernels_multiply_with_the_dequantized_weights(
    shape: tuple[int, int], bits: int, processor: str
) -> None:
    seed = fresh_seed()
    draw = torch.Generator().manual_seed(seed)
    n, k = shape
    quantized = quantize(torch.randn(n, k, generator=draw) + 0.3, bits)
    bias = (
        torch.nn.Parameter(torch.randn(n, generator=draw).to(torch.bfloat16)) if seed % 2 else None
    )
    layer = QuantizedLinear.of(quantized, bias, kernel(processor))
    x = torch.randn(1, 256, k, generator=draw).to(torch.bfloat16)
    exact = torch.nn.functional.linear(
        x.double(),
        dequantize(quantized).double(),
        None if bias is None else bias.detach().double(),
    )
    with torch.inference_mode():
        whole = layer(x)
        # Rounding of the result to bfloat16 alone: the products themselves are exact.
        assert float((whole.double() - exact).abs().max()) <= float(exact.abs().max()) * 2**-8
        for rows in (1, 2, 3, 13, 14, 15, 31, 113):
            assert torch.equal(layer(x[:, :rows]), whole[:, :rows]), "a row depends on the batch"


@cache
def narrow_folder(name: str) -> Path:
    """The model in bfloat16: read as whatever, it is quantized to the same codes."""
    folder = lasting_folder("narrow")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@cache
def loaded(name: str, quantization: Quantization, kind: str) -> LoadedModel:
    exact = kind == "exact"
    return load_model(
        narrow_folder(name),
        dtype="float64" if exact else "bfloat16",
        numerics=Numerics.EXACT if exact else Numerics.FAST,
        device=CPU,
        quantization=quantization,
        library=kernel() if kind == "fused" else None,
    )


@needs_kernels
@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("name", ["llama, 6 heads of 64 under 2, tied", "qwen2, biases"])
def test_fused_layers_over_codes_are_as_near_to_the_truth_as_plain_ones(
    name: str, quantization: Quantization
) -> None:
    """The truth: the dequantized weights in float64, which is what exact numerics serves."""
    assert name in SHAPES
    seed = fresh_seed()
    fused = loaded(name, quantization, "fused")
    assert why_not_fused(fused) == ""
    assert "native kernels" in fused.weights_note
    exact, _ = run_steps(loaded(name, quantization, "exact"), seed)
    plain, _ = run_steps(loaded(name, quantization, "plain"), seed)
    found, _ = run_steps(fused, seed)
    other, _ = run_steps(loaded(name, Quantization.NONE, "exact"), seed)
    assert relative_difference(found, exact) < 1.25 * relative_difference(plain, exact) < 0.1
    assert relative_difference(exact, other) > 1e-3, "nothing was quantized"
    assert fused.weights_bytes < 0.8 * loaded(name, Quantization.NONE, "fused").weights_bytes
    assert probe(fused, kernel()).difference < 0.1


def test_each_quantization_has_a_fingerprint_of_its_own() -> None:
    prints = set()
    for kind in Quantization:
        model = load_model(
            family_folder("llama"),
            dtype="float32",
            numerics=Numerics.EXACT,
            device=CPU,
            quantization=kind,
        )
        prints.add(fingerprint(block_layout(16, model.dtype, model.shapes), model.identity))
    assert len(prints) == 3


def test_layers_without_whole_groups_stay_and_a_model_of_such_alone_is_refused(
    tmp_path: Path,
) -> None:
    """The tiny families are 48 wide, with 96 inside: down_proj alone has whole groups."""
    options: dict[str, Any] = {
        "dtype": "float32",
        "numerics": Numerics.EXACT,
        "device": CPU,
        "quantization": Quantization.INT4,
    }
    some = load_model(family_folder("llama"), **options)
    assert "int4 in 3 linear layers, 0 of 3 from the file's own blocks" in some.weights_note
    plain = load_model(family_folder("llama"), **{**options, "quantization": Quantization.NONE})
    for name, weight in plain.model.named_parameters():
        kept = torch.equal(weight, some.model.get_parameter(name))
        assert kept == ("down_proj" not in name), name
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="int4, but no linear layer") as caught:
        load_model(tmp_path, **options)
    assert caught.value.param == "model.quantization"


def test_other_values_are_refused_by_name() -> None:
    assert load_config(None, ["model.quantization=int4"]).model.quantization == "int4"
    with pytest.raises(ConfigError, match=r"model\.quantization.*int5.*none, int8, int4"):
        load_config(None, ["model.quantization=int5"])


@cache
def _gguf_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _tensors(seed: int) -> dict[str, tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]]:
    draw = np.random.default_rng(seed)
    four, eight = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    shapes = {
        "token_embd": ((96, 64), eight),
        "blk.0.attn_q": ((64, 64), four),
        "blk.0.attn_k": ((32, 64), four),
        "blk.0.attn_v": ((32, 64), four),
        "blk.0.attn_output": ((64, 64), four),
        "blk.0.ffn_gate": ((96, 64), four),
        "blk.0.ffn_up": ((96, 64), four),
        "blk.0.ffn_down": ((64, 96), four),
    }
    return {
        name: (gguf.quants.quantize(draw.normal(size=shape).astype(np.float32), kind), kind)
        for name, (shape, kind) in shapes.items()
    }


def _turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The file's order of a query's or key's rows -> the model's."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def test_blocks_of_a_gguf_file_are_taken_over_without_another_rounding(tmp_path: Path) -> None:
    tensors = _tensors(fresh_seed())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = {
        name: torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
        for name, (data, kind) in tensors.items()
    }
    model = _gguf_model()
    layer = model.model.layers[0]
    exact = {
        "lm_head": values["token_embd"],
        "model.layers.0.self_attn.q_proj": _turned(values["blk.0.attn_q"], 4),
        "model.layers.0.self_attn.k_proj": _turned(values["blk.0.attn_k"], 2),
        "model.layers.0.self_attn.v_proj": values["blk.0.attn_v"],
        "model.layers.0.self_attn.o_proj": values["blk.0.attn_output"],
        "model.layers.0.mlp.gate_proj": values["blk.0.ffn_gate"],
        "model.layers.0.mlp.up_proj": values["blk.0.ffn_up"],
        "model.layers.0.mlp.down_proj": values["blk.0.ffn_down"],
    }
    with torch.no_grad():
        for name, value in exact.items():
            model.get_submodule(name).weight.copy_(value)
        layer.mlp.up_proj.weight[5, 7] += 1  # no longer what the file says
    assert keep_blocks(tmp_path / "model.gguf", model, tmp_path) == 7
    del exact["model.layers.0.mlp.up_proj"]
    file = blocks_file(tmp_path)
    assert file is not None
    kept = read_blocks(file)
    assert kept.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.equal(dequantize(kept[name]), value), name
        assert kept[name].bits == (8 if name == "lm_head" else 4)


def test_damaged_blocks_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "blocks.safetensors"
    codes, scales = torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1, dtype=torch.float16)
    low = torch.full_like(codes, -128)
    for bad, part in (
        ({"a.codes8": codes}, "codes8 alone"),
        ({"a.codes8": codes, "a.scales": scales.float()}, "a.scales is"),
        ({"a.codes8": codes, "a.scales": scales[:2]}, "another shape"),
        ({"a.codes8": low, "a.scales": scales}, "no layer can have"),
        ({"a.other": codes}, "a.other is"),
    ):
        save_file({key: tensor.contiguous() for key, tensor in bad.items()}, file)
        with pytest.raises(ModelRefused, match=part):
            read_blocks(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelRefused, match="cannot be read"):
        read_blocks(file)
