"""Python, the packages in the versions that ours were made for, a compiler, OpenTelemetry."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from pdserve.cli.checks.check import Check
from pdserve.config import Config
from pdserve.engine.compiler import find_compiler, try_compiler
from pdserve.errors import ConfigError

_SHOWN = ("torch", "transformers", "ray", "grpcio", "protobuf", "redis")
_STUBS = "import pdserve.v1.inference_pb2_grpc, pdserve.v1.worker_pb2_grpc, pdserve.v1.kv_pb2_grpc"
_TRACE_MODULES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")


def python(_: Config) -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info >= (3, 11) and sys.platform == "linux"
    text = f"Python {found} on {sys.platform}"
    return Check("python", good, text, remedy="Python 3.11 or later on Linux is needed")


def packages(_: Config) -> Check:
    """What is installed against what pdserve's own metadata asks for."""
    try:
        wanted = [Requirement(text) for text in requires("pdserve") or ()]
    except PackageNotFoundError:
        return Check("packages", False, "pdserve itself is not installed", remedy="make setup")
    problems = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(one.name)
        except PackageNotFoundError:
            problems.append(f"{one} is not installed")
            continue
        if not one.specifier.contains(found, prereleases=True):
            problems.append(f"{one.name} is {found}, needed is {one.specifier}")
    if problems:
        advice = "install pdserve again with pip, in an environment of its own"
        return Check("packages", False, ", ".join(problems), remedy=advice)
    return Check("packages", True, ", ".join(f"{name} {version(name)}" for name in _SHOWN))


def stubs(_: Config) -> Check:
    """The generated modules refuse a runtime that is older than their generator."""
    done = subprocess.run(
        [sys.executable, "-c", _STUBS], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        text = (done.stderr.strip().splitlines() or ["they cannot be imported"])[-1]
        return Check("stubs", False, text, remedy="upgrade protobuf and grpcio with pip")
    return Check("stubs", True, "protobuf and gRPC take the generated modules")


def compiler(_: Config) -> Check:
    """Tried, not only found: a start without it is slow, and says so in a log at best."""
    try:
        found = find_compiler()
        if found:
            return Check("compiler", True, try_compiler(found))
        problem = "no C++ compiler (g++)"
    except ConfigError as error:
        problem = str(error)
    text = f"{problem}: attention runs without its native kernel, slower"
    return Check("compiler", False, text, fatal=False, remedy="install g++, or set CXX to one")


def traces(config: Config) -> Check:
    """The router alone needs it, and starts when all the others have started."""
    endpoint = config.telemetry.traces.endpoint
    if not endpoint:
        return Check("traces", True, "not exported (telemetry.traces.endpoint is empty)")
    lacking = [name for name in _TRACE_MODULES if not _is_installed(name)]
    if not lacking:
        return Check("traces", True, f"OpenTelemetry is there to send them to {endpoint}")
    return Check(
        "traces",
        False,
        f"telemetry.traces.endpoint = {endpoint!r} needs OpenTelemetry, and {lacking[0]} is not "
        "installed",
        remedy="pip install '.[otel]' in the checkout, or leave the endpoint empty",
    )


def _is_installed(module: str) -> bool:
    """Imports at most the packages above it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
