"""A model folder's safetensors files: which of them hold the weights, and what each says it has.

    model.safetensors, or else the files that an index names, or else all there are

The revision hashes the whole content, so it survives restarts, copies and renames of the folder,
and any changed weight changes it. Loading computes the same on its way (load_weights.py).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from pdserve.engine.safetensors_file import Shard, read_shard
from pdserve.errors import BadWeights, ModelRefused

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK = 64 * 2**20


def weight_files(folder: Path) -> tuple[Path, ...]:
    """By name. ModelRefused when there is none or one is absent; BadWeights for a bad index."""
    if (folder / WHOLE).is_file():
        return (folder / WHOLE,)
    if (folder / INDEX).is_file():
        names = sorted(set(_index(folder).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise BadWeights(f"{folder}: {INDEX} names {', '.join(absent)}, which it has not")
        return tuple(folder / name for name in names)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelRefused(f"{folder} has no *.safetensors file; other weights are not read")
    return files


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """The headers of all files. A tensor lies in one file only, the one that an index names."""
    shards = tuple(read_shard(path) for path in weight_files(folder))
    home: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            other = home.setdefault(tensor.name, shard.path.name)
            if other != shard.path.name:
                raise BadWeights(f"{folder}: {tensor.name} lies in {other} and {shard.path.name}")
    if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        for name, file in _index(folder).items():
            if home.get(name) != file:
                raise BadWeights(f"{folder}: {INDEX} says that {name} lies in {file}: it does not")
    return shards


def weights_revision(files: Sequence[Path]) -> str:
    """32 hexadecimal digits over names, sizes and content."""
    digest = xxhash.xxh3_128()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        if size == 0:
            continue
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as view:
            for start in range(0, size, _CHUNK):
                digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> name of its file, which is a plain name."""
    try:
        data: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadWeights(f"{folder / INDEX} is no JSON ({error})") from error
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found:
        raise BadWeights(f"{folder / INDEX} has no weight_map")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise BadWeights(f"{folder / INDEX}: {name} lies in {file!r}, which is no file name")
    return found
