"""A short list of cases in which every pair of values of two dimensions occurs together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Case = Mapping[str, str]


def pairs_of(case: Case) -> set[tuple[str, str, str, str]]:
    names = sorted(case)
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}


def pairwise(
    dimensions: Mapping[str, Sequence[str]], allowed: Callable[[Case], bool], seed: int
) -> list[Case]:
    """Greedy cover: each case is the candidate with the most pairs that none had so far."""
    everything = [
        dict(zip(dimensions, values, strict=True))
        for values in itertools.product(*dimensions.values())
    ]
    candidates = [case for case in everything if allowed(case)]
    random.Random(seed).shuffle(candidates)
    missing = set().union(*(pairs_of(case) for case in candidates))
    cases: list[Case] = []
    while missing:
        best = max(candidates, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases
