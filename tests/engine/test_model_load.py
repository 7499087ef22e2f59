"""What loading finds out about a model, and which models it refuses, each with its reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaAttention

from pdserve.engine.attention import IMPLEMENTATION
from pdserve.engine.layout import LayerShape, block_layout, fingerprint
from pdserve.engine.model import LoadedModel, load_model, trace_model
from pdserve.engine.probe import probe
from pdserve.engine.trace import compare_rule
from pdserve.errors import BadWeights, ConfigError, ModelRefused
from pdserve.types import Fingerprint, Numerics
from tests.engine.model_world import CPU, family_folder, family_model, kernel
from tests.models import CONTEXT, VOCAB, WINDOW, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, dtype="float32", numerics=Numerics.EXACT, device=CPU, **options)


def folder_of(config: transformers.PretrainedConfig, folder: Path) -> Path:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def copy_of(family: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(family_folder(family), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return folder


def print_of(loaded: LoadedModel) -> Fingerprint:
    return fingerprint(block_layout(16, loaded.dtype, loaded.shapes), loaded.identity)


def test_geometry_windows_and_lengths_are_found() -> None:
    gemma = family_model("gemma2")
    assert gemma.shapes == (LayerShape(2, 8, 8),) * 3
    assert [layer.window for layer in gemma.layers] == [WINDOW, 0, WINDOW]
    assert [layer.softcap for layer in gemma.layers] == [20.0] * 3
    assert [layer.query_heads for layer in gemma.layers] == [6, 6, 6]
    assert (gemma.max_model_len, gemma.vocab_size) == (CONTEXT, VOCAB)
    assert gemma.weights_bytes == sum(p.numel() * 8 for p in gemma.model.parameters()) + sum(
        b.numel() * b.element_size() for b in gemma.model.buffers()
    )


def test_layers_of_unequal_shape_are_served() -> None:
    """The second layer has one KV head where the others have two."""
    loaded = load(family_folder("llama"))
    model = loaded.model
    narrow = transformers.LlamaConfig.from_pretrained(family_folder("llama"))
    narrow.num_key_value_heads = 1
    torch.manual_seed(1)
    attention = LlamaAttention(narrow, 1).eval()
    attention.config = model.config  # so that it follows the model's choice of attention
    model.model.layers[1].self_attn = attention
    layers = trace_model(model, loaded.max_model_len)
    model.set_attn_implementation(IMPLEMENTATION)
    unequal = dataclasses.replace(loaded, layers=layers)
    assert unequal.shapes == (LayerShape(2, 8, 8), LayerShape(1, 8, 8), LayerShape(2, 8, 8))
    assert block_layout(16, "float32", unequal.shapes).span_elements == 16 * 5 * 8 * 2
    for library in (kernel(), None):
        assert probe(unequal, library).difference < 1e-5


def test_the_fingerprint_is_stable_and_tells_models_apart(tmp_path: Path) -> None:
    def other_rope(config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 5e5

    same = copy_of("llama", tmp_path / "copy", lambda config: config.update(_name_or_path="x"))
    base = print_of(load(family_folder("llama")))
    assert print_of(load(same)) == base
    others = {"base": base}
    others["seed"] = print_of(load(tiny_model("llama", tmp_path / "seed", 4)))
    others["family"] = print_of(load(family_folder("qwen2")))
    others["rope"] = print_of(load(copy_of("llama", tmp_path / "rope", other_rope)))
    others["dtype"] = print_of(
        load_model(family_folder("llama"), dtype="float64", numerics=Numerics.EXACT, device=CPU)
    )
    others["numerics"] = print_of(
        load_model(family_folder("llama"), dtype="float32", numerics=Numerics.FAST, device=CPU)
    )
    changed = shutil.copytree(family_folder("llama"), tmp_path / "one-weight")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 3] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    others["one weight"] = print_of(load(changed))
    assert len(set(others.values())) == len(others)


def test_max_model_len(tmp_path: Path) -> None:
    assert load(family_folder("llama"), max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="made for 512 positions"):
        load(family_folder("llama"), max_model_len=513)


REFUSED: dict[str, tuple[Callable[[], transformers.PretrainedConfig], str]] = {
    "dynamic rope": (
        lambda: transformers.LlamaConfig(
            **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "RoPE of type dynamic",
    ),
    "state space": (
        lambda: transformers.MambaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
        ),
        "state is no paged KV",
    ),
    "sinks": (
        lambda: transformers.GptOssConfig(
            **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1
        ),
        "s_aux",
    ),
    "chunked": (
        lambda: transformers.Llama4TextConfig(
            **SMALL,
            head_dim=8,
            attention_chunk_size=32,
            intermediate_size_mlp=48,
            num_local_experts=2,
        ),
        "chunked_attention",
    ),
    "bidirectional": (
        lambda: transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        "is not causal",
    ),
    "hybrid": (
        lambda: transformers.Lfm2Config(
            **SMALL, layer_types=["conv", "full_attention"], block_ff_dim=48
        ),
        "state is no paged KV",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_served_is_refused(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    folder = folder_of(make(), tmp_path)
    with pytest.raises(ModelRefused, match=reason) as caught:
        load(folder)
    print(caught.value)
    assert "\n" not in str(caught.value)


def test_longrope_and_bidirectional_and_quantized_configs_are_refused(tmp_path: Path) -> None:
    def longrope(config: dict[str, Any]) -> None:
        config["rope_parameters"] = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 256,
        }

    cases: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
        "longrope": ("llama", longrope),
        "bidirectional": ("gemma3", lambda c: c.update(use_bidirectional_attention=True)),
        "quantized": ("llama", lambda c: c.update(quantization_config={"quant_method": "awq"})),
    }
    for reason, (family, change) in cases.items():
        with pytest.raises(ModelRefused, match=reason):
            load(copy_of(family, tmp_path / reason, change))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="encoder-decoder"):
        load(tmp_path)


def test_a_model_s_own_code_is_never_run(tmp_path: Path) -> None:
    def own_code(config: dict[str, Any]) -> None:
        config["model_type"] = "something-of-its-own"
        config["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
        }

    folder = copy_of("llama", tmp_path / "own", own_code)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelRefused):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)
    bare = shutil.copytree(family_folder("llama"), tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    torch.save({}, bare / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match="safetensors"):
        load(bare)
    partial = shutil.copytree(family_folder("llama"), tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match="1 weights are missing"):
        load(partial)
    cut = shutil.copytree(family_folder("llama"), tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadWeights, match="it was cut off"):
        load(cut)


def test_mask_rules_are_compared_up_to_the_model_s_length() -> None:
    def chunked(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (k // 3000 == q // 3000)

    def windowed(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return (k <= q) & (k > q - 777)

    assert compare_rule(chunked, 0, 3000) == ""
    assert "not causal" in compare_rule(chunked, 0, 8192)
    assert compare_rule(windowed, 777, 8192) == ""
    assert "window of 776" in compare_rule(windowed, 776, 8192)
    assert "not causal" in compare_rule(windowed, 0, 8192)
