"""``pdserve status``: the workers of a running cluster, as its router sees them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from pdserve.cli.options import find_fronts
from pdserve.cluster import router_view

_COLUMNS = ("id", "state", "role", "pid", "node", "address", "running", "waiting")


def run(parsed: argparse.Namespace) -> int:
    workers = router_view.workers(find_fronts(parsed).http)
    print(json.dumps({"workers": workers}, indent=2) if parsed.json else table(workers))
    return 0


def table(workers: list[dict[str, Any]]) -> str:
    """One line a worker under one line of headings."""
    rows = [[*_COLUMNS, "blocks used+cached/total"], *(_row(worker) for worker in workers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(worker: Mapping[str, Any]) -> list[str]:
    cells = [str(worker.get(name, "")) for name in _COLUMNS]
    blocks = worker.get("blocks", {})
    used, cached, total = (blocks.get(name, "?") for name in ("used", "cached", "total"))
    return [*cells, f"{used}+{cached}/{total}"]
