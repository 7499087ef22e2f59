"""What is drawn has the distribution that the parameters define.

The kept sets and probabilities are those of transformers' own processors in the same order.
"""

import math
import random

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.engine.draw import cut_weights, draw
from pdserve.engine.sampler import TokenSampler
from pdserve.types import Sampling

VOCAB = 3000  # more than what top_p looks at first


def fresh_seed() -> int:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return seed


def warpers(sampling: Sampling) -> LogitsProcessorList:
    chosen = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.min_p:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    return chosen


def test_kept_sets_and_probabilities_equal_transformers() -> None:
    seed = fresh_seed()
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    samplings = [
        Sampling(
            max_tokens=1,
            temperature=rng.uniform(0.2, 2),
            top_k=rng.choice([0, 1, 5, 300]),
            top_p=rng.choice([1.0, 0.999, rng.uniform(0.01, 1), 1e-4]),
            min_p=rng.choice([0.0, rng.uniform(0, 0.2)]),
        )
        for _ in range(60)
    ]
    # From nearly flat, where a nucleus is most of the vocabulary, to sharp.
    widths = torch.tensor([rng.uniform(0.1, 5) for _ in samplings]).double().unsqueeze(1)
    logits = torch.randn(60, VOCAB, generator=generator, dtype=torch.float64) * widths
    weights = cut_weights(logits.clone(), samplings)
    for row, sampling in enumerate(samplings):
        expected = warpers(sampling)(torch.zeros(1, 1, dtype=torch.long), logits[row : row + 1])
        probabilities = expected.softmax(-1)[0]
        kept = weights[row] > 0
        assert torch.equal(kept, expected[0] > -math.inf), sampling
        torch.testing.assert_close(weights[row] / weights[row].sum(), probabilities)


def test_a_nucleus_of_equals_takes_the_lowest_ids() -> None:
    sampling = Sampling(max_tokens=1, top_p=0.25)
    flat = cut_weights(torch.zeros(1, 8, dtype=torch.float64), [sampling])
    assert flat[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    mixed = torch.tensor([[0.0, 1, 0, 1, 0, 0, 1, 0]], dtype=torch.float64).mul(math.log(4))
    # weights 1 4 1 4 1 1 4 1 of 17: two of the likeliest are 8/17, three are 12/17
    sampling = Sampling(max_tokens=1, top_p=0.4)
    assert (cut_weights(mixed.clone(), [sampling])[0] > 0).nonzero().flatten().tolist() == [1, 3]
    sampling = Sampling(max_tokens=1, top_p=0.75)
    assert (cut_weights(mixed.clone(), [sampling])[0] > 0).nonzero().flatten().tolist() == [
        0,
        1,
        3,
        6,
    ]


def test_equals_of_the_last_top_k_token_are_all_kept() -> None:
    sampling = Sampling(max_tokens=1, top_k=2)
    logits = torch.tensor([[3.0, 1, 2, 2, 0, 2]], dtype=torch.float64)
    assert (cut_weights(logits, [sampling])[0] > 0).tolist() == [
        True,
        False,
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=1),
        Sampling(max_tokens=1, temperature=0.6, top_k=8),
        Sampling(max_tokens=1, temperature=1.3, top_p=0.8),
        Sampling(max_tokens=1, min_p=0.15, top_p=0.95, top_k=10),
    ],
    ids=["plain", "top_k", "top_p", "all"],
)
def test_drawn_tokens_have_the_probabilities_of_transformers(sampling: Sampling) -> None:
    seed = fresh_seed()
    count, vocab = 20_000, 24
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = warpers(sampling)(torch.zeros(1, 1, dtype=torch.long), row).softmax(-1)[0]
    sampler = TokenSampler(vocab)
    # One sequence's successive tokens: neighbouring counters are independent.
    state = sampler.open(
        Sampling(**{name: getattr(sampling, name) for name in sampling.__slots__} | {"seed": seed}),
        [0],
        1,
    )
    found = torch.zeros(vocab, dtype=torch.float64)
    for _ in range(count // 100):
        batch = []
        for _ in range(100):
            batch.append(sampler.open(state.sampling, [0] * (state.generated + 1), 1))
            state.generated += 1
        for token in sampler.sample(row.expand(100, -1), batch):
            found[token.token_id] += 1
    possible = expected > 0
    assert found[~possible].sum() == 0
    wanted = expected[possible] * count
    statistic = float(((found[possible] - wanted) ** 2 / wanted).sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 7 * math.sqrt(2 * freedom) + 7, (statistic, freedom)


def test_repetition_penalty_equals_transformers_to_the_bit() -> None:
    seed = fresh_seed()
    rng = random.Random(seed)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    history = [rng.randrange(VOCAB) for _ in range(500)]
    for penalty in (1.1, 0.7, 2.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits)
        state = TokenSampler(VOCAB).open(
            Sampling(max_tokens=1, repetition_penalty=penalty), history, 300
        )
        row = logits[0].clone()
        state.adjust(row)
        assert torch.equal(row, expected[0])


def test_frequency_and_presence_count_generated_tokens_alone() -> None:
    state = TokenSampler(6).open(
        Sampling(max_tokens=1, frequency_penalty=0.5, presence_penalty=0.25), [0, 0, 1, 2, 2], 2
    )
    state.append(2)
    state.append(4)
    row = torch.ones(6, dtype=torch.float64)
    state.adjust(row)
    assert row.tolist() == [1, 1 - 0.75, 1 - 1.75, 1, 1 - 0.75, 1]


def test_the_smallest_and_the_largest_number_draw_a_token_that_was_kept() -> None:
    """The first and the last ids are excluded; rounding must not let either through."""
    sampling = Sampling(max_tokens=1, top_k=3)
    row = torch.tensor([-9.0, 2, 1.5, -9, 1, -9], dtype=torch.float64)
    numbers = np.array([0.0, 1 - 2.0**-53])
    assert draw(row.expand(2, -1).clone(), [sampling] * 2, numbers).tolist() == [1, 4]
