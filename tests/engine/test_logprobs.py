"""Log-probabilities are the model's own, and ranks are exact whatever the ties."""

import math
import random

import pytest
import torch

from pdserve.engine.sampler import TokenSampler
from pdserve.types import Sampling

VOCAB = 97


def plain_logprobs(row: list[float]) -> list[float]:
    top = max(row)
    norm = top + math.log(math.fsum(math.exp(value - top) for value in row))
    return [value - norm for value in row]


def random_rows(rows: int, dtype: torch.dtype) -> torch.Tensor:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sampled_tokens_report_the_models_own_distribution(dtype: torch.dtype) -> None:
    """Temperature, penalties and cuts change the token, never its log-probability."""
    sampler = TokenSampler(VOCAB)
    logits = random_rows(4, dtype)
    wild = {"temperature": 1.8, "repetition_penalty": 1.7, "logit_bias": ((3, 9.0),), "top_k": 5}
    samplings = [
        Sampling(max_tokens=1, logprobs=5, seed=1, **wild),
        Sampling(max_tokens=1, logprobs=None, **wild),
        Sampling(max_tokens=1, logprobs=0, temperature=0.0),
        Sampling(max_tokens=1, logprobs=VOCAB + 10, min_p=0.5),
    ]
    states = [sampler.open(sampling, [1, 2, 3], 1) for sampling in samplings]
    tokens = sampler.sample(logits, states)
    assert tokens[1].logprob is None
    for row, alternatives in ((0, 5), (2, 0), (3, VOCAB)):
        entry = tokens[row].logprob
        assert entry is not None
        expected = plain_logprobs(logits[row].double().tolist())
        assert entry.token_id == tokens[row].token_id
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=2e-6)
        order = sorted(range(VOCAB), key=lambda at: (-expected[at], at))
        assert [top.token_id for top in entry.top] == order[:alternatives]
        assert [top.rank for top in entry.top] == list(range(1, alternatives + 1))
        for top in entry.top:
            assert top.logprob == pytest.approx(expected[top.token_id], abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_logprobs_are_ranked_by_token_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, VOCAB, dtype=dtype)
    logits[0, [80, 30, 50]] = 2
    logits[0, 7] = -math.inf
    (entry,) = TokenSampler(VOCAB).prompt_logprobs(logits, [7], VOCAB)
    assert entry.logprob == -math.inf
    ids = [top.token_id for top in entry.top]
    assert ids[:6] == [30, 50, 80, 0, 1, 2]
    assert ids[-1] == 7
    assert sorted(ids) == list(range(VOCAB))


@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs_of_many_rows(count: int) -> None:
    """More rows than are looked at together; the last row has no target."""
    logits = random_rows(150, torch.float32)
    targets = [place * 31 % VOCAB for place in range(149)]
    found = TokenSampler(VOCAB).prompt_logprobs(logits, targets, count)
    assert [entry.token_id for entry in found] == targets
    for row, entry in enumerate(found):
        expected = plain_logprobs(logits[row].double().tolist())
        assert entry.logprob == pytest.approx(expected[targets[row]], abs=2e-6)
        assert len(entry.top) == count
        if count:
            assert entry.top[0].token_id == max(range(VOCAB), key=expected.__getitem__)
