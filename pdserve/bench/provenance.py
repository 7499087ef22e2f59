"""Where and of what a result was made: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("pdserve", "aiohttp", "numpy", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that offers the load; the server's own may be another."""

    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    system: str
    load_1m: float  # before the run: others at work spoil figures


def machine() -> Machine:
    return Machine(
        cpu=_cpu(Path("/proc/cpuinfo")),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        load_1m=os.getloadavg()[0],
    )


def _cpu(path: Path) -> str:
    for line in path.read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the checkout that this code runs from, "+" where it was changed; None without one."""
    head = _git("rev-parse", "HEAD")
    # A checkout that merely holds the environment that we are installed in is not ours.
    if head is None or _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
