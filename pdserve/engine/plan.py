"""How one step's rows are packed into one batch line, as arrays; pure.

All rows lie one after the other in a single line of T tokens. A row of few tokens is computed
token by token straight from the pool ("short": decode rows, mostly), a longer one as a whole
("long"). Nothing here loops in Python over tokens or context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdserve.engine.step import Row

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LongRow:
    """A row that is attended as a whole; its tokens are ``begin .. end`` of the line."""

    begin: int
    end: int
    start: int  # position of its first token
    table: Int64  # the blocks of positions 0 .. start + (end - begin)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything attention needs to know of a step. T tokens, S of them in short rows."""

    tokens: Int64  # [T]
    positions: Int64  # [T]
    slot_blocks: Int32  # [T]: the block that token's KV goes to
    slot_offsets: Int32  # [T]: and its place in that block
    tables: Int32  # [rows, width], C order
    short_tokens: Int32  # [S]: place in the line
    short_rows: Int32  # [S]: row of ``tables``
    short_contexts: Int32  # [S]: keys that the token sees, itself included
    long_rows: tuple[LongRow, ...]
    begins: Int64  # [rows + 1]: where each row's tokens start in the line

    @property
    def size(self) -> int:
        return len(self.tokens)


def plan_step(rows: Sequence[Row], block_size: int, short_limit: int) -> StepPlan:
    """``short_limit``: a row of at most so many tokens is short; 0 makes every row long."""
    count = len(rows)
    lengths = np.fromiter((len(row.tokens) for row in rows), np.int64, count)
    starts = np.fromiter((row.start for row in rows), np.int64, count)
    begins = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=begins[1:])
    total = int(begins[-1])
    tokens = np.empty(total, np.int64)
    blocks = -(-(starts + lengths) // block_size)
    tables = np.zeros((count, int(blocks.max())), np.int32)
    for index, row in enumerate(rows):
        tokens[begins[index] : begins[index + 1]] = row.tokens
        used = int(blocks[index])
        assert len(row.block_table) >= used, "a row's block table does not cover its tokens"
        tables[index, :used] = row.block_table[:used]
    row_of = np.repeat(np.arange(count, dtype=np.int32), lengths)
    positions = np.arange(total, dtype=np.int64) - np.repeat(begins[:-1] - starts, lengths)
    is_short = lengths <= short_limit
    short = np.flatnonzero(is_short[row_of])
    long_rows = tuple(
        LongRow(
            begin=int(begins[index]),
            end=int(begins[index + 1]),
            start=int(starts[index]),
            table=tables[index, : int(blocks[index])].astype(np.int64),
        )
        for index in np.flatnonzero(~is_short)
    )
    return StepPlan(
        tokens=tokens,
        positions=positions,
        slot_blocks=tables[row_of, positions // block_size],
        slot_offsets=(positions % block_size).astype(np.int32),
        tables=tables,
        short_tokens=short.astype(np.int32),
        short_rows=row_of[short],
        short_contexts=(positions[short] + 1).astype(np.int32),
        long_rows=long_rows,
        begins=begins,
    )


def wanted_logits(rows: Sequence[Row], plan: StepPlan) -> tuple[Int64, tuple[int, ...]]:
    """Places of the line whose logits the step needs.

    First one for each row that samples, in row order; then those that prompt log-probabilities
    read, row by row. The second value is the number of the former and of each of the latter.
    """
    sampled = [int(plan.begins[i + 1]) - 1 for i, row in enumerate(rows) if row.sampler is not None]
    parts: list[Int64] = [np.asarray(sampled, np.int64)]
    for index, row in enumerate(rows):
        if row.prompt_logprobs is not None:
            begin = int(plan.begins[index])
            parts.append(np.arange(begin, begin + len(row.targets), dtype=np.int64))
    return np.concatenate(parts), tuple(len(part) for part in parts)
