"""Whether what a cluster writes has room: its state, converted models, sockets and logs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pdserve.cli.checks.check import Check
from pdserve.cluster.run_dir import FREE_BYTES_MIN, state_dir_of
from pdserve.config import DEFAULT_MODEL, Config
from pdserve.engine.resolve import cache_folder

# The embedded model and the converter's copy of it.
_MODEL_BYTES = 600 * 2**20


def disk(config: Config) -> Check:
    cache = cache_folder(config)
    new_model = config.model.path == DEFAULT_MODEL and not any(cache.glob("*/config.json"))
    needs = (
        ("state_dir", state_dir_of(config), FREE_BYTES_MIN),
        ("model_cache", cache, _MODEL_BYTES if new_model else 0),
        ("TMPDIR", Path(tempfile.gettempdir()), FREE_BYTES_MIN),
    )
    problems, free = [], []
    for key, wanted, bytes_needed in needs:
        place = existing(wanted)
        room = shutil.disk_usage(place).free
        free.append(f"{room / 2**30:.1f} GiB at {place}")
        if room < bytes_needed:
            problems.append(
                f"{key}: {room // 2**20} MiB free at {place}, {bytes_needed // 2**20} needed"
            )
        else:
            problems += [f"{key}: {text}" for text in _unwritable(place)]
    if problems:
        advice = "make room, or set that key to another folder"
        return Check("disk", False, "; ".join(problems), remedy=advice)
    return Check("disk", True, "free: " + ", ".join(dict.fromkeys(free)))


def existing(path: Path) -> Path:
    """The folder itself, else the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def _unwritable(place: Path) -> list[str]:
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"seen")
    except OSError as error:
        return [f"{place} cannot be written: {error.strerror}"]
    return []
