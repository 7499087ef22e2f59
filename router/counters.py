"""What the router counts about itself since it started; read by the metrics front."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Owned by the dispatcher and its sessions. Event loop only."""

    requests: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    attempts: int = 0
    resumes: int = 0
    late_events: int = 0  # of fenced attempts or former incarnations: dropped
    protocol_errors: int = 0  # gaps, repeats and other things that no worker should send
    handoffs: int = 0
    handoffs_skipped: int = 0
