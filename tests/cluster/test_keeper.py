"""A worker that stays suspect is killed once a bound; one that does not start is tried again."""

from __future__ import annotations

import subprocess
import sys
import time

from pdserve.cluster.keeper import Suspects


def view(**states: str) -> list[dict[str, str]]:
    return [{"id": name, "incarnation": "1", "state": state} for name, state in states.items()]


def test_only_who_stays_suspect_is_overdue() -> None:
    suspects = Suspects(kill_after_s=30)
    assert suspects.overdue(view(a="suspect", b="ready", c="starting", d="draining"), 0) == []
    assert suspects.overdue(view(a="suspect", b="suspect"), 29) == []
    assert suspects.overdue(view(a="suspect", b="suspect"), 30) == ["a"]
    assert suspects.overdue(view(a="suspect", b="suspect"), 31) == []
    assert suspects.overdue(view(a="suspect", b="suspect"), 59) == ["b"]
    assert suspects.overdue(view(a="suspect"), 60) == ["a"]  # the first kill did not help


def test_who_recovers_or_is_replaced_starts_afresh() -> None:
    suspects = Suspects(kill_after_s=10)
    suspects.overdue(view(a="suspect"), 0)
    suspects.overdue(view(a="ready"), 5)
    assert suspects.overdue(view(a="suspect"), 9) == []
    assert suspects.overdue(view(a="suspect"), 12) == []
    other = [{"id": "a", "incarnation": "2", "state": "suspect"}]
    assert suspects.overdue(other, 19) == []
    assert suspects.overdue(other, 28) == []
    assert suspects.overdue(other, 29) == ["a"]


def test_the_keeper_kills_and_goes_on_when_the_router_is_away() -> None:
    # In a process of its own: the module brings in Ray, which must see the environment of its
    # start in the tests that start one.
    code = """
import threading
from pdserve.cluster import keeper
from pdserve.cluster.actor import StartFailure
from pdserve.cluster.seen import Seen
from pdserve.config import TimersConfig
from pdserve.errors import WorkerLost

keeper._LOOK_S, keeper._RETRY_MIN_S = 0.02, 0.1
killed, notes, looks, both = [], [], [], threading.Event()

def router_view():
    looks.append(1)
    if len(looks) < 5:
        raise WorkerLost("the router is starting")
    return [{"id": name, "incarnation": "1", "state": "suspect"} for name in ("decode-0", "alien")]

def kill(worker):
    killed.append(worker)
    if set(killed) == {"decode-0", "prefill-0"}:
        both.set()

seen = {"decode-0": Seen(), "prefill-0": Seen(failure=StartFailure("does_not_fit", "no"))}
one = keeper.Keeper(router_view, lambda: seen, kill, TimersConfig(kill_after_s=1), notes.append)
one.start()
assert both.wait(20), (killed, looks)
one.stop()
assert "alien" not in killed
assert notes[0] == "decode-0 was suspect for 1 s; killing it", notes
"""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 50
