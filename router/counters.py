"""What the router counts about its dealings with workers since it started.

How requests ended is counted by whoever answers clients; this is what no client ever sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Owned by the dispatcher and its sessions. Event loop only."""

    attempts: int = 0
    attempts_failed: int = 0
    takeovers: int = 0  # resumes that fenced a running request
    parked: int = 0  # attempts ended because their client read nothing
    recoveries_delayed: int = 0  # by the recovery budget
    late_events: int = 0  # of fenced attempts or former incarnations: dropped
    protocol_errors: int = 0  # gaps, repeats and other things that no worker should send

    def read(self) -> Mapping[str, int]:
        """By name; for the metrics front."""
        return dataclasses.asdict(self)
