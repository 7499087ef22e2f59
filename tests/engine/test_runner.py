"""A runner writes, token for token, what the plain model writes: every family and chunking.

The oracle is transformers' own ``generate`` on one prompt at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdserve.engine.step import Row
from pdserve.types import Sampling
from tests.engine.model_world import drive, family_model, generate, kernel, oracle, running
from tests.models import CONTEXT, FAMILIES, VOCAB

SEED = 20
COUNT = 10


def prompts_for(block_size: int, seed: int) -> list[list[int]]:
    """One token, a block and its neighbours, several blocks, 90 % of the context."""
    draw = np.random.default_rng(seed)
    lengths = (1, block_size - 1, block_size, block_size + 1, 3 * block_size + 5, CONTEXT * 9 // 10)
    return [draw.integers(5, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("native", [True, False], ids=["native", "gather"])
def test_greedy_tokens_are_those_of_generate(family: str, block_size: int, native: bool) -> None:
    prompts = prompts_for(block_size, SEED)
    expected = [generate(family, prompt, COUNT) for prompt in prompts]
    print(f"seed {SEED}, smallest margin {min(margin for _, margin in expected):.2g}")
    library = kernel() if native else None
    with running(family_model(family), block_size, 220, library) as runner:
        for chunks in ((CONTEXT,), (block_size,), (7, 64, 33)):
            tracks = drive(runner, prompts, COUNT, block_size, chunks)
            assert [t.generated for t in tracks] == [tokens for tokens, _ in expected], chunks


def test_a_batch_of_sixteen_equals_sixteen_alone() -> None:
    draw = np.random.default_rng(SEED)
    prompts = [draw.integers(5, VOCAB, n).tolist() for n in draw.integers(1, 200, 16)]
    with running(family_model("llama"), 16, 300, kernel()) as runner:
        together = drive(runner, prompts, COUNT, 16, (24, 100, 1))
        for prompt, track in zip(prompts, together, strict=True):
            (alone,) = drive(runner, [prompt], COUNT, 16, (CONTEXT,))
            assert alone.generated == track.generated
            assert track.generated == generate("llama", prompt, COUNT)[0]


def test_seeded_sampling_depends_on_neither_batch_nor_chunks() -> None:
    sampling = Sampling(max_tokens=64, temperature=0.8, top_p=0.95, seed=99, logprobs=2)
    draw = np.random.default_rng(SEED)
    prompts = [draw.integers(5, VOCAB, n).tolist() for n in (3, 40, 90)]
    with running(family_model("qwen3"), 16, 60, kernel()) as runner:
        whole = drive(runner, prompts, COUNT, 16, (CONTEXT,), sampling)
        pieces = drive(runner, prompts, COUNT, 16, (5, 17), sampling, seed=1)
        alone = [drive(runner, [p], COUNT, 16, (16,), sampling)[0] for p in prompts]
    tokens = [track.generated for track in whole]
    assert tokens == [t.generated for t in pieces] == [t.generated for t in alone]
    assert len({tuple(t) for t in tokens}) == 3
    for track in whole:
        for result in track.results:
            assert result.token is not None
            assert result.token.logprob is not None
            assert len(result.token.logprob.top) == 2


@pytest.mark.parametrize("chunks", [(60,), (7, 16)])
def test_prompt_logprobs_are_those_of_the_whole_prompt(chunks: tuple[int, ...]) -> None:
    prompt = np.random.default_rng(SEED).integers(5, VOCAB, 60).tolist()
    with torch.inference_mode():
        logits = oracle("gemma2")(torch.tensor([prompt])).logits[0].double()
    expected = torch.log_softmax(logits, -1)
    found = []
    with running(family_model("gemma2"), 16, 8, kernel()) as runner:
        sampler = runner.open_sampler(Sampling(max_tokens=1, temperature=0.0), prompt, len(prompt))
        start = piece = 0
        token = None
        while start < len(prompt):
            end = min(len(prompt), start + chunks[piece % len(chunks)])
            row = Row(
                tokens=prompt[start:end],
                start=start,
                block_table=np.arange(8, dtype=np.int32)[::-1].copy(),
                sampler=sampler if end == len(prompt) else None,
                prompt_logprobs=3,
                targets=prompt[start + 1 : end + 1],
            )
            # A second row that wants nothing must not shift the first one's results.
            other = Row(prompt[:2], 0, np.array([7], np.int32))
            result = runner.step([other, row] if start == 0 else [row])[-1]
            found.extend(result.prompt_logprobs)
            token = result.token
            start, piece = end, piece + 1
    assert [f.token_id for f in found] == prompt[1:]
    for place, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-5)
        assert [t.token_id for t in one.top] == expected[place].topk(3).indices.tolist()
    assert token is not None
    assert token.token_id == int(expected[-1].argmax())


def test_zero_tail_clears_exactly_the_unused_positions() -> None:
    for family in ("llama", "gemma3"):
        with running(family_model(family), 16, 4, kernel()) as runner:
            pool = runner._pool
            pool.blocks.fill_(1.0)
            runner.zero_tail(2, 5)
            for layer in pool.layers:
                for part in (layer.keys, layer.values):
                    assert bool((part[2, 5:] == 0).all())
                    assert bool((part[2, :5] == 1).all())
                    assert bool((part[[0, 1, 3]] == 1).all())
