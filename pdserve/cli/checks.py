"""What this machine has and lacks; each check looks at the real thing and answers in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pdserve.cluster.ports import check_free
from pdserve.cluster.redis_server import find_binary
from pdserve.cluster.run_dir import state_dir_of
from pdserve.config import Config
from pdserve.engine.embedded import find_embedded
from pdserve.engine.resolve import default_cache
from pdserve.errors import ConfigError

_PACKAGES = ("torch", "transformers", "ray", "grpcio", "protobuf", "redis")
_FREE_BYTES = 2 * 2**30
_MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """``good``: nothing is lacking. ``fatal``: a cluster cannot run without it."""

    name: str
    good: bool
    text: str
    fatal: bool = True


def all_checks(config: Config) -> tuple[Check, ...]:
    return (
        python(),
        packages(),
        compiler(),
        shared_memory(),
        redis_server(config),
        model(config),
        ports(config),
        disk(config),
        memory(),
        clock(),
    )


def python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    good = sys.version_info >= (3, 11) and sys.platform == "linux"
    return Check("python", good, f"Python {found} on {sys.platform}; 3.11 or later on Linux needed")


def packages() -> Check:
    found, lacking = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lacking.append(name)
    text = ", ".join(found) + (f"; lacking: {', '.join(lacking)}" if lacking else "")
    return Check("packages", not lacking, text)


def compiler() -> Check:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        text = "no C++ compiler (g++): attention runs without its native kernel, slower"
        return Check("compiler", False, text, fatal=False)
    return Check("compiler", True, found)


def shared_memory() -> Check:
    """A memfd that another process reads, as a decode worker reads a prefill worker's pool."""
    try:
        fd = os.memfd_create("pdserve-check", os.MFD_CLOEXEC)
    except OSError as error:
        return Check("shared memory", False, f"memfd_create: {error.strerror}")
    try:
        os.write(fd, b"seen")
        path = f"/proc/{os.getpid()}/fd/{fd}"
        done = subprocess.run(["cat", path], capture_output=True, timeout=10, check=False)
    finally:
        os.close(fd)
    good = done.stdout == b"seen"
    text = "another process reads a memfd of ours" if good else "a memfd of ours cannot be read"
    return Check("shared memory", good, text)


def redis_server(config: Config) -> Check:
    if config.cache.redis.mode != "local":
        return Check(
            "redis", True, f"none of our own (cache.redis.mode = {config.cache.redis.mode})"
        )
    try:
        binary = find_binary()
    except ConfigError as error:
        return Check("redis", False, str(error))
    done = subprocess.run(
        [str(binary), "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    good = done.returncode == 0
    return Check("redis", good, (done.stdout if good else done.stderr).strip()[:80])


def model(config: Config) -> Check:
    path = config.model.path
    embedded = find_embedded(path)
    if embedded is not None:
        folder = default_cache()
        ready = any(folder.glob(f"{embedded.name}-*/config.json"))
        return Check("model", True, f"{path}: {'converted' if ready else 'will be converted once'}")
    if (Path(path).expanduser() / "config.json").is_file():
        return Check("model", True, path)
    return Check(
        "model", False, f"{path} is no model folder here; a hub id would be downloaded", fatal=False
    )


def ports(config: Config) -> Check:
    router = config.router
    try:
        check_free(router.host, router.http_port, "router.http_port")
        check_free(router.host, router.grpc_port, "router.grpc_port")
    except ConfigError as error:
        return Check("ports", False, str(error))
    return Check("ports", True, f"{router.http_port} (HTTP) and {router.grpc_port} (gRPC) are free")


def disk(config: Config) -> Check:
    places = [_existing(state_dir_of(config)), _existing(default_cache()), Path("/tmp")]  # nosec B108  # noqa: S108
    least = min(places, key=lambda place: shutil.disk_usage(place).free)
    free = shutil.disk_usage(least).free
    return Check("disk", free >= _FREE_BYTES, f"{free / 2**30:.1f} GiB free at {least}")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def memory() -> Check:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines()
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    cores = len(os.sched_getaffinity(0))
    return Check("memory", free >= _MEMORY_BYTES, f"{free / 2**30:.1f} GiB free, {cores} cores")


def clock() -> Check:
    """Timers need a monotonic clock that runs as fast as sleep says."""
    begin = time.monotonic()
    time.sleep(0.1)
    took = time.monotonic() - begin
    return Check("clock", 0.09 < took < 1.0, f"0.1 s of sleep took {took:.3f} s")
