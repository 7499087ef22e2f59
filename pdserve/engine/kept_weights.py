"""Weights as the kernels want them, kept in one file that all workers of a host map.

    write_kept(path, tensors, notes)       once, after a model was loaded from its own files
    open_kept(path) -> KeptWeights         mapped, every byte checked; KeptUnusable says why not
    sweep(path, family)                    before a file is written: those that it replaces, and
                                           those whose model is gone

A safetensors file. Its pages are the page cache's: workers share them, and nobody reads them again
while they are there. It is written beside its place and moved there whole, never changed, so that
who has mapped it keeps what it mapped. What it says of itself is part of what is checked, its own
name, too: a file that was copied or renamed is another's.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from pdserve.engine.landing import STORED, memoryview_of
from pdserve.engine.safetensors_file import Shard, StoredTensor, read_header

SUFFIX = ".safetensors"
# Numbers that are so many bytes long begin at multiples of that.
_ALIGNED = 64
_WINDOW = 64 * 2**20  # hashed at once
_PIECE = 4 * 2**20  # read at once
_SPARE_DISK = 2**30  # stays free
_OURS = re.compile(rf"[0-9a-f]{{12}}-[a-z0-9]+-[0-9a-f]{{24}}{re.escape(SUFFIX)}")
_PREFIX, _PART = "kept-", ".part"
_ABANDONED_S = 3600.0
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


def can_keep(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() > 0 and tensor.dtype in _NAMES


def check_room(folder: Path, size: int) -> None:
    """KeptUnusable when the disk has no room for ``size`` bytes and some more."""
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE_DISK:
        raise KeptUnusable(f"{folder} has {free} bytes left, {size} are to be kept")


def open_kept(path: Path) -> KeptWeights:
    """KeptUnusable. All of it is read once, which brings it into memory as well."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise KeptUnusable(f"{path} can be written by others")
            shard = read_header(path, file, info.st_size)
            notes = _checked(path, shard, file)
            mapped = mmap.mmap(file.fileno(), info.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        whole = _as_tensor(mapped)
        return KeptWeights({one.name: _view(whole, one) for one in shard.tensors}, notes)
    except KeptUnusable:
        raise
    except Exception as error:
        # Whatever bytes can make a reader raise: nothing but a copy depends on them.
        raise KeptUnusable(f"{path}: {error!r}") from error


def write_kept(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
    """``tensors``: of which each ``can_keep``. OSError; KeptUnusable: the disk has no room."""
    # There are no holes: only those of whole lines keep what follows them aligned, and then only
    # those of larger numbers.
    names = sorted(
        tensors,
        key=lambda name: (_bytes(tensors[name]) % _ALIGNED != 0, -tensors[name].element_size()),
    )
    views = [memoryview_of(tensors[name].detach()) for name in names]
    check_room(path.parent, sum(view.nbytes for view in views))
    head = _head(path, {name: tensors[name] for name in names}, notes, views)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=_PREFIX, suffix=_PART, delete=False
    ) as file:
        try:
            file.write(head)
            for view in views:
                file.write(view)
            file.flush()
            os.fsync(file.fileno())  # a disk that is full may say so only now
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def sweep(path: Path, family: str) -> None:
    """Deletes of our own files beside ``path``: it and those of its family, those whose model
    folder is gone, and what writers that were killed left."""
    for other in path.parent.iterdir():
        with contextlib.suppress(OSError):
            if _OURS.fullmatch(other.name):
                unneeded = other.name.startswith(family) or not _model_is_there(other)
            else:
                left = other.name.startswith(_PREFIX) and other.name.endswith(_PART)
                unneeded = left and time.time() - other.stat().st_mtime > _ABANDONED_S
            if unneeded:
                other.unlink()


def _model_is_there(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            shard = read_header(path, file, path.stat().st_size)
        return Path(_said(shard)["notes"]["model"]).is_dir()
    except OSError:
        raise
    except Exception:
        return False  # damaged, and nobody's


# ---- the header ----------------------------------------------------------------------------------


def _head(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    notes: Mapping[str, Any],
    views: Sequence[memoryview],
) -> bytes:
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        end = at + _bytes(tensor)
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    said = {"name": path.name, "notes": dict(notes), "digests": _digests_of(views)}
    kept = json.dumps(said)
    seal = _seal(kept, [(name, one["dtype"], one["shape"]) for name, one in entries.items()])
    text = json.dumps({"__metadata__": {"kept": kept, "seal": seal}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _seal(kept: str, entries: Sequence[tuple[str, str, Sequence[int]]]) -> str:
    """Of all that a header says; offsets follow from the order."""
    whole = json.dumps([kept, [[name, dtype, list(shape)] for name, dtype, shape in entries]])
    return xxhash.xxh3_128(whole.encode()).hexdigest()


def _metadata(shard: Shard) -> Any:
    return json.loads(shard.head[8:])["__metadata__"]


def _said(shard: Shard) -> Any:
    return json.loads(_metadata(shard)["kept"])


def _checked(path: Path, shard: Shard, file: BinaryIO) -> Mapping[str, Any]:
    """The notes. KeptUnusable; whatever a reader of strange bytes may raise."""
    entries = [(one.name, one.dtype, one.shape) for one in shard.tensors]
    metadata, said = _metadata(shard), _said(shard)
    if metadata["seal"] != _seal(metadata["kept"], entries) or said["name"] != path.name:
        raise KeptUnusable(f"{path} is damaged, or was made for another")
    if _digests_in(file, len(shard.head), shard.size) != said["digests"]:
        raise KeptUnusable(f"{path} is damaged")
    notes: Mapping[str, Any] = said["notes"]
    return notes


# ---- the content ---------------------------------------------------------------------------------


def _digests_of(views: Sequence[memoryview]) -> list[str]:
    """Of each window of all bytes in their order."""
    digests, room = [], 0
    for view in views:
        at = 0
        while at < view.nbytes:
            if not room:
                digests.append(xxhash.xxh3_128())
                room = _WINDOW
            part = view[at : at + room]
            digests[-1].update(part)
            room -= part.nbytes
            at += part.nbytes
    return [digest.hexdigest() for digest in digests]


def _digests_in(file: BinaryIO, begin: int, end: int) -> list[str]:
    """Of the same windows of a file: read, and not looked at where it is mapped, since there an
    error of the disk is a signal. Reading and hashing let other threads run."""

    def digest(start: int) -> str:
        made = xxhash.xxh3_128()
        piece = memoryview(bytearray(_PIECE))
        stop = min(start + _WINDOW, end)
        while start < stop:
            count = os.preadv(file.fileno(), [piece[: stop - start]], start)
            if count == 0:
                break  # cut short: the digest will not be the same
            made.update(piece[:count])
            start += count
        return made.hexdigest()

    with ThreadPoolExecutor(min(4, 2 * len(os.sched_getaffinity(0)))) as threads:
        return list(threads.map(digest, range(begin, end, _WINDOW)))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_tensor(mapped: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        # That it cannot be written is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _view(whole: torch.Tensor, one: StoredTensor) -> torch.Tensor:
    dtype = torch.bool if one.dtype == "BOOL" else STORED[one.dtype]
    return whole[one.begin : one.end].view(dtype).reshape(one.shape)
