"""Peers stand still outside their turns: an idle engine that polls takes a core from the others.

started with start_new_session -> stop -> (awake: its turn, then stopped again) ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any


def stop(process: subprocess.Popen[Any]) -> None:
    """With all processes of its session's first group."""
    os.killpg(process.pid, signal.SIGSTOP)


def wake(process: subprocess.Popen[Any]) -> None:
    """So that it can end; nothing where it has ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)


@contextlib.contextmanager
def awake(process: subprocess.Popen[Any]) -> Iterator[None]:
    os.killpg(process.pid, signal.SIGCONT)
    try:
        yield
    finally:
        stop(process)
