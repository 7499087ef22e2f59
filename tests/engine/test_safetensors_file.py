"""Headers of weight files: whole ones are read, damaged ones refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pdserve.engine.safetensors_file import read_shard
from pdserve.engine.weights import INDEX, read_shards, weight_files
from pdserve.errors import BadWeights, ModelRefused

Header = dict[str, Any]


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> Header:
    sizes = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}


def written(path: Path, header: Header | bytes, data: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(0, 7),
        "c": torch.tensor(1.0, dtype=torch.float64),
        "d": torch.ones(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    shard = read_shard(tmp_path / "x.safetensors")
    assert {t.name: (t.shape, t.nbytes) for t in shard.tensors} == {
        name: (tuple(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()
    }
    assert shard.tensors[-1].end == shard.size


TWO = {"a": entry(0, 8), "b": entry(8, 16)}
BAD: dict[str, tuple[Header | bytes, int, str]] = {
    "no JSON": (b"{'a'", 0, "no JSON"),
    "not an object": (b"[1]", 0, "no JSON object"),
    "deep": (b"[" * 100_000, 0, "no JSON"),
    "not text": (b'{"\xff": 1}', 0, "no JSON"),
    "twice": (b'{"a": {}, "a": {}}', 0, "stands there twice"),
    "dtype": ({"a": entry(0, 8, "F8_E4M3", [8])}, 8, "a: dtype 'F8_E4M3' is not read"),
    "dtype is a list": ({"a": {"dtype": ["F32"]}}, 0, "is not read"),
    "entry": ({"a": 3}, 0, "a: its entry"),
    "negative shape": ({"a": entry(0, 8, shape=[-1, -2])}, 8, "a: its shape"),
    "bool shape": ({"a": entry(0, 4, shape=[True])}, 4, "a: its shape"),
    "huge shape": ({"a": entry(0, 8, shape=[2**62, 2**62])}, 8, "a: no tensor can have the shape"),
    "huge beside nothing": ({"a": entry(0, 0, shape=[0, 2**63])}, 0, "a: no tensor can have"),
    "huge in all": ({"a": entry(0, 0, shape=[0, 2**62, 8])}, 0, "a: no tensor can have"),
    "large": ({"a": entry(0, 8, shape=[2**40])}, 8, "its data_offsets span 8"),
    "offsets": ({"a": {**entry(0, 8), "data_offsets": [8, 0]}}, 8, "no begin and end"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps what precedes it"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b leaves a hole"),
    "cut off": (TWO, 12, "b ends at byte .* it was cut off"),
    "beyond": ({"a": entry(2**40, 2**40 + 8)}, 8, "it was cut off"),
    "rest": (TWO, 20, "4 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_header_is_named(case: str, tmp_path: Path) -> None:
    header, data, reason = BAD[case]
    file = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(BadWeights, match=reason) as caught:
        read_shard(file)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0", (2**63).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(BadWeights, match=r"no safetensors file|its header would have"):
        read_shard(file)


def two_shards(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        written(folder / f"{name}.safetensors", {name: entry(0, 8)}, 8)
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "m")
    written(folder / "consolidated.safetensors", {"a": entry(0, 8)}, 8)
    assert [file.name for file in weight_files(folder)] == ["a.safetensors", "b.safetensors"]
    assert [t.name for shard in read_shards(folder) for t in shard.tensors] == ["a", "b"]
    written(folder / "model.safetensors", {"z": entry(0, 8)}, 8)
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]


BAD_INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent file": (lambda m: (m / "b.safetensors").unlink(), "b.safetensors, which it has not"),
    "no JSON": (lambda m: (m / INDEX).write_text("{"), "is no JSON"),
    "no map": (lambda m: (m / INDEX).write_text("[]"), "has no weight_map"),
    "a way out": (
        lambda m: (m / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        "which is no file name",
    ),
    "wrong file": (
        lambda m: (m / INDEX).write_text('{"weight_map": {"c": "a.safetensors"}}'),
        "c lies in a.safetensors: it does not",
    ),
    "twice": (
        lambda m: written(m / "b.safetensors", {"a": entry(0, 8)}, 8),
        "a lies in a.safetensors and b.safetensors",
    ),
}


@pytest.mark.parametrize("case", list(BAD_INDEXES))
def test_a_bad_index_is_named(case: str, tmp_path: Path) -> None:
    spoil, reason = BAD_INDEXES[case]
    folder = two_shards(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelRefused, match=reason):
        read_shards(folder)
