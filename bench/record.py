"""What every measurement here does alike: repeats in turns, ratios with intervals, one file.

interleaved({ours, yardstick}) -> Series of each -> Record (ratios, misses) -> table and JSON

Ours and its yardstick are run A B A B, so that whatever else the machine does falls on both. A
ratio is of the two means; its interval resamples pairs of neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pdserve.bench.provenance import Made, made_now
from pdserve.bench.stats import CONFIDENCE, Estimate, estimate, percentile

REPEATS = 5
RESULTS = Path(__file__).parent / "results"
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Goal:
    """``at_least``: a smaller figure is a miss; else a larger one is."""

    value: float
    at_least: bool = True

    def met(self, found: float) -> bool:
        return found >= self.value if self.at_least else found <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a record: a value or a ratio with its interval, and what it should be."""

    name: str
    unit: str  # "x" for a ratio
    found: Estimate
    goal: Goal | None = None

    @property
    def missed(self) -> bool:
        return self.goal is not None and not self.goal.met(self.found.value)

    def text(self) -> str:
        found = self.found
        spread = ""
        if found.low is not None and found.high is not None:
            spread = f" ({found.low:.3g} to {found.high:.3g})"
        goal = f"   goal {self.goal}{': MISSED' if self.missed else ''}" if self.goal else ""
        return f"{self.name}: {found.value:.3g}{spread} {self.unit}{goal}"


@dataclass(slots=True)
class Record:
    """One measurement's figures. Made before the run: the machine's load is noted then."""

    name: str
    seed: int = 0
    made: Made = field(default_factory=made_now)
    lines: list[Line] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # what a reader or a picture needs

    def value(
        self, name: str, unit: str, repeats: Sequence[float], goal: Goal | None = None
    ) -> Estimate:
        found = estimate(repeats, self.seed)
        assert found is not None, f"{name} was not measured"
        return self._add(Line(name, unit, found, goal))

    def ratio(
        self, name: str, ours: Sequence[float], other: Sequence[float], goal: Goal | None = None
    ) -> Estimate:
        return self._add(Line(name, "x", ratio(ours, other, self.seed), goal))

    def _add(self, line: Line) -> Estimate:
        self.lines.append(line)
        print(line.text(), flush=True)
        return line.found

    def write(self, folder: Path = RESULTS) -> Path:
        """Whole or not at all; replaces an earlier result of the same name."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(self._document(), indent=1, allow_nan=False) + "\n", "utf-8")
        part.replace(path)
        return path

    def _document(self) -> dict[str, Any]:
        made = self.made
        return {
            "name": self.name,
            "made": f"{made.at:%Y-%m-%dT%H:%M:%SZ}",
            "machine": dataclasses.asdict(made.machine),
            "load_1m_after": os.getloadavg()[0],
            "versions": made.versions,
            "commit": made.commit,
            "seed": self.seed,
            "confidence": CONFIDENCE,
            "lines": [
                {
                    "name": line.name,
                    "unit": line.unit,
                    **dataclasses.asdict(line.found),
                    "goal": None if line.goal is None else str(line.goal),
                    "missed": line.missed,
                }
                for line in self.lines
            ],
            "notes": self.notes,
        }


def interleaved(
    cases: Mapping[str, Callable[[], float]], repeats: int = REPEATS, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs the cases in turns; what each returned, without the warm-up rounds."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, run in cases.items():
            value = run()
            if turn >= warmup:
                found[name].append(value)
    return found


def ratio(ours: Sequence[float], other: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of ``ours`` over mean of ``other``; ``repeats`` holds the ratio of each pair."""
    if len(ours) != len(other) or not ours:
        raise ValueError(f"{len(ours)} and {len(other)} repeats cannot be paired")
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(other, dtype=np.float64)
    low = high = None
    if len(a) > 1:
        draws = np.random.default_rng(seed).integers(0, len(a), (_RESAMPLES, len(a)))
        means = (a[draws].mean(axis=1) / b[draws].mean(axis=1)).tolist()
        edge = 100 * (1 - CONFIDENCE) / 2
        low, high = percentile(means, edge), percentile(means, 100 - edge)
    return Estimate(float(a.mean() / b.mean()), low, high, tuple((a / b).tolist()))
