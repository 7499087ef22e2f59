"""What a safetensors file says it holds, checked against the file before anything is allocated.

8 bytes of length, a JSON header of that length, then the tensors' bytes without holes or overlaps.
Torch-free. Every error is BadWeights and names the file, and the tensor where one is at fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pdserve.errors import BadWeights

# Names of the format and bytes of an element; no other type is read.
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
LARGEST_HEADER = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
_MOST_NUMBERS = 2**59  # so that the bytes, too, can be counted; next to a size of 0, too
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    begin: int  # where its bytes lie in the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Shard:
    path: Path
    head: bytes  # everything before the first tensor's bytes
    size: int  # of the file
    tensors: tuple[StoredTensor, ...]  # in the order of their bytes


def read_shard(path: Path) -> Shard:
    """Reads the header alone. BadWeights; OSError when the file cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        return read_header(path, file, size)


def read_header(path: Path, file: BinaryIO, size: int) -> Shard:
    """The same of a file that is open, at its begin, and has ``size`` bytes."""
    length_bytes = file.read(_LENGTH_BYTES)
    if len(length_bytes) < _LENGTH_BYTES:
        raise BadWeights(f"{path}: {size} bytes are no safetensors file")
    length = int.from_bytes(length_bytes, "little")
    if not 2 <= length <= min(LARGEST_HEADER, size - _LENGTH_BYTES):
        raise BadWeights(
            f"{path}: its header would have {length} bytes, the file has {size} "
            f"(at most {LARGEST_HEADER} are read)"
        )
    text = file.read(length)
    if len(text) < length:
        raise BadWeights(f"{path}: it ends inside its header")
    head = length_bytes + text
    entries = _entries(path, text)
    tensors = [_tensor(path, name, entry, len(head)) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_cover(path, tensors, len(head), size)
    return Shard(path, head, size, tuple(tensors))


def _entries(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands there twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path}: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise BadWeights(f"{path}: its header is no JSON object")
    header.pop(_METADATA, None)
    return header


def _tensor(path: Path, name: str, entry: object, data: int) -> StoredTensor:
    where = f"{path}: {name}"
    if not isinstance(entry, dict):
        raise BadWeights(f"{where}: its entry is no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadWeights(f"{where}: dtype {dtype!r} is not read; {', '.join(ITEM_BYTES)} are")
    sizes, ends = _counts(shape), _counts(offsets)
    if sizes is None:
        raise BadWeights(f"{where}: its shape is no list of sizes")
    if ends is None or len(ends) != 2 or ends[0] > ends[1]:
        raise BadWeights(f"{where}: its data_offsets are no begin and end")
    if math.prod(size for size in sizes if size) > _MOST_NUMBERS:
        raise BadWeights(f"{where}: no tensor can have the shape {list(sizes)}")
    expected = math.prod(sizes) * ITEM_BYTES[dtype]
    if ends[1] - ends[0] != expected:
        raise BadWeights(
            f"{where}: {dtype} {list(sizes)} takes {expected} bytes, its data_offsets span "
            f"{ends[1] - ends[0]}"
        )
    return StoredTensor(name, dtype, sizes, data + ends[0], data + ends[1])


def _counts(value: object) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on; None for anything else (True is no number)."""
    if not isinstance(value, list):
        return None
    if not all(type(one) is int and one >= 0 for one in value):
        return None
    return tuple(value)


def _check_cover(path: Path, tensors: list[StoredTensor], begin: int, size: int) -> None:
    """The tensors follow one another from ``begin`` to the end of the file."""
    at = begin
    for tensor in tensors:
        if tensor.end > size:
            raise BadWeights(
                f"{path}: {tensor.name} ends at byte {tensor.end}, the file has {size}: "
                "it was cut off"
            )
        if tensor.begin != at:
            what = "overlaps what precedes it" if tensor.begin < at else "leaves a hole before it"
            raise BadWeights(f"{path}: {tensor.name} {what} (byte {tensor.begin}, not {at})")
        at = tensor.end
    if at != size:
        raise BadWeights(f"{path}: {size - at} bytes after the last tensor belong to none")
