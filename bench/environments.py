"""Peers have environments of their own, made once and kept: their packages are not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pdserve.engine.resolve import default_cache


def environment(name: str, *packages: str) -> Path:
    """The Python of environment ``name``, which has ``packages``. CalledProcessError."""
    folder = default_cache().parent / "bench" / name
    python = folder / "bin" / "python"
    done = folder / ".made"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
        done.touch()
    return python
