"""Where and of what a result was made: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("pdserve", "aiohttp", "numpy", "torch", "transformers")
# What measurements keep in a checkout: a second one is of the same code as the first.
_KEPT = ("bench/results", "docs/figures.md", "docs/images")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that offers the load; the server's own may be another."""

    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    system: str
    load_1m: float  # before the run: others at work spoil figures


@dataclass(frozen=True, slots=True)
class Made:
    """Seen before the run began."""

    at: datetime
    machine: Machine
    versions: dict[str, str]
    commit: str | None


def made_now() -> Made:
    return Made(datetime.now(UTC), machine(), versions(), commit())


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


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Of the checkout that holds this module in ``folder``, "+" where its code was changed.

    None without one.
    """
    head = _git(folder, "rev-parse", "HEAD")
    # A checkout that merely holds the environment that we are installed in is not ours.
    if head is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    code = (":(top)", *(f":(top,exclude){path}" for path in _KEPT))
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *code)
    # An answer that did not come is no clean checkout.
    return head + ("" if changed == "" else "+")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
