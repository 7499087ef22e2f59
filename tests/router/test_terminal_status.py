"""``pdserve status`` on a terminal, against real fronts: width, a router that goes, each ending."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fronts_world import World, running_world

from pdserve.types import WorkerState
from tests.cli.terminal import Terminal

DRAWN = r"Ctrl-C ends this view"
Show = Callable[..., Terminal]


def command(world: World, folder: Path, *arguments: str) -> list[str]:
    where = ["--url", world.url, "--set", f"state_dir={folder}"]
    return [sys.executable, "-m", "pdserve.cli.main", "status", *where, *arguments]


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Show]:
    shown: list[Terminal] = []

    def begin(world: World, *arguments: str, columns: int = 80) -> Terminal:
        shown.append(Terminal(command(world, tmp_path, *arguments), columns=columns))
        return shown[-1]

    yield begin
    for terminal in shown:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_the_terminal_as_it_was(world: World, show: Show, number: signal.Signals) -> None:
    terminal = show(world)
    terminal.wait_for(DRAWN)
    assert "\x1b[?25l" in terminal.raw, "the cursor was never hidden, so nothing is shown"
    if number is signal.SIGINT:
        terminal.key(b"\x03")
    else:
        terminal.process.send_signal(number)
    assert terminal.wait_end() == 0
    assert "Traceback" not in terminal.raw


def test_it_follows_the_workers_and_the_width(
    world: World, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = show(world, columns=160)
    terminal.wait_for(r"^worker +state +role +pid +node +running .* Redis written$")
    terminal.wait_for(r"^decode-0 +ready +decode +4711 +here +2 +1 +5 +7 +64 +0/0 +0$")
    (view,) = world.dispatcher.workers()
    draining = replace(view, state=WorkerState.DRAINING)
    monkeypatch.setattr(world.dispatcher, "workers", lambda: (draining,))
    terminal.wait_for(r"^decode-0 +draining +decode +4711 ")
    terminal.resize(24, 40)
    terminal.wait_for(r"^worker +state +running +waiting$")
    terminal.wait_for(r"^decode-0 +draining +2 +1$")
    terminal.key(b"\x03")
    assert terminal.wait_end() == 0


def test_a_router_that_goes_is_said_above_the_last_picture(model_folder: Path, show: Show) -> None:
    with running_world(model_folder) as world:
        terminal = show(world)
        terminal.wait_for(DRAWN)
    terminal.wait_for(rf"^the router at {re.escape(world.url)} does not answer: ")
    terminal.wait_for(r"^decode-0 +ready ", after=len(terminal.lines))
    terminal.key(b"\x03")
    assert terminal.wait_end() == 0
    gone = show(world)
    gone.wait_for(r"^pdserve status: the router at .* does not answer")
    assert gone.wait_end() == 1
    assert "\x1b" not in gone.raw


def test_one_table_where_nobody_watches(world: World, show: Show, tmp_path: Path) -> None:
    piped = subprocess.run(
        command(world, tmp_path), capture_output=True, text=True, timeout=60, check=True
    )
    table = piped.stdout.splitlines()
    assert [line.split()[:2] for line in table] == [["id", "state"], ["decode-0", "ready"]]
    once = show(world, "--once", columns=160)
    assert once.wait_end(60) == 0
    assert [line for line in once.lines if line] == table
    assert "\x1b" not in once.raw
