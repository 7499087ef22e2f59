"""Turns a GGUF file into a model folder that transformers loads: bfloat16 safetensors, once.

    absent -> locked -> read tokenizer, read weights, write -> renamed into place -> ready

The folder appears by one rename, so it is either whole or not there. A file lock keeps two
processes from converting at once; the second one waits and finds the folder ready.

The weights become bfloat16, and ``exact`` numerics reads the same bfloat16 weights as float32, as
any program that loads the folder does. The file's 4- and 8-bit blocks are kept beside them for
model.quantization (gguf_blocks.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdserve.engine.progress import Progress, ProgressSink
from pdserve.errors import ConfigError

# Raised when the way of converting changes, so that old folders are not taken for new ones.
REVISION = 2


def convert_gguf(gguf: Path, target: Path, progress: ProgressSink) -> Path:
    """Writes ``target`` unless it is there; returns it. ConfigError (disk full, no permission)."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock"), progress):
            if not target.is_dir():
                _convert(gguf, target, progress)
    except OSError as error:
        raise ConfigError(_storage_problem(target, error), param="model_cache") from error
    return target


def _convert(gguf: Path, target: Path, progress: ProgressSink) -> None:
    # Imported here: a folder that is ready needs neither torch nor transformers to be found.
    from pdserve.engine.gguf_folder import write_folder  # noqa: PLC0415

    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _check_room(work / "room", gguf.stat().st_size)
        write_folder(gguf, work, progress)
        work.chmod(0o755)
        for path in work.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_room(file: Path, size: int) -> None:
    """OSError when not even ``size`` bytes fit: better now than after minutes of converting.

    The dense weights are never smaller than the quantized file.
    """
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)
    file.unlink()


@contextmanager
def _locked(path: Path, progress: ProgressSink) -> Iterator[None]:
    with path.open("a", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Progress("waiting for another process that converts this model", 1, 1))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _storage_problem(target: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: the converted model does not fit into {target.parent}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write the converted model into {target.parent}"
    return f"the converted model cannot be written into {target.parent}: {error}"
