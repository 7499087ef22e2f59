"""The system's C++ compiler, and what is built with it: once for a host, however many want it.

find_compiler() -> command             $CXX may carry arguments of its own ("ccache g++")
try_compiler(command) -> its version   by compiling a line
sole_builder(folder, ...)              whoever holds it builds; the others then find what was built
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pdserve.errors import ConfigError

COMPILE_TIMEOUT_S = 120
_TRIAL_TIMEOUT_S = 30
_POLL_S = 0.05
_TRIAL = "#include <atomic>\nstd::atomic<int> one{1};\n"

Command = tuple[str, ...]


def find_compiler() -> Command:
    """$CXX, else g++ or c++; empty when there is none. ConfigError for a $CXX of no words."""
    asked = os.environ.get("CXX", "")
    try:
        words = tuple(shlex.split(asked))
    except ValueError as error:
        raise ConfigError(f"CXX = {asked!r}: {error}", param="CXX") from error
    if words:
        return words
    found = shutil.which("g++") or shutil.which("c++")
    return (found,) if found else ()


def try_compiler(command: Command) -> str:
    """The first line that it says of its version. ConfigError: it does not compile, and why."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "one.cpp")
        source.write_text(_TRIAL)
        compiling = [*command, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        run_compiler(compiling, _TRIAL_TIMEOUT_S)
    lines = run_compiler([*command, "--version"], _TRIAL_TIMEOUT_S).splitlines()
    return lines[0] if lines else " ".join(command)


def run_compiler(command: Sequence[str], timeout_s: float = COMPILE_TIMEOUT_S) -> str:
    """What it wrote. ConfigError names the program and the first line of its complaint."""
    name = command[0]
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        raise ConfigError(f"{name} failed: {lines[0] if lines else error}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{name} took longer than {timeout_s:g} s") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be run: {error.strerror}") from error
    return done.stdout


@contextlib.contextmanager
def sole_builder(
    folder: Path, patience_s: float = 2 * COMPILE_TIMEOUT_S, name: str = "build"
) -> Iterator[None]:
    """Held by one process at a time. One that was stopped while it held this costs ``patience_s``:
    then two may build, which is a waste and no more.
    """
    limit = time.monotonic() + patience_s
    with open(folder / f"{name}.lock", "wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < limit:
                    time.sleep(_POLL_S)
                    continue
            yield
            return
