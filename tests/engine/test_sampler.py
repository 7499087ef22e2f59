"""The sampler against its plain reference, and the promises that a stream rests on."""

import math
import random
from dataclasses import replace

import pytest
import torch

from pdserve.engine.sampler import TokenSampler
from pdserve.engine.sampler_reference import sample_reference
from pdserve.errors import InvalidRequest
from pdserve.types import Sampling, TokenOut

VOCAB = 211


def fresh_seed() -> int:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return seed


def random_sampling(rng: random.Random) -> Sampling:
    """Any mixture of parameters; values are float32, as they come off the wire."""

    def maybe(value: float, neutral: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32)) if rng.random() < 0.4 else neutral

    biased = rng.sample(range(VOCAB), 5) if rng.random() < 0.3 else []
    return Sampling(
        max_tokens=100,
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 7, VOCAB, VOCAB + 9]),
        top_p=maybe(rng.uniform(0.05, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logit_bias=tuple((token_id, rng.uniform(-9, 9)) for token_id in biased),
        min_tokens=rng.choice([0, 0, 5]),
        stop_token_ids=tuple(rng.sample(range(VOCAB), 40)),
        seed=rng.randrange(2**64),
    )


def random_logits(rng: random.Random, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    return torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64).mul(3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_the_reference_row_by_row(dtype: torch.dtype) -> None:
    """bfloat16 rows are full of equal logits, so ties are compared as well."""
    rng = random.Random(fresh_seed())
    sampler = TokenSampler(VOCAB)
    for _ in range(12):
        rows = rng.randrange(1, 24)
        logits = random_logits(rng, rows, dtype)
        before = logits.clone()
        samplings = [random_sampling(rng) for _ in range(rows)]
        if dtype != torch.float64:  # penalties round in float32: compare what does not
            samplings = [
                replace(
                    sampling,
                    presence_penalty=0.0,
                    frequency_penalty=0.0,
                    repetition_penalty=1.0,
                    logit_bias=(),
                )
                for sampling in samplings
            ]
        histories = [
            [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))] for _ in range(rows)
        ]
        prompts = [rng.randrange(0, len(history) + 1) for history in histories]
        states = [
            sampler.open(sampling, history, prompt_len)
            for sampling, history, prompt_len in zip(samplings, histories, prompts, strict=True)
        ]
        found = [token.token_id for token in sampler.sample(logits, states)]
        expected = [
            sample_reference(row, sampling, history, prompt_len)
            for row, sampling, history, prompt_len in zip(
                logits.double().tolist(), samplings, histories, prompts, strict=True
            )
        ]
        assert found == expected
        assert torch.equal(logits, before), "the model's logits were changed"


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = random.Random(fresh_seed())
    sampler = TokenSampler(VOCAB)
    samplings = [
        replace(random_sampling(rng), logprobs=rng.choice([None, 0, 3])) for _ in range(40)
    ]
    logits = random_logits(rng, 40, torch.float32)
    states = [sampler.open(sampling, [1, 2, 3], 2) for sampling in samplings]
    together = sampler.sample(logits, states)
    alone = [sampler.sample(logits[row : row + 1], [states[row]])[0] for row in range(40)]
    assert alone == together
    order = list(range(40))
    rng.shuffle(order)
    shuffled = sampler.sample(logits[order], [states[row] for row in order])
    assert shuffled == [together[row] for row in order]


def toy_logits(history: list[int], base: torch.Tensor) -> torch.Tensor:
    """A model whose next logits follow from the last two tokens."""
    return base[history[-1] % 7] + base[history[-2] % 7].flip(0)


def write(
    sampler: TokenSampler, sampling: Sampling, history: list[int], prompt_len: int, count: int
) -> list[TokenOut]:
    base = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = sampler.open(sampling, history, prompt_len)
    written: list[TokenOut] = []
    history = list(history)
    for _ in range(count):
        (token,) = sampler.sample(toy_logits(history, base).unsqueeze(0), [state])
        state.append(token.token_id)
        history.append(token.token_id)
        written.append(token)
    return written


def test_a_resumed_sequence_continues_with_the_very_next_token() -> None:
    rng = random.Random(fresh_seed())
    sampler = TokenSampler(VOCAB)
    for _ in range(10):
        sampling = replace(random_sampling(rng), logprobs=2)
        prompt = [rng.randrange(VOCAB) for _ in range(6)]
        whole = write(sampler, sampling, prompt, len(prompt), 40)
        ids = [token.token_id for token in whole]
        for cut in (1, 13, 39):
            rest = write(sampler, sampling, prompt + ids[:cut], len(prompt), 40 - cut)
            assert rest == whole[cut:], f"{sampling} resumed after {cut}"


def test_penalty_counts_grow_past_their_first_room() -> None:
    """More different tokens than a state reserves at first: appended equals opened."""
    sampler = TokenSampler(VOCAB)
    sampling = Sampling(max_tokens=1, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5)
    history = [place * 7 % VOCAB for place in range(VOCAB)] * 2
    grown = sampler.open(sampling, history[:3], 1)
    for token_id in history[3:]:
        grown.append(token_id)
    opened = sampler.open(sampling, history, 1)
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    first, second = row.clone(), row.clone()
    grown.adjust(first)
    opened.adjust(second)
    assert torch.equal(first, second)
    assert grown.generated == opened.generated == len(history) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equal_ids(dtype: torch.dtype) -> None:
    sampler = TokenSampler(VOCAB)
    logits = torch.zeros(3, VOCAB, dtype=dtype)
    logits[0, [150, 20, 90]] = 4
    logits[2, [VOCAB - 1, 0]] = 1
    plain = Sampling(max_tokens=1, temperature=0.0)
    adjusted = replace(plain, logit_bias=((30, -5.0),))
    for sampling in (plain, adjusted, replace(plain, temperature=0.9e-5)):
        states = [sampler.open(sampling, [1], 1) for _ in range(3)]
        assert [token.token_id for token in sampler.sample(logits, states)] == [20, 0, 0]


def test_min_tokens_holds_stop_tokens_back_and_then_lets_go() -> None:
    sampler = TokenSampler(VOCAB)
    sampling = Sampling(max_tokens=9, temperature=0.0, min_tokens=2, stop_token_ids=(4, 9, 10**6))
    state = sampler.open(sampling, [1, 2, 3], 3)
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 9], logits[0, 5] = 3, 2, 1
    found = []
    for _ in range(3):
        (token,) = sampler.sample(logits, [state])
        state.append(token.token_id)
        found.append(token.token_id)
    assert found == [5, 5, 4]


def test_absurd_parameters_stay_in_range_and_leave_the_others_alone() -> None:
    sampler = TokenSampler(VOCAB)
    huge = 3e38
    samplings = [
        Sampling(max_tokens=1, repetition_penalty=huge, logit_bias=((1, huge), (2, -huge))),
        Sampling(max_tokens=1, repetition_penalty=1e-38, logit_bias=((1, huge),)),
        Sampling(max_tokens=1, frequency_penalty=-huge, presence_penalty=-huge, temperature=1e-4),
        Sampling(max_tokens=1, temperature=huge, top_p=1e-30, min_p=1.0),
        Sampling(max_tokens=1, min_tokens=1, stop_token_ids=tuple(range(VOCAB))),
        Sampling(max_tokens=1, temperature=1.0, seed=11),
    ]
    rng = random.Random(fresh_seed())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = random_logits(rng, len(samplings), dtype)
        states = [sampler.open(sampling, [1, 2, 1], 1) for sampling in samplings]
        found = [token.token_id for token in sampler.sample(logits, states)]
        assert all(0 <= token_id < VOCAB for token_id in found)
        assert found[-1] == sampler.sample(logits[-1:], states[-1:])[0].token_id


def test_a_broken_models_nan_still_gives_ids_in_range() -> None:
    sampler = TokenSampler(VOCAB)
    samplings = [
        Sampling(max_tokens=1),
        Sampling(max_tokens=1, temperature=0.0),
        Sampling(max_tokens=1, top_p=0.5, top_k=5, min_p=0.1),
    ]
    states = [sampler.open(sampling, [1], 1) for sampling in samplings]
    for broken in (math.nan, math.inf, -math.inf):
        logits = torch.full((3, VOCAB), broken)
        found = sampler.sample(logits, states)
        assert all(0 <= token.token_id < VOCAB for token in found)


def test_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="logit_bias"):
        TokenSampler(VOCAB).open(Sampling(max_tokens=1, logit_bias=((VOCAB, 1.0),)), [1], 1)


def test_no_rows_give_no_tokens() -> None:
    assert TokenSampler(VOCAB).sample(torch.empty(0, VOCAB), []) == []
