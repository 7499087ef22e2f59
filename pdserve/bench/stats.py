"""Percentiles, and how sure one can be of them: the bootstrap over repeats. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of the repeats' values. The interval is None with fewer than two of them."""

    value: float
    low: float | None
    high: float | None
    repeats: tuple[float, ...]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values. ``values`` must not be empty."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def estimate(repeats: Sequence[float], seed: int) -> Estimate | None:
    """Mean and its 95 % percentile-bootstrap interval: repeats are drawn with replacement,
    since requests of one run are not independent of each other. None for no values."""
    if not repeats:
        return None
    values = np.asarray(repeats, dtype=np.float64)
    low = high = None
    if len(values) > 1:
        draws = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
        means = values[draws].mean(axis=1)
        edge = 100 * (1 - CONFIDENCE) / 2
        low, high = percentile(means.tolist(), edge), percentile(means.tolist(), 100 - edge)
    return Estimate(float(values.mean()), low, high, tuple(repeats))
