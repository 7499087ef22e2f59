"""Pictures of what was kept: ``python -m bench.pictures [RESULTS] [IMAGES]``.

Reads the result files of measurements and of ``pdserve bench``; draws what it finds and says what
it lacks. Needs the extra ``bench`` (matplotlib).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from bench.record import RESULTS

IMAGES = Path(__file__).parent.parent / "docs" / "images" / "performance"
_GROWTH_PANELS = 3


def main(arguments: Sequence[str]) -> int:
    results = Path(arguments[0]) if arguments else RESULTS
    images = Path(arguments[1]) if len(arguments) > 1 else IMAGES
    images.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pdserve"  # the same figures draw the same file
    growth, handoff = _read(results / "growth.json"), _read(results / "handoff.json")
    alone = _read(results / "router_alone.json")
    if growth is not None:
        _growth(growth, handoff, alone, images / "growth.svg")
    rates = sorted(results.glob("rates/rate-*.json"))
    if rates:
        _rates([json.loads(path.read_text("utf-8")) for path in rates], images / "rates.svg")
    timeline = _read(results / "timeline.json")
    if timeline is not None:
        _timeline(timeline, images / "timeline.svg")
    return 0


def _read(path: Path) -> Any:
    if not path.exists():
        print(f"{path.name} is not there: nothing is drawn of it", file=sys.stderr)
        return None
    return json.loads(path.read_text("utf-8"))


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def _growth(growth: Any, handoff: Any, alone: Any, path: Path) -> None:
    """Every curve on log axes: milliseconds, microseconds or a share of a core."""
    figure, panels = plt.subplots(1, _GROWTH_PANELS, figsize=(13, 4.2))
    steps, index, rest = panels
    for name, curve in growth["notes"].items():
        if "seconds" not in curve:
            continue
        if name.startswith("prefix index"):
            index.loglog(curve["x"], [1e6 * s for s in curve["seconds"]], "o-", label=name)
        else:
            label = f"{name}, against {curve['axis']}"
            steps.loglog(curve["x"], [1e3 * s for s in curve["seconds"]], "o-", label=label)
    memory = growth["notes"]["prefix index memory"]
    seen = [(x, b / 2**20) for x, b in zip(memory["x"], memory["bytes"], strict=True) if b > 0]
    index.loglog(*zip(*seen, strict=True), "s--", label="its memory, MiB")
    if handoff is not None:
        for name, curve in handoff["notes"]["growth"].items():
            label = f"hand-off over {name}, ms against tokens"
            rest.loglog(curve["tokens"], [1e3 * s for s in curve["seconds"]], "o-", label=label)
    if alone is not None:
        curve = alone["notes"]["router CPU against streams"]
        label = "router, % of a core against streams"
        rest.loglog(curve["streams"], [100 * s for s in curve["cpu_s_per_s"]], "s--", label=label)
    for panel, title in ((steps, "engine, ms"), (index, "prefix index, us"), (rest, "the rest")):
        panel.set_title(title)
        panel.legend(fontsize=7)
        panel.grid(visible=True, which="both", alpha=0.3)
    _save(figure, path)


def _rates(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Latency against offered rate: p50 and p99 of TTFT and of the gap between tokens."""
    results = sorted(results, key=lambda result: float(result["options"]["rate"]))
    rates = [float(result["options"]["rate"]) for result in results]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    titles = {"ttft": "time to first token, ms", "itl": "between tokens, ms"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for percent in ("p50", "p90", "p99"):
            found = [result["latencies_ms"][name][percent] for result in results]
            values = [one["value"] for one in found]
            panel.plot(rates, values, "o-", label=percent)
            if all(one["low"] is not None for one in found):
                low, high = ([one[end] for one in found] for end in ("low", "high"))
                panel.fill_between(rates, low, high, alpha=0.2)
        panel.set(title=title, xlabel="requests/s offered", yscale="log")
        panel.grid(visible=True, which="both", alpha=0.3)
        panel.legend()
    _save(figure, path)


def _timeline(timeline: Mapping[str, Any], path: Path) -> None:
    """One request's spans as bars, a row each, in order of their start."""
    spans = sorted(timeline["spans"], key=lambda span: (span["start_ms"], -span["end_ms"]))
    figure, panel = plt.subplots(figsize=(10, 0.8 + 0.28 * len(spans)))
    places = list(dict.fromkeys(span["where"] for span in spans))
    for row, span in enumerate(spans):
        took = span["end_ms"] - span["start_ms"]
        width = max(took, 0.003 * spans[-1]["end_ms"])  # what takes no time is seen, too
        color = f"C{places.index(span['where'])}"
        panel.barh(row, width, left=span["start_ms"], color=color, height=0.7)
        text = f"{span['name']} ({took:.1f} ms)" if took else span["name"]
        panel.text(span["start_ms"] + width, row, text, va="center", fontsize=7)
    panel.set_yticks(range(len(spans)), [span["where"] for span in spans], fontsize=7)
    panel.invert_yaxis()
    panel.set(xlabel="ms since the request came", title=timeline["title"])
    panel.margins(x=0.25)
    _save(figure, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
