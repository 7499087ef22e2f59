"""A runner without a model: cheap, exact, and wrong as soon as any KV is wrong.

A token's "KV" is its id and its position; the next token is a keyed hash of all ids and positions
so far *as the row's blocks hold them*. So a block that was mixed up, overwritten, imported wrongly
or not at all changes the stream from there on, and ``expected_tokens`` says what it should be.
For tests of scheduling, of workers, and of the whole cluster in one process. CPU pools only.

In a block: u32 [2, block_size], ids (plus one, so that a zeroed position is none) and positions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pdserve.engine.layout import BlockLayout, LayerShape, block_layout
from pdserve.engine.step import Row, RowResult, SamplerState
from pdserve.types import Sampling, TokenLogprob, TokenOut, TopLogprob

if TYPE_CHECKING:  # torch comes with it
    from pdserve.engine.memory import PoolMemory

U32 = npt.NDArray[np.uint32]


def synthetic_layout(block_size: int) -> BlockLayout:
    """8 bytes a token: one layer, one head, keys and values of one float32."""
    return block_layout(block_size, "float32", (LayerShape(1, 1, 1),))


@dataclass(slots=True)
class SyntheticSampler:
    sampling: Sampling
    generated: int

    def append(self, token_id: int) -> None:
        self.generated += 1


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """The function that the runner computes."""

    vocab_size: int = 1000
    key: bytes = b"synthetic"

    def context(self, token_ids: Sequence[int]) -> U32:
        """uint32 [2, n]: what correct KV of these tokens looks like."""
        ids = np.asarray(token_ids, dtype=np.uint32) + np.uint32(1)
        return np.stack([ids, np.arange(len(token_ids), dtype=np.uint32)])

    def next_token(self, context: U32, sampling: Sampling, generated: int) -> TokenOut:
        """Follows ``context`` (uint32 [2, n]); honours seed, temperature and min_tokens."""
        seed = sampling.seed if sampling.temperature > 0 else 0
        digest = hashlib.blake2b(key=self.key, digest_size=8)
        digest.update(seed.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(context, dtype="<u4").tobytes())
        token = int.from_bytes(digest.digest(), "little") % self.vocab_size
        while generated < sampling.min_tokens and token in sampling.stop_token_ids:
            token = (token + 1) % self.vocab_size
        if sampling.logprobs is None:
            return TokenOut(token)
        return TokenOut(token, self.logprob(token, context.shape[1], sampling.logprobs))

    def logprob(self, token: int, position: int, alternatives: int) -> TokenLogprob:
        """Of ``token`` at ``position``; made up, but always the same."""
        value = -((token * 31 + position * 17) % 997) / 100
        top = tuple(
            TopLogprob((token + rank) % self.vocab_size, value - rank, rank + 1)
            for rank in range(alternatives)
        )
        return TokenLogprob(token, value, top)


class SyntheticRunner:
    """``seconds_per_token``: how long a step takes for each token that it computes."""

    def __init__(
        self,
        pool: PoolMemory,
        block_size: int,
        model: SyntheticModel | None = None,
        seconds_per_token: float = 0.0,
    ) -> None:
        self.model = model or SyntheticModel()
        self._block_size = block_size
        self._seconds_per_token = seconds_per_token
        words: U32 = pool.blocks.numpy().view(np.uint32)
        # [num_blocks, 2, block_size], a view of the pool
        self._kv = words[:, : 2 * block_size].reshape(pool.num_blocks, 2, block_size)
        assert np.shares_memory(self._kv, words)

    def open_sampler(
        self, sampling: Sampling, token_ids: Sequence[int], prompt_len: int
    ) -> SamplerState:
        return SyntheticSampler(sampling, len(token_ids) - prompt_len)

    def begin(self) -> None:
        """Any thread will do."""

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        if self._seconds_per_token:
            time.sleep(self._seconds_per_token * sum(len(row.tokens) for row in rows))
        for row in rows:
            self._write(row)
        return [self._answer(row) for row in rows]

    def zero_tail(self, block: int, used_tokens: int) -> None:
        self._kv[block, :, used_tokens:] = 0

    def finish(self) -> None:
        """Nothing is queued."""

    def _write(self, row: Row) -> None:
        positions = np.arange(row.start, row.start + len(row.tokens))
        blocks = row.block_table[positions // self._block_size]
        slots = positions % self._block_size
        self._kv[blocks, 0, slots] = np.asarray(row.tokens, dtype=np.uint32) + np.uint32(1)
        self._kv[blocks, 1, slots] = positions

    def _read(self, row: Row) -> U32:
        """uint32 [2, n]: all positions up to the row's last, through its block table."""
        length = row.start + len(row.tokens)
        blocks = row.block_table[: -(-length // self._block_size)]
        gathered: U32 = self._kv[blocks].transpose(1, 0, 2).reshape(2, -1)
        return gathered[:, :length]

    def _answer(self, row: Row) -> RowResult:
        token = None
        if row.sampler is not None:
            assert isinstance(row.sampler, SyntheticSampler)
            token = self.model.next_token(
                self._read(row), row.sampler.sampling, row.sampler.generated
            )
        if row.prompt_logprobs is None:
            return RowResult(token)
        alternatives = row.prompt_logprobs
        logprobs = tuple(
            self.model.logprob(target, row.start + index + 1, alternatives)
            for index, target in enumerate(row.targets)
        )
        return RowResult(token, logprobs)


def expected_tokens(
    model: SyntheticModel, token_ids: Sequence[int], prompt_len: int, sampling: Sampling
) -> list[int]:
    """What must follow ``token_ids`` (prompt, then generated), up to a stop id or max_tokens."""
    tokens = list(token_ids)
    while len(tokens) - prompt_len < sampling.max_tokens:
        generated = len(tokens) - prompt_len
        token = model.next_token(model.context(tokens), sampling, generated).token_id
        tokens.append(token)
        if token in sampling.stop_token_ids:
            break
    return tokens[len(token_ids) :]
