"""The seam between an engine's scheduling and its model: one step in, one step out.

The scheduler decides *what* a step computes (rows), the runner computes it. The runner owns no
per-sequence state but what it put into ``SamplerState``; KV lives in the pool, found by the row's
block table. A row computes ``tokens`` at positions ``start ..``; KV of everything before ``start``
is in the table's blocks already, and the row's own KV is written to them before attention reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pdserve.types import Sampling, TokenLogprob, TokenOut


class SamplerState(Protocol):
    """What sampling needs to know of one sequence: a function of its tokens and its Sampling."""

    sampling: Sampling

    def append(self, token_id: int) -> None:
        """A generated token joined the sequence. Constant time."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    tokens: Sequence[int]  # at least one
    start: int  # position of tokens[0]
    # int32 [>= ceil((start + len(tokens)) / block_size)]: block numbers in the pool
    block_table: npt.NDArray[np.int32]
    # Set: sample the token that follows the last of ``tokens``.
    sampler: SamplerState | None = None
    # Not None: report log-probabilities of ``targets``, with so many alternatives.
    prompt_logprobs: int | None = None
    # targets[i] follows tokens[i]; may be one shorter than tokens (nothing follows the last).
    targets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    token: TokenOut | None  # set when the row had a sampler
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # one per target


class Runner(Protocol):
    """Computes steps on one model and one pool. Called on the engine's thread alone."""

    def begin(self) -> None:
        """On the thread that an engine has for its steps alone, before the first of them."""
        ...

    def open_sampler(
        self, sampling: Sampling, token_ids: Sequence[int], prompt_len: int
    ) -> SamplerState:
        """State for a sequence with ``token_ids`` (prompt, then generated) so far."""
        ...

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """One forward pass over all rows. Does not call SamplerState.append."""
        ...

    def zero_tail(self, block: int, used_tokens: int) -> None:
        """Zeroes the positions of a block from ``used_tokens`` on, in every layer."""
        ...

    def finish(self) -> None:
        """Waits until all that was asked for is in the blocks; raises where it cannot come."""
        ...
