"""Memory at large, memory that another process can read, and the room of Ray's object store."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

from pdserve.cli.checks.check import Check
from pdserve.config import Config

_MEMORY_BYTES = 2 * 2**30
# As a small pool: enough that a limit on the size of files or on locked pages shows.
_PROBE_BYTES = 64 * 2**20
# pdserve/cluster/ray_node.py asks Ray for so much.
_STORE_BYTES = 80 * 2**20
_STORE = Path("/dev/shm")  # nosec B108  # noqa: S108  (where Ray puts it)


def memory(_: Config) -> Check:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines()
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    cores = len(os.sched_getaffinity(0))
    return Check(
        "memory",
        free >= _MEMORY_BYTES,
        f"{free / 2**30:.1f} GiB free, {cores} cores",
        remedy="2 GiB are needed for the smallest cluster: end other programs",
    )


def shared_memory(_: Config) -> Check:
    """A memfd that another process reads, as a decode worker reads a prefill worker's pool."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < _PROBE_BYTES:
        text = f"no file may be longer than {limit} bytes, which holds for pools in memory too"
        return Check("shared memory", False, text, remedy="ulimit -f unlimited")
    try:
        fd = os.memfd_create("pdserve-check", os.MFD_CLOEXEC)
    except OSError as error:
        return Check("shared memory", False, f"memfd_create: {error.strerror}")
    try:
        os.posix_fallocate(fd, 0, _PROBE_BYTES)
        with mmap.mmap(fd, _PROBE_BYTES) as view:
            view[-4:] = b"seen"
        path = f"/proc/{os.getpid()}/fd/{fd}"
        command = ["tail", "-c", "4", path]
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except OSError as error:
        text = f"no pool of {_PROBE_BYTES // 2**20} MiB fits into memory: {error.strerror}"
        return Check("shared memory", False, text, remedy="raise the memory limit")
    finally:
        os.close(fd)
    if done.stdout != b"seen":
        text = "another process cannot read a memfd of ours"
        advice = "set transfer.transports to [tcp], or let /proc be mounted without hidepid"
        return Check("shared memory", False, text, remedy=advice)
    text = f"another process reads a memfd of ours ({_PROBE_BYTES // 2**20} MiB)"
    return Check("shared memory", True, text)


def object_store(config: Config) -> Check:
    """Ray keeps its object store in /dev/shm and moves it to a disk, slower, where it is small."""
    name = "object store"
    advice = "give it 128 MiB or more: mount -o remount,size=1G /dev/shm, docker --shm-size=1g"
    if config.pools.ray_address != "local":
        return Check(name, True, "of the Ray cluster that is joined: not looked at")
    try:
        with tempfile.TemporaryFile(dir=_STORE) as file:
            file.write(b"seen")
    except OSError as error:
        return Check(name, False, f"{_STORE} cannot be written: {error.strerror}", remedy=advice)
    free = shutil.disk_usage(_STORE).free
    text = f"{free / 2**20:.0f} MiB free at {_STORE}"
    return Check(name, free >= _STORE_BYTES, text, remedy=advice)
