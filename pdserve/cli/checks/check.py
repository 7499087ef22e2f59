"""What one check of ``pdserve doctor`` found."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    OK = "ok"
    NOTE = "note"  # a cluster runs without it, but less well
    BAD = "BAD"


@dataclass(frozen=True, slots=True)
class Check:
    """``good``: nothing is lacking. ``fatal``: a cluster cannot run without it."""

    name: str
    good: bool
    text: str  # what was seen
    fatal: bool = True
    remedy: str = ""  # what to do where it is not good

    @property
    def verdict(self) -> Verdict:
        if self.good:
            return Verdict.OK
        return Verdict.BAD if self.fatal else Verdict.NOTE

    @property
    def line(self) -> str:
        advice = f"; {self.remedy}" if self.remedy and not self.good else ""
        return f"{self.verdict.value:<5}{self.name:<15}{self.text}{advice}"
