"""A model folder's safetensors files: that they are there, how big, and which revision they are.

The revision hashes the whole content, so it survives restarts, copies and renames of the folder,
and any changed weight changes it. Loading reads every byte anyway.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import xxhash

from pdserve.errors import ModelRefused

_CHUNK = 64 * 2**20


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files in ``folder``, by name. ModelRefused when there is none."""
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelRefused(f"{folder} has no *.safetensors file; other weights are not read")
    return files


def weights_revision(files: tuple[Path, ...]) -> str:
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
