"""Samples the next token of every row of a step, in one go and with one copy to the host.

state = sampler.open(sampling, token_ids, prompt_len)
loop:  [token] = sampler.sample(logits, [state]);  state.append(token.token_id)

The order of operations on a row: raw log-probabilities are taken; logit_bias, min_tokens (stop
tokens are excluded), repetition, frequency and presence penalties change the logits; then the
likeliest token is taken (temperature near 0; of equals the lowest id), or one is drawn after
temperature, min_p, top_k and top_p. A token depends on its row's logits and state alone.
sampler_reference.py is the same without any of the batching.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdserve.engine import logprobs
from pdserve.engine.draw import draw
from pdserve.engine.randomness import uniforms
from pdserve.engine.sampler_state import TokenState
from pdserve.engine.step import SamplerState
from pdserve.types import Sampling, TokenLogprob, TokenOut

# Weights of a draw that are worked on together: on a CPU they should stay in its caches (2 MiB of
# float64 measured best), elsewhere only the memory is bounded (512 MiB).
_ELEMENTS_AT_ONCE_CPU = 2**18
_ELEMENTS_AT_ONCE = 2**26


class TokenSampler:
    """Stateless but for the vocabulary's size; what a sequence needs is in its TokenState."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def open(self, sampling: Sampling, token_ids: Sequence[int], prompt_len: int) -> TokenState:
        """State for a sequence with ``token_ids`` (prompt, then generated) so far."""
        return TokenState(sampling, token_ids, prompt_len, self.vocab_size)

    def sample(self, logits: torch.Tensor, states: Sequence[SamplerState]) -> list[TokenOut]:
        """One token for each row of ``logits`` [n, V] (any float type and device, not changed)."""
        assert logits.shape == (len(states), self.vocab_size)
        if not states:
            return []
        own = [_own(state) for state in states]
        token_ids = _choose(logits, own)
        wanting = [row for row, state in enumerate(own) if state.sampling.logprobs is not None]
        if not wanting:
            return [TokenOut(token_id) for token_id in token_ids.tolist()]
        return _with_logprobs(logits, own, token_ids, wanting)

    def prompt_logprobs(
        self, logits: torch.Tensor, targets: Sequence[int], k: int
    ) -> tuple[TokenLogprob, ...]:
        """Of ``targets[i]`` under row i of ``logits`` [>= len(targets), V]; k alternatives."""
        return logprobs.prompt_logprobs(logits, targets, k)


def _own(state: SamplerState) -> TokenState:
    assert isinstance(state, TokenState)
    return state


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``logits[rows]``, without a copy when these are all."""
    if len(rows) == len(logits):
        return logits
    return logits[torch.tensor(rows, device=logits.device)]


def _choose(logits: torch.Tensor, states: Sequence[TokenState]) -> torch.Tensor:
    """int64 [n] on the logits' device."""
    if not any(state.adjusts or not state.greedy for state in states):
        return logits.argmax(-1)
    chosen = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    plain = [row for row, state in enumerate(states) if state.greedy and not state.adjusts]
    if plain:
        chosen[plain] = _rows(logits, plain).argmax(-1)
    changed = [row for row, state in enumerate(states) if state.greedy and state.adjusts]
    for row in changed:
        chosen[row] = _adjusted(logits[row], states[row]).argmax(-1)
    drawn = [row for row, state in enumerate(states) if not state.greedy]
    elements = _ELEMENTS_AT_ONCE_CPU if logits.device.type == "cpu" else _ELEMENTS_AT_ONCE
    at_once = max(1, elements // logits.shape[1])
    for start in range(0, len(drawn), at_once):
        part = drawn[start : start + at_once]
        chosen[part] = _draw(logits, states, part)
    return chosen


def _adjusted(row: torch.Tensor, state: TokenState) -> torch.Tensor:
    """A changed copy of one row [V]; float64 for float64 logits, else float32."""
    wide = torch.float64 if row.dtype == torch.float64 else torch.float32
    copy = row.to(wide, copy=True)
    state.adjust(copy)
    return copy


def _draw(logits: torch.Tensor, states: Sequence[TokenState], rows: list[int]) -> torch.Tensor:
    work = _rows(logits, rows).to(torch.float64, copy=True)
    for place, row in enumerate(rows):
        if states[row].adjusts:
            work[place] = _adjusted(logits[row], states[row])
    samplings = [states[row].sampling for row in rows]
    numbers = uniforms(
        [sampling.seed for sampling in samplings], [states[row].generated for row in rows]
    )
    return draw(work, samplings, numbers)


def _with_logprobs(
    logits: torch.Tensor,
    states: Sequence[TokenState],
    token_ids: torch.Tensor,
    wanting: list[int],
) -> list[TokenOut]:
    """Adds log-probabilities to the rows ``wanting`` them; ids and values come in one copy."""
    counts = [states[row].sampling.logprobs or 0 for row in wanting]
    packed = logprobs.packed_logprobs(
        _rows(logits, wanting), _rows(token_ids, wanting), max(counts)
    )
    width = packed.shape[1]
    flat = torch.cat([token_ids.double(), packed.flatten()]).tolist()
    found = [TokenOut(int(token_id)) for token_id in flat[: len(states)]]
    for place, (row, count) in enumerate(zip(wanting, counts, strict=True)):
        start = len(states) + place * width
        token_id = found[row].token_id
        entry = logprobs.unpack_logprobs(token_id, flat[start : start + width], count)
        found[row] = TokenOut(token_id, entry)
    return found
