"""Files are read in order and once, and the model is the one that transformers' own loader makes.

Checkpoints are random, of several shards, of mixed number types, and cut into shards at random, so
that tensors come in any order.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pdserve.engine import load_weights
from pdserve.engine.file_order import FileOrderReader, Window, plan_windows
from pdserve.engine.landing import StagedLanding
from pdserve.engine.linear import LinearPacker
from pdserve.engine.load_weights import read_model
from pdserve.engine.safetensors_file import Shard, read_shard
from pdserve.engine.tiles import TiledLinear
from pdserve.engine.weights import INDEX, read_shards, weight_files, weights_revision
from pdserve.errors import BadWeights
from tests.engine.model_world import CPU, family_folder, kernel

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checkpoint(folder: Path, config: Any, seed: int, shards: int = 3) -> Path:
    """A random model of ``config`` in ``shards`` files; each tensor of a type drawn for it."""
    draw = np.random.default_rng(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = {name: int(draw.integers(shards)) for name in tensors}
    for number in range(shards):
        own = {
            name: torch.randn(tensor.shape).to(KINDS[int(draw.integers(len(KINDS)))])
            for name, tensor in tensors.items()
            if homes[name] == number
        }
        save_file(own, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
    index = {name: f"part-{number}.safetensors" for name, number in homes.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON),
    "tied": transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    # Its experts are merged by the library: read first, built then.
    "experts": transformers.MixtralConfig(**COMMON, num_local_experts=3),
}


def same(found: Any, expected: Any) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype is tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    for (name, mine_), (_, theirs_) in zip(
        found.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(mine_, theirs_), name


class Staged(StagedLanding):
    direct = False


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("staged", [False, True], ids=["host", "staged"])
def test_it_is_the_model_that_transformers_loads(
    kind: str, dtype: torch.dtype, staged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    folder = checkpoint(tmp_path / kind, CONFIGS[kind], seed)
    if staged:  # what a device does, on the CPU
        monkeypatch.setattr(
            load_weights,
            "HostLanding",
            lambda stored, finals: Staged(stored, [f.dtype for f in finals], CPU, 2),
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    read = read_model(folder, config, dtype, CPU, None)
    same(read.model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    assert read.revision == weights_revision(weight_files(folder))
    tied = read.model.get_output_embeddings().weight is read.model.get_input_embeddings().weight
    assert tied == (kind == "tied")


def test_layers_are_packed_while_the_rest_is_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", CONFIGS["tied"], 5)
    config = transformers.AutoConfig.from_pretrained(folder)
    plain = read_model(folder, config, torch.bfloat16, CPU, None).model
    packer = LinearPacker(kernel())
    packed = read_model(folder, config, torch.bfloat16, CPU, packer).model
    assert not any(type(module) is torch.nn.Linear for module in packed.modules())
    tokens = torch.arange(6)[None]
    with torch.inference_mode():
        expected, found = (model(tokens).logits.float() for model in (plain, packed))
    assert float((found - expected).norm() / expected.norm()) < 0.05
    for name, module in packed.named_modules():
        if isinstance(module, TiledLinear):
            assert torch.equal(module.weight, plain.get_submodule(name).weight), name
            if module.bias is not None:
                assert torch.equal(module.bias, plain.get_submodule(name).bias), name


@pytest.mark.parametrize("foreseen", [True, False])
def test_what_the_library_converts_is_read_once_or_nothing_of_the_first_time_is_kept(
    foreseen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", CONFIGS["experts"], 6)
    config = transformers.AutoConfig.from_pretrained(folder)
    made: list[list[weakref.ref[torch.Tensor]]] = []
    reading = load_weights._reading

    def watched(shards: Any, finals: dict[str, torch.Tensor], *rest: Any) -> Any:
        assert not [one for earlier in made for one in earlier if one() is not None], "still held"
        made.append([weakref.ref(tensor) for tensor in finals.values()])
        return reading(shards, finals, *rest)

    monkeypatch.setattr(load_weights, "_reading", watched)
    if not foreseen:
        monkeypatch.setattr(load_weights, "_is_converted", lambda *_: False)
    read = read_model(folder, config, torch.float32, CPU, None)
    assert len(made) == (1 if foreseen else 2)
    same(read.model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("case", ["missing", "extra", "shape"])
def test_tensors_that_are_not_the_model_s_are_named(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    config = CONFIGS["llama"]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if case == "missing":
        del tensors[name]
    elif case == "extra":
        tensors["model.layers.1.mlp.sideways.weight"] = torch.ones(3)
        name = "sideways"
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadWeights, match=name):
        read_model(folder, config, torch.float32, CPU, None)


def shards_of(tmp_path: Path, sizes: Sequence[Sequence[int]], seed: int) -> list[Shard]:
    draw = torch.Generator().manual_seed(seed)
    shards = []
    for number, own in enumerate(sizes):
        path = tmp_path / f"{number}.safetensors"
        tensors = {
            f"{number}-{i}": torch.randint(0, 256, (n,), generator=draw).to(torch.uint8)
            for i, n in enumerate(own)
        }
        save_file(tensors, path)
        shards.append(read_shard(path))
    return shards


def test_windows_cover_every_byte_once_in_file_order(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [[5, 0, 17, 3], [], [0], [40, 1, 1]], 1)
    for size in (1, 4, 7, 64):
        windows = plan_windows(shards, size)
        assert all(window.size <= size for window in windows)
        seen: dict[int, list[int]] = {number: [] for number in range(len(shards))}
        tensors = [tensor for shard in shards for tensor in shard.tensors]
        for window in windows:
            at = window.begin
            for part in window.parts:
                assert at == tensors[part.tensor].begin + part.begin
                seen[window.shard].extend(range(at, at + part.end - part.begin))
                at += part.end - part.begin
        for number, shard in enumerate(shards):
            assert seen[number] == list(range(len(shard.head), shard.size)), (size, number)
        assert [w.shard for w in windows] == sorted(w.shard for w in windows)


def test_readers_never_run_further_ahead_than_they_may(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [[1000, 77], [300]], 2)
    windows = plan_windows(shards, 16)
    asked: list[Window] = []
    used = 0

    def room(window: Window) -> list[memoryview]:
        asked.append(window)
        assert len(asked) <= used + 3, "more windows than may be ahead"
        return [memoryview(bytearray(window.size))]

    whole = b""
    with FileOrderReader(shards, windows, room, ahead=3, readers=4) as reader:
        for window, views in reader:
            whole += b"".join(bytes(view) for view in views)
            assert window is windows[used]
            used += 1
    assert whole == b"".join(s.path.read_bytes()[len(s.head) :] for s in shards)
    assert asked == list(windows), "each window once, in file order"
    assert not [t for t in threading.enumerate() if t.name.startswith("pdserve-read")]


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [[4000]], 3)
    shards[0].path.write_bytes(shards[0].path.read_bytes()[:2000])

    def room(window: Window) -> list[memoryview]:
        return [memoryview(bytearray(window.size))]

    with (
        FileOrderReader(shards, plan_windows(shards, 256), room, ahead=2) as reader,
        pytest.raises(BadWeights, match="it was cut off at byte"),
    ):
        list(reader)
    assert not [t for t in threading.enumerate() if t.name.startswith("pdserve-read")]


def test_the_revision_is_that_of_the_whole_files() -> None:
    folder = family_folder("llama")
    config = transformers.AutoConfig.from_pretrained(folder)
    revision = read_model(folder, config, torch.float32, CPU, None).revision
    assert revision == weights_revision([shard.path for shard in read_shards(folder)])
