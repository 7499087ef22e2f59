"""The wheel holds every package, and works where there is no checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.source_tree import ROOMS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def test_every_package_is_listed_and_every_listed_one_exists() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert sorted(PACKAGES) == sorted(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder."""
    version = importlib.metadata.version("setuptools")
    assert int(version.split(".")[0]) >= 77, f"setuptools {version} cannot read pyproject.toml"
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, source / room, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("pdserve-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment's bin folder: the wheel, and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--quiet", wheel],
        check=True,
    )
    (site,) = folder.glob("lib/python3*/site-packages")
    # A path that a .pth file names is searched last, and its own .pth files (an editable install
    # of the checkout among them) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def outside(command: list[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_holds_code_stubs_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        folder = ROOT / package.replace(".", "/")
        for path in folder.iterdir():
            if path.suffix in (".py", ".pyi", ".cpp", ".typed"):
                assert path.relative_to(ROOT).as_posix() in names
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "router" / "page").iterdir()}
    assert page <= names
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(ROOMS)


def test_the_command_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = outside([installed / "pdserve", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("up", "status", "generate", "bench", "doctor"):
        assert command in done.stdout


def test_the_packages_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    names = ", ".join(PACKAGES)
    code = f"import {names}, sys\nfor n in {PACKAGES!r}: print(sys.modules[n].__file__)"
    done = outside([installed / "python", "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if str(installed.parent) not in line] == []
    version = outside(
        [installed / "python", "-c", "import importlib.metadata as m; print(m.version('pdserve'))"],
        tmp_path,
    )
    assert version.stdout.strip() == PROJECT["project"]["version"]
