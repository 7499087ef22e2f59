"""How long work that prepares a model says what it is doing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Step ``index`` (from 1) of ``total`` begins."""

    text: str
    index: int
    total: int


ProgressSink = Callable[[Progress], None]
