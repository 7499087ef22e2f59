"""Weights as the kernels want them, kept in one file that all workers of a host map.

    write_kept(path, tensors, notes)       once, after a model was loaded from its own files
    open_kept(path) -> KeptWeights         mapped, every byte checked; KeptUnusable says why not
    sweep(folder, path)                    what the new file replaces, and what nobody needs

The file is a safetensors file whose tensors begin at multiples of 64 bytes. Its pages are the page
cache's: workers share them, and nobody reads them again while they are there. It is written beside
its place and moved there whole, never changed, so that who has mapped it keeps what it mapped.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from pdserve.engine.landing import STORED, memoryview_of
from pdserve.engine.safetensors_file import Shard, StoredTensor, read_shard
from pdserve.errors import BadWeights

ALIGNED = 64  # bytes; a register of the widest kernel
SUFFIX = ".safetensors"
_PART = ".part"
_WINDOW = 64 * 2**20  # what is hashed at once
_SPARE_DISK = 2**30  # stays free
_NAMES: Mapping[torch.dtype, str] = {
    **{dtype: name for name, dtype in STORED.items() if name != "BOOL"},
    torch.bool: "BOOL",
}


class KeptUnusable(Exception):
    """There is no such file, or one that must not be used: its maker's work is done again."""


@dataclass(frozen=True, slots=True)
class KeptWeights:
    tensors: Mapping[str, torch.Tensor]  # CPU, views of the mapping: never to be written
    notes: Mapping[str, Any]  # what the writer said of them


def open_kept(path: Path, *, check: bool = True) -> KeptWeights:
    """KeptUnusable. ``check``: reads and hashes all of it, which brings it into memory as well."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise KeptUnusable(f"{path} can be written by others")
            shard = read_shard(path)
            # Asks for the whole file at once, in its order.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            mapped = mmap.mmap(file.fileno(), info.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        notes, digests = _said(shard)
        whole = _as_tensor(mapped)[len(shard.head) :]
        if check and _digests([memoryview_of(whole)]) != digests:
            raise KeptUnusable(f"{path} is damaged")
        begin = len(shard.head)
        return KeptWeights({one.name: _view(whole, one, begin) for one in shard.tensors}, notes)
    except (OSError, BadWeights, ValueError) as error:
        raise KeptUnusable(f"{path}: {error}") from error


def write_kept(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
    """``tensors``: contiguous, on the CPU. OSError; KeptUnusable when the disk has no room."""
    # There are no holes: only those of whole lines keep what follows them aligned, and then only
    # those of larger numbers.
    names = sorted(
        tensors,
        key=lambda name: (_bytes(tensors[name]) % ALIGNED != 0, -tensors[name].element_size()),
    )
    views = [memoryview_of(tensors[name].detach()) for name in names]
    size = sum(view.nbytes for view in views)
    free = shutil.disk_usage(path.parent).free
    if free < size + _SPARE_DISK:
        raise KeptUnusable(f"{path.parent} has {free} bytes left, {size} are to be kept")
    head = _head(names, tensors, {"notes": dict(notes), "digests": _digests(views)})
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=_PART, delete=False) as file:
        try:
            file.write(head)
            for view in views:
                file.write(view)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def sweep(path: Path, family: str) -> None:
    """Deletes files beside ``path`` of the same family, those whose model folder is gone, and what
    a writer that was killed left. One writer at a time."""
    for part in path.parent.glob(f"*{_PART}"):
        part.unlink(missing_ok=True)
    for other in path.parent.glob(f"*{SUFFIX}"):
        if other == path:
            continue
        try:
            notes, _ = _said(read_shard(other))
            needed = not other.name.startswith(family) and Path(notes["model"]).is_dir()
        except (OSError, BadWeights, ValueError, KeyError, TypeError):
            needed = False
        if not needed:
            other.unlink(missing_ok=True)


def _head(
    names: Sequence[str], tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"kept": json.dumps(said)}}
    at = 0
    for name in names:
        tensor = tensors[name]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + _bytes(tensor)],
        }
        at += _bytes(tensor)
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _said(shard: Shard) -> tuple[Mapping[str, Any], list[str]]:
    """The writer's notes and digests. ValueError."""
    said = json.loads(json.loads(shard.head[8:]).get("__metadata__", {}).get("kept", "null"))
    if not isinstance(said, dict) or not isinstance(said.get("notes"), dict):
        raise ValueError("it does not say what it holds")
    return said["notes"], said.get("digests", [])


def _digests(views: Sequence[memoryview]) -> list[str]:
    """Of each window of all bytes in their order; hashing lets other threads run."""
    windows: list[list[memoryview]] = []
    room = 0
    for view in views:
        at = 0
        while at < view.nbytes:
            if not room:
                windows.append([])
                room = _WINDOW
            part = view[at : at + room]
            windows[-1].append(part)
            room -= part.nbytes
            at += part.nbytes

    def digest(window: Sequence[memoryview]) -> str:
        made = xxhash.xxh3_128()
        for view in window:
            made.update(view)
        return made.hexdigest()

    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as threads:
        return list(threads.map(digest, windows))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_tensor(mapped: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        # That it cannot be written is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _view(whole: torch.Tensor, one: StoredTensor, begin: int) -> torch.Tensor:
    part = whole[one.begin - begin : one.end - begin]
    dtype = torch.bool if one.dtype == "BOOL" else STORED[one.dtype]
    if part.storage_offset() % dtype.itemsize:
        raise ValueError(f"{one.name} is not aligned")
    return part.view(dtype).reshape(one.shape)
