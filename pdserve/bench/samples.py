"""What was seen of one request, and what was seen of one run."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """How a request ended. Only ``ANSWERED`` has latencies; the others are counted."""

    ANSWERED = "answered"
    REFUSED = "refused"  # the server said no: a 4xx, or 503
    FAILED = "failed"  # the server or the way to it broke
    CUT = "cut"  # the stream ended without saying that it was whole
    TIMED_OUT = "timed out"


@dataclass(frozen=True, slots=True)
class Sample:
    """Times in seconds from when the request was due, so that waiting to be sent counts."""

    outcome: Outcome
    detail: str  # of what is not ANSWERED: status and code, or the kind of error
    due_s: float  # from the start of the run
    sent_s: float  # from when it was due: how late this side was
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int
    token_s: tuple[float, ...]  # when each chunk with output arrived
    end_s: float
    counted_by: str = "usage"  # where output_tokens is from: usage, token ids or chunks

    @property
    def ttft_s(self) -> float:
        return self.token_s[0]

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between one chunk with output and the next."""
        return tuple(b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None where there is none."""
        if self.output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Run:
    """One repeat of the workload."""

    samples: tuple[Sample, ...]
    wall_s: float  # from the start until the last request ended
