"""The end of a process is seen by the end of a connection; a closed connection alone is none."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster.raylet import RayletWatch

# Accepts for ever; the first connection is closed at once, the others are kept.
SERVER = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listening", flush=True)
server.accept()[0].close()
kept = []
while True:
    kept.append(server.accept()[0])
    print("kept", flush=True)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    yield process
    process.kill()
    process.communicate()


def test_an_end_is_told_at_once_and_a_closed_connection_is_not(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    ended = threading.Event()
    watch = RayletWatch(str(tmp_path / "s"), ended.set)
    assert server.stdout is not None
    assert server.stdout.readline() == "kept\n", "it connects again"
    assert not ended.wait(0.5)
    began = time.monotonic()
    server.kill()
    assert ended.wait(2)
    print(f"told after {time.monotonic() - began:.2f} s")
    watch.stop()


def test_a_watch_that_was_stopped_tells_nothing(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    ended = threading.Event()
    watch = RayletWatch(str(tmp_path / "s"), ended.set)
    watch.stop()
    server.kill()
    assert not ended.wait(0.5)


def test_nobody_there_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "s"))
    with pytest.raises(ConnectionRefusedError):
        RayletWatch(str(tmp_path / "s"), lambda: None)
