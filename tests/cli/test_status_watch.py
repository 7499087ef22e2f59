"""The live ``pdserve status`` ends at the first Ctrl-C, wherever in the program it arrives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_picture import URL, moment

# Python raises the interrupt inside the finalizer, says so on stderr and drops it.
WATCH = """
import json, os, signal, sys, time
from pdserve.cli import snapshot, status
from pdserve.cluster.router_view import Access

class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.5)

class Asked:
    pictures = 0

now = snapshot.read(json.loads(sys.argv[1]), {url!r})

def fetch(access):
    Asked.pictures += 1
    if Asked.pictures == 3:
        Interrupted()
    return now

snapshot.fetch = fetch
status._INTERVAL_S = 0.01
status._watch(Access({url!r}))
print("ended after", Asked.pictures)
"""


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_python_drops_still_ends_it(signal: str) -> None:
    program = WATCH.format(url=URL, signal=signal)
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(moment())],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Exception ignored in" in done.stderr
    assert done.stdout.endswith("ended after 3\n")
