"""The probe passes what serves well and refuses, with the reason, what does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pdserve.engine import attention
from pdserve.engine import probe as probe_module
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.probe import ProbeReport, probe, probe_or_gather, relative_difference
from pdserve.engine.triton_layer import TritonKernels
from pdserve.errors import ConfigError, ModelRefused
from pdserve.types import Numerics
from tests.engine.model_world import CPU, family_folder, family_model, kernel
from tests.models import FAMILIES


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("native", [True, False], ids=["native", "gather"])
def test_every_family_passes_far_below_the_tolerance(family: str, native: bool) -> None:
    report = probe(family_model(family), kernel() if native else None)
    assert report.difference < 1e-5 < report.tolerance


def test_bfloat16_passes() -> None:
    loaded = load_model(
        family_folder("llama"), dtype="bfloat16", numerics=Numerics.FAST, device=CPU
    )
    report = probe(loaded, kernel())
    assert 0 < report.difference < report.tolerance


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model(family_folder("llama"), dtype="float64", numerics=Numerics.EXACT, device=CPU)


@pytest.mark.parametrize("wrong", ["window", "softcap", "scaling"])
def test_attention_that_computes_something_else_is_refused(
    loaded: LoadedModel, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.paged_attention

    def off(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        changed = {"window": {"sliding_window": 9}, "softcap": {"softcap": 1.0}}
        changed["scaling"] = {"scaling": kwargs["scaling"] * 0.8}
        return right(module, q, k, v, mask, **{**kwargs, **changed[wrong]})

    monkeypatch.setattr(attention, "paged_attention", off)
    attention.register()
    try:
        with pytest.raises(ModelRefused, match="logits differ"):
            probe(loaded, kernel())
    finally:
        monkeypatch.undo()
        attention.register()
    probe(loaded, kernel())


def test_a_layer_that_bypasses_the_pool_is_refused(loaded: LoadedModel) -> None:
    """A module that answers attention itself: fewer layers reach the pool than were traced."""
    layer = loaded.model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ModelRefused, match="2 of 3 layers attended"):
        probe(loaded, kernel())


def test_rows_that_leak_into_each_other_are_refused(loaded: LoadedModel) -> None:
    """A model that mixes neighbouring tokens of the line (a convolution) cannot be packed."""
    mlp = loaded.model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x + 0.5 * torch.roll(x, 1, dims=1))
    with pytest.raises(ModelRefused, match="logits differ"):
        probe(loaded, kernel())


def test_nan_is_never_within_tolerance(loaded: LoadedModel) -> None:
    good = torch.randn(5, 7)
    bad = good.clone()
    bad[4, 2] = float("nan")
    assert relative_difference(good, good) == 0
    assert not relative_difference(bad, good) <= 1
    with torch.no_grad():
        loaded.model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelRefused, match="nan"):
        probe(loaded, kernel())


def test_a_short_context_is_probed_too(tmp_path: Path) -> None:
    for length in (1, 2, 6, 17):
        short = dataclasses.replace(family_model("llama"), max_model_len=length)
        assert probe(short, kernel()).difference < 1e-5


def test_the_model_attends_over_the_pool_again_afterwards(loaded: LoadedModel) -> None:
    probe(loaded, kernel())
    assert isinstance(loaded.model, transformers.LlamaForCausalLM)
    assert loaded.model.config._attn_implementation == attention.IMPLEMENTATION
    assert not any(hasattr(m, attention.LAYER_ATTRIBUTE) for m in loaded.modules)


class BrokenKernels:
    """In place of triton_paged: kernels that do nothing, or cannot be compiled."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __getattr__(self, kernel: str) -> BrokenKernels:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> BrokenKernels:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        if self.fails:
            raise ValueError("at 3:14: Cannot make_shape_compatible\nand more")


@pytest.mark.parametrize("fails", [True, False], ids=["compiler", "wrong"])
def test_kernels_that_fail_on_the_device_give_way_to_the_reference(fails: bool) -> None:
    loaded = family_model("llama", "float32")
    broken = TritonKernels(BrokenKernels(fails))
    chosen = probe_or_gather(loaded, broken, must=False)
    print(chosen.problem)
    assert chosen.kernels is None
    assert chosen.report.difference <= chosen.report.tolerance
    assert "make_shape_compatible" in chosen.problem or not fails
    assert "\n" not in chosen.problem
    assert chosen.note == f"attention: gather, because {chosen.problem}"
    with pytest.raises(ConfigError, match="is native, but Triton's kernels"):
        probe_or_gather(loaded, broken, must=True)


def test_a_varlen_kernel_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = family_model("llama", "float32")
    real, seen = probe_module.probe, []

    def probed(loaded: LoadedModel, library: Any) -> ProbeReport:
        seen.append(library.varlen)
        if library.varlen is not None:
            raise RuntimeError("no kernel image is available")
        return real(loaded, None)

    def varlen(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(probe_module, "probe", probed)
    module = BrokenKernels(True)
    chosen = probe_or_gather(loaded, TritonKernels(module, varlen), must=True)
    assert isinstance(chosen.kernels, TritonKernels)
    assert seen == [varlen, None]
    assert chosen.kernels.module is module
    assert chosen.note.startswith("attention: Triton kernels, prompts one by one, because Triton's")
