"""``pdserve status``: a running cluster as its router sees it; live on a terminal, else once.

ask the router -> draw -> a second -> ask ... Ctrl-C: the last picture stays, status 0
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from pdserve.cli.options import find_fronts
from pdserve.cluster import router_view
from pdserve.cluster.router_view import Access
from pdserve.errors import WorkerLost

_COLUMNS = ("id", "state", "role", "pid", "node", "address", "running", "waiting")
_INTERVAL_S = 1.0


def run(parsed: argparse.Namespace) -> int:
    access = find_fronts(parsed).http
    if parsed.json:
        print(json.dumps({"workers": router_view.workers(access)}, indent=2))
    elif parsed.once or not _can_redraw():
        print(table(router_view.workers(access), lacking(router_view.live(access))))
    else:
        _watch(access)
    return 0


def _can_redraw() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


@dataclass(slots=True)
class _Interrupts:
    """Ctrl-C and SIGTERM, remembered: Python drops an exception that a signal raises while an
    object is finalized (``__del__``), and the user would have to ask again."""

    told: bool = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._tell)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if not self.told:  # a second one must not cut short how the terminal is left
            self.told = True
            raise KeyboardInterrupt


def _watch(access: Access) -> None:
    """Until Ctrl-C. WorkerLost when the router does not answer the first time."""
    # Imported here: one table needs no rich.
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    from pdserve.cli import snapshot  # noqa: PLC0415
    from pdserve.cli.picture import picture  # noqa: PLC0415

    now, trouble = snapshot.fetch(access), ""
    console = Console()
    interrupts = _Interrupts()
    interrupts.listen()
    try:
        with Live(picture(now, console.width), console=console, auto_refresh=False) as screen:
            while not interrupts.told:
                time.sleep(_INTERVAL_S)
                try:
                    now, trouble = snapshot.fetch(access), ""
                except WorkerLost as error:
                    trouble = str(error)
                screen.update(picture(now, console.width, trouble), refresh=True)
    except KeyboardInterrupt:
        return


def lacking(live: Mapping[str, Any]) -> list[str]:
    """Why the cluster is not ready, or else what it falls short of; and who is not there."""
    from pdserve.cli.snapshot import not_there  # noqa: PLC0415  (msgspec, for a table alone)

    found = [f"degraded: {text}" for text in live.get("shortfalls", ())]
    if not live.get("ready", False):
        found = [f"not ready: {live.get('reason') or 'it does not say why'}"]
    return [*found, *(not_there(worker) for worker in live.get("missing", ()))]


def table(workers: list[dict[str, Any]], lacking: Sequence[str] = ()) -> str:
    """One line a worker under one line of headings, then what does not work as it should."""
    rows = [[*_COLUMNS, "blocks used+cached/total"], *(_row(worker) for worker in workers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines += [
        f"{one.get('id')} is degraded: {one['degraded']}" for one in workers if one.get("degraded")
    ]
    return "\n".join(line.rstrip() for line in [*lines, *lacking])


def _row(worker: Mapping[str, Any]) -> list[str]:
    cells = [str(worker.get(name, "")) for name in _COLUMNS]
    blocks = worker.get("blocks", {})
    used, cached, total = (blocks.get(name, "?") for name in ("used", "cached", "total"))
    return [*cells, f"{used}+{cached}/{total}"]
