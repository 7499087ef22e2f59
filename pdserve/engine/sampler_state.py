"""What sampling remembers of one sequence: a function of its tokens and its Sampling.

open(token_ids) -> (adjust | append)* ; append is constant time, adjust is vectorized over the
*different* tokens seen. Opening with the tokens of a running sequence gives an equal state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pdserve.errors import InvalidRequest
from pdserve.types import Sampling

# Below it the likeliest token is taken; a division by less would only lose precision.
GREEDY_BELOW = 1e-5

NO_IDS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)


class Seen:
    """The different tokens of a sequence and how often each was generated."""

    __slots__ = ("_counts", "_ids", "_places", "_size")

    def __init__(
        self, listed: npt.NDArray[np.int64], generated: npt.NDArray[np.int64], vocab_size: int
    ) -> None:
        """``listed``: tokens to know even if they were never generated; [m] and [n]."""
        ids = np.unique(np.concatenate([listed, generated]))
        ids = ids[ids < vocab_size]  # an id that the model's head lacks has no logit
        self._size = len(ids)
        room = max(64, 2 * self._size)
        self._ids = np.zeros(room, dtype=np.int64)
        self._ids[: self._size] = ids
        self._counts = np.zeros(room, dtype=np.float64)
        per_id = np.bincount(generated[generated < vocab_size], minlength=vocab_size)
        self._counts[: self._size] = per_id[ids]
        self._places = {token_id: place for place, token_id in enumerate(ids.tolist())}

    def add(self, token_id: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._size
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._places[token_id] = place
            self._ids[place] = token_id
            self._size += 1
        self._counts[place] += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.float64]:
        return self._counts[: self._size]


class TokenState:
    """Implements pdserve.engine.step.SamplerState; owned by the engine's thread."""

    __slots__ = ("_bias", "_bias_ids", "_seen", "_stops", "generated", "greedy", "sampling")

    def __init__(
        self, sampling: Sampling, token_ids: Sequence[int], prompt_len: int, vocab_size: int
    ) -> None:
        assert 0 <= prompt_len <= len(token_ids)
        self.sampling = sampling
        # How many tokens were generated: the index of the next one.
        self.generated = len(token_ids) - prompt_len
        self.greedy = sampling.temperature < GREEDY_BELOW
        self._seen = _seen(sampling, token_ids, prompt_len, vocab_size)
        self._bias_ids = np.array([token_id for token_id, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([value for _, value in sampling.logit_bias], np.float64)
        if len(self._bias_ids) and not (
            0 <= self._bias_ids.min() <= self._bias_ids.max() < vocab_size
        ):
            raise InvalidRequest(
                f"logit_bias: token ids must lie between 0 and {vocab_size - 1}", param="logit_bias"
            )
        # An end-of-sequence id beyond the model's head can never be sampled.
        stops = [token_id for token_id in sampling.stop_token_ids if token_id < vocab_size]
        self._stops = np.array(stops, np.int64) if sampling.min_tokens else NO_IDS

    def append(self, token_id: int) -> None:
        self.generated += 1
        if self._seen is not None:
            self._seen.add(token_id)

    @property
    def adjusts(self) -> bool:
        """Whether the next token is drawn from other logits than the model's."""
        return self._seen is not None or len(self._bias) > 0 or self._holds_back_stops

    @property
    def _holds_back_stops(self) -> bool:
        return len(self._stops) > 0 and self.generated < self.sampling.min_tokens

    def adjust(self, row: torch.Tensor) -> None:
        """Applies bias, min_tokens and penalties to ``row`` in place; [V] float32 or float64."""
        if len(self._bias):
            ids = torch.from_numpy(self._bias_ids).to(row.device)
            row.index_add_(0, ids, torch.from_numpy(self._bias).to(row))
        if self._holds_back_stops:
            row.index_fill_(0, torch.from_numpy(self._stops).to(row.device), -torch.inf)
        if self._seen is not None:
            self._penalize(row, self._seen)
        # Absurd parameters overflow; they must not make NaN, which would spread in the batch.
        largest = torch.finfo(row.dtype).max / 4
        row.nan_to_num_(nan=-torch.inf, posinf=largest, neginf=-torch.inf)

    def _penalize(self, row: torch.Tensor, seen: Seen) -> None:
        sampling = self.sampling
        ids = torch.from_numpy(seen.ids).to(row.device)
        counts = torch.from_numpy(seen.counts).to(row)
        values = row[ids]
        if sampling.repetition_penalty != 1.0:
            # A positive logit is divided and a negative one multiplied: both become less likely.
            values = torch.where(
                values < 0,
                values * sampling.repetition_penalty,
                values / sampling.repetition_penalty,
            )
        values -= counts * sampling.frequency_penalty
        values -= (counts > 0) * sampling.presence_penalty
        row[ids] = values


def _seen(
    sampling: Sampling, token_ids: Sequence[int], prompt_len: int, vocab_size: int
) -> Seen | None:
    """None when no penalty asks for it. Repetition counts the prompt, the others do not."""
    repetition = sampling.repetition_penalty != 1.0
    if not (repetition or sampling.frequency_penalty or sampling.presence_penalty):
        return None
    ids = np.array(token_ids, dtype=np.int64)
    return Seen(ids if repetition else NO_IDS, ids[prompt_len:], vocab_size)
