"""One sequence in an engine: its tokens, its blocks and how far both are.

The state moves by pdserve.lifecycle.SEQUENCE alone. Between two steps these hold:

    computed <= known                          KV of positions 0 .. computed-1 is in the blocks
    committed * block_size <= computed         blocks 0 .. committed-1 are in the prefix index
    RUNNING: computed == known - 1             the last token was sampled, not yet computed
    blocks is empty exactly in WAITING and after the end (unless blocks are still lent)
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pdserve.engine.api import BlockHasher, Job, SeqId, Submit
from pdserve.engine.journal import Journal
from pdserve.engine.step import SamplerState
from pdserve.lifecycle import SEQUENCE, SequenceEvent, SequenceState
from pdserve.types import BlockKey, CachedTokens, ChunkTiming, Sampling, Tier, TokenLogprob


def _empty_table() -> npt.NDArray[np.int32]:
    return np.zeros(8, dtype=np.int32)


class Lender(enum.Enum):
    """Whoever may write into a sequence's blocks, until its command gives them back."""

    TIERS = "tiers"  # until TierReadDone
    IMPORT = "import"  # until ImportDone or ImportFailed


@dataclass(slots=True, eq=False)
class Sequence:
    id: SeqId
    job: Job  # IMPORT becomes GENERATE once nothing more is to be imported
    order: tuple[int, int]  # (priority, arrival); the smaller goes first
    sampling: Sampling
    deadline: float
    tokens: list[int]  # prompt, then generated
    prompt_len: int
    key_root: BlockKey
    keys: list[BlockKey]  # of full blocks of ``tokens``; grows with them
    caches: bool  # reads and fills the index and the tiers
    wants_prompt_logprobs: bool
    journal: Journal
    state: SequenceState = SequenceState.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    committed: int = 0
    # False once a block of its own was refused by the index: what follows cannot be found.
    chained: bool = True
    # Who may write into blocks ``first_lent ..``; they are not freed before it is done.
    lent_to: Lender | None = None
    first_lent: int = 0
    # The first lent block whose key was forgotten while it was lent: what the lender has in hand
    # from there on may be what was forgotten.
    suspect_from: int | None = None
    reported: int = 0  # PREFILL: blocks that a BlocksReady named
    owed: int = 0  # tokens still to compute, as counted in the load
    sampler: SamplerState | None = None
    admitted_before: bool = False
    spoke: bool = False  # its first Tokens event is out
    sources: dict[int, Tier] = field(default_factory=dict)  # blocks that a cache held
    chunks: list[ChunkTiming] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    preemptions: int = 0
    _table: npt.NDArray[np.int32] = field(default_factory=_empty_table)

    @classmethod
    def of(cls, submit: Submit, arrival: int, block_size: int) -> Sequence:
        tokens = submit.tokens
        wants_prompt_logprobs = submit.sampling.prompt_logprobs is not None
        return cls(
            id=submit.seq,
            job=submit.job,
            order=(submit.priority, arrival),
            sampling=submit.sampling,
            deadline=submit.deadline,
            tokens=list(tokens.token_ids),
            prompt_len=tokens.prompt_len,
            key_root=tokens.key_root,
            keys=list(tokens.block_keys[: len(tokens.token_ids) // block_size]),
            # Log-probabilities of the prompt need every position computed.
            caches=not tokens.bypass_cache and not wants_prompt_logprobs,
            wants_prompt_logprobs=wants_prompt_logprobs,
            journal=Journal(len(tokens.token_ids)),
        )

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def advance(self, event: SequenceEvent) -> None:
        self.state = SEQUENCE.next(self.state, event)

    # ---- keys ------------------------------------------------------------------------------------

    def extend_keys(self, hasher: BlockHasher, block_size: int) -> None:
        """Keys for every full block of the tokens known."""
        while (len(self.keys) + 1) * block_size <= len(self.tokens):
            start = len(self.keys) * block_size
            parent = self.keys[-1] if self.keys else self.key_root
            self.keys.append(hasher(parent, self.tokens[start : start + block_size]))

    # ---- blocks ----------------------------------------------------------------------------------

    @property
    def table(self) -> npt.NDArray[np.int32]:
        """int32 [number of blocks]; a view that is valid until the next change of blocks."""
        return self._table[: len(self.blocks)]

    def add_blocks(self, blocks: Iterable[int]) -> None:
        start = len(self.blocks)
        self.blocks.extend(blocks)
        end = len(self.blocks)
        if end > len(self._table):
            grown = np.zeros(max(end, 2 * len(self._table)), dtype=np.int32)
            grown[:start] = self._table[:start]
            self._table = grown
        self._table[start:end] = self.blocks[start:]

    def replace_block(self, index: int, block: int) -> int:
        """Puts another block in place ``index``; returns the one that was there."""
        old = self.blocks[index]
        self.blocks[index] = block
        self._table[index] = block
        return old

    def pop_block(self) -> int:
        return self.blocks.pop()

    def drop_blocks(self) -> list[int]:
        """Forgets the blocks, and that anything was computed."""
        blocks, self.blocks = self.blocks, []
        self.computed = 0
        self.committed = 0
        self.chained = True
        return blocks

    # ---- loans -----------------------------------------------------------------------------------

    def lend(self, lender: Lender, first: int) -> None:
        self.lent_to = lender
        self.first_lent = first
        self.suspect_from = None

    def forget(self, keys: Collection[BlockKey]) -> None:
        """``keys`` leave every index now: of lent blocks, those from the first of them on are
        suspect whatever the lender will say."""
        if self.lent_to is None:
            return
        for index in range(self.first_lent, self.trusted(len(self.keys))):
            if self.keys[index] in keys:
                self.suspect_from = index
                return

    def trusted(self, blocks: int) -> int:
        """How many of the first ``blocks``, which the lender gave back, may be relied on."""
        return blocks if self.suspect_from is None else min(blocks, self.suspect_from)

    # ---- accounts --------------------------------------------------------------------------------

    def cached(self, block_size: int) -> CachedTokens:
        """Prompt tokens that were found in a cache, by tier."""
        counts = dict.fromkeys(Tier, 0)
        for index, tier in self.sources.items():
            counts[tier] += max(0, min(block_size, self.prompt_len - index * block_size))
        return CachedTokens(counts[Tier.DEVICE], counts[Tier.HOST], counts[Tier.REDIS])
