"""All that was kept, as one page of tables: ``python -m bench.report > docs/figures.md``.

Goals are those of the measurements' modules; a figure beyond its goal is called missed. Each table
says when it was made, from which commit, and how busy the machine was before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.__main__ import MEASUREMENTS
from bench.record import RESULTS

_HEAD = """# Figures

Made by `make bench` from `bench/results/`; what they mean is in [performance.md](performance.md).
Intervals are of 95 %, resampled over the repeats; "x" is a ratio of means, run in turns.
"""


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0]) if arguments else RESULTS
    print("\n".join(page(folder)))
    return 0


def page(folder: Path) -> Iterable[str]:
    yield _HEAD
    for name, what in MEASUREMENTS.items():
        yield f"## {name}: {what}\n"
        path = folder / f"{name}.json"
        if path.exists():
            yield from _tables(json.loads(path.read_text("utf-8")))
        else:
            yield "Not measured.\n"


def _tables(record: Mapping[str, Any]) -> Iterable[str]:
    machine = record["machine"]
    gib = machine["memory_bytes"] / 2**30
    yield (
        f"{record['made']}, commit {record['commit'][:10]}, {machine['cores']} cores of "
        f"{machine['cpu']}, {gib:.0f} GiB, load before {machine['load_1m']:.2f}.\n"
    )
    yield "| | found | interval | goal | |"
    yield "|---|---|---|---|---|"
    for line in record["lines"]:
        found = f"{_short(line['value'])} {line['unit']}".strip()
        spread = "" if line["low"] is None else f"{_short(line['low'])} to {_short(line['high'])}"
        goal = line["goal"] or ""
        verdict = "" if not goal else "**missed**" if line["missed"] else "met"
        yield f"| {line['name']} | {found} | {spread} | {goal} | {verdict} |"
    yield ""


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
