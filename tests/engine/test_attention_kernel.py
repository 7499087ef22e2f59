"""Building the native kernel: once for a machine, kept on disk, and never in anybody's way."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pdserve.config import Config, EngineConfig
from pdserve.engine import native
from pdserve.engine.build import choose_kernel
from pdserve.engine.compiler import sole_builder
from pdserve.errors import ConfigError
from tests.engine.model_world import CPU, kernel, kernel_folder


def test_it_is_built_once_and_then_loaded(tmp_path: Path) -> None:
    first = native.load_native(tmp_path)
    assert first.kernels is not None, first.reason
    (built,) = tmp_path.glob("*.so")
    stamp = built.stat().st_mtime_ns
    again = native.load_native(tmp_path)
    assert again.kernels is not None
    assert list(tmp_path.glob("*.so")) == [built]
    assert built.stat().st_mtime_ns == stamp


def test_workers_that_start_together_compile_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler with arguments, which says how often it compiled, and ends when it may."""
    compiler, said, may_end = tmp_path / "compiler", tmp_path / "said", tmp_path / "may-end"
    compiler.write_text(COMPILER.format(made=kernel()._name))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"env SAID='{said}' MAY_END='{may_end}' {compiler} -pipe")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pdserve.engine.native import load_native\n"
        "assert load_native(Path(sys.argv[1])).reason == ''\n"
    )
    starting = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "kernels")]) for _ in range(3)
    ]
    limit = time.monotonic() + 60
    while not (said.exists() and all(is_at_the_lock(process.pid) for process in starting)):
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(0.2)  # for those whom nothing holds back
    assert said.read_text() == "-pipe\n"
    may_end.touch()
    assert [process.wait(60) for process in starting] == [0, 0, 0]
    assert said.read_text() == "-pipe\n"


# What it links is the kernel that is there already.
COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo one that is tried ;;
  *-shared*) for out; do :; done; cp {made} "$out" ;;
  *) echo "$1" >> "$SAID"; until [ -e "$MAY_END" ]; do sleep 0.05; done ;;
esac
"""


def is_at_the_lock(pid: int) -> bool:
    """Holds it, or waits for it."""
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        return any(fd.readlink().name == "build.lock" for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_a_builder_that_was_stopped_is_not_waited_for_forever(tmp_path: Path) -> None:
    began = time.monotonic()
    with sole_builder(tmp_path), sole_builder(tmp_path, patience_s=0.2):
        assert 0.2 <= time.monotonic() - began < 5


def test_a_compiler_of_half_a_quote_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "ccache 'g++")
    assert "No closing quotation" in native.load_native(tmp_path).reason


def test_without_a_compiler_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = Config(model_cache=str(tmp_path / "models"))
    library, note = choose_kernel(config, "float64", CPU)
    assert library is None
    assert note == (
        "attention: gather, slower than the native kernel, because no C++ compiler (g++) was found"
    )
    wanted = Config(model_cache=str(tmp_path), engine=EngineConfig(attention="native"))
    with pytest.raises(ConfigError, match="native, but no C"):
        choose_kernel(wanted, "float64", CPU)


def test_a_compiler_that_fails_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    loading = native.load_native(tmp_path / "kernels")
    assert loading.kernels is None
    assert "out of order" in loading.reason


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    loading = native.load_native(shared)
    assert loading.kernels is None
    assert "other users" in loading.reason
    assert not list(shared.iterdir())


def test_gather_is_taken_when_asked_for_and_for_other_dtypes(tmp_path: Path) -> None:
    asked = Config(engine=EngineConfig(attention="gather"))
    assert choose_kernel(asked, "float64", CPU) == (None, "attention: gather (asked for)")
    assert not native.native_supports(torch.float16, torch.device("cpu"))
    assert not native.native_supports(torch.bfloat16, torch.device("cuda"))


def test_only_one_openmp_runtime_is_loaded() -> None:
    """A second pool of threads would fight the first one for the cores."""
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from pdserve.engine.native import load_native\n"
        "assert load_native(Path(sys.argv[1])).kernels is not None\n"
        "files = {l.rsplit(maxsplit=1)[-1] for l in open('/proc/self/maps') if 'omp' in l}\n"
        "names = ('libgomp', 'libiomp', 'libomp')\n"
        "print(len({f for f in files if f.rsplit('/', 1)[-1].startswith(names)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(kernel_folder())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
