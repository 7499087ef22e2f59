"""Finds and ends processes by the mark that a cluster leaves in their environment.

Every process that a cluster starts carries ``PDSERVE_RUN=<state folder>:<run id>`` from its first
instruction, and hands it to its own children. So what a killed ``pdserve up`` left behind is found
without trusting a pid that was written down, and nothing else is ever touched.

find -> pidfd -> look again -> SIGTERM -> grace -> SIGKILL, until nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "PDSERVE_RUN"


def mark_value(state_dir: Path, run_id: str) -> str:
    return f"{state_dir}:{run_id}"


@dataclass(frozen=True, slots=True)
class Marked:
    """A live process of a cluster."""

    pid: int
    mark: str
    command: str


def _read(pid: int, name: str) -> bytes:
    """A file of /proc; empty when the process is gone or belongs to somebody else."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return b""


def mark_of(pid: int) -> str:
    """The mark that the process was started with; empty without one."""
    wanted = MARK.encode() + b"="
    for entry in _read(pid, "environ").split(b"\0"):
        if entry.startswith(wanted):
            return os.fsdecode(entry[len(wanted) :])
    return ""


def _is_zombie(pid: int) -> bool:
    stat = _read(pid, "stat")
    return not stat or stat.rpartition(b")")[2].split()[:1] == [b"Z"]


def _parent(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _own_line() -> frozenset[int]:
    """This process and all of its ancestors."""
    line, pid = set(), os.getpid()
    while pid > 0 and pid not in line:
        line.add(pid)
        pid = _parent(pid)
    return frozenset(line)


def find_marked(state_dir: Path, run_id: str = "") -> tuple[Marked, ...]:
    """Live processes of the state folder's cluster (of one run, if given), ourselves excepted."""
    spared = _own_line()
    return tuple(
        found
        for found in _all_marked()
        if _matches(found.mark, state_dir, run_id) and found.pid not in spared
    )


def _matches(mark: str, state_dir: Path, run_id: str) -> bool:
    folder, colon, run = mark.rpartition(":")
    return bool(colon) and folder == str(state_dir) and run_id in ("", run)


def _all_marked() -> Iterator[Marked]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        mark = mark_of(pid)
        if mark and not _is_zombie(pid):
            command = os.fsdecode(_read(pid, "cmdline").replace(b"\0", b" ")).strip()
            yield Marked(pid, mark, command)


@contextlib.contextmanager
def _pinned(pid: int) -> Iterator[int]:
    """A pidfd of the process; -1 when it is gone. Its number cannot be taken over meanwhile."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


def signal_marked(process: Marked, number: signal.Signals) -> bool:
    """Signals the process if it still is the one that was found."""
    with _pinned(process.pid) as fd:
        if fd < 0 or mark_of(process.pid) != process.mark:
            return False
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return False
        return True


def kill_pid(pid: int, mark: str) -> bool:
    """SIGKILL to the process if it carries the mark; False when there is no such process."""
    return signal_marked(Marked(pid, mark, ""), signal.SIGKILL)


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Waits until the process ended; False when it still runs."""
    with _pinned(pid) as fd:
        if fd < 0:
            return True
        return bool(select.select([fd], [], [], max(0.0, timeout_s))[0])


def sweep(state_dir: Path, run_id: str = "", grace_s: float = 3.0) -> tuple[Marked, ...]:
    """Ends all marked processes and returns those it found. SIGKILL at once without grace.

    Goes on until a look finds none, since a process may start others while it is being ended.
    """
    ended: dict[int, Marked] = {}
    kill_at = time.monotonic() + grace_s
    asked: set[int] = set()
    while found := find_marked(state_dir, run_id):
        hard = time.monotonic() >= kill_at
        for process in found:
            ended[process.pid] = process
            if hard:
                signal_marked(process, signal.SIGKILL)
            elif process.pid not in asked:
                asked.add(process.pid)
                signal_marked(process, signal.SIGTERM)
        pause = 0.5 if hard else min(0.5, max(0.01, kill_at - time.monotonic()))
        wait_gone(found[0].pid, pause)
    return tuple(ended.values())
