"""The counter-based generator: published answers, and numbers that look uniform."""

import math

import numpy as np
import pytest

from pdserve.engine.randomness import philox4x32, uniforms

# Known answers published with the generator's reference implementation.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_generator_gives_the_published_words(
    counter: list[int], key: list[int], answer: list[int]
) -> None:
    def words(values: list[int]) -> list[np.ndarray]:
        return [np.array([value, value], dtype=np.uint64) for value in values]

    found = philox4x32(words(counter), words(key))
    assert [column.tolist() for column in found] == [[word, word] for word in answer]


def test_numbers_depend_on_seed_and_index_alone() -> None:
    many = uniforms([1, 2, 2**64 - 1, 2], [0, 7, 3, 8])
    for place, (seed, index) in enumerate([(1, 0), (2, 7), (2**64 - 1, 3), (2, 8)]):
        assert uniforms([seed], [index])[0] == many[place]
    assert len(set(many.tolist())) == 4
    # High halves of both words count.
    assert uniforms([5], [0])[0] != uniforms([5 + 2**32], [0])[0]
    assert uniforms([5], [0])[0] != uniforms([5], [2**32])[0]


@pytest.mark.parametrize("along", ["indices", "seeds"])
def test_numbers_are_uniform(along: str) -> None:
    count, bins = 50_000, 100
    steps = list(range(count))
    same = [12345] * count
    drawn = uniforms(same, steps) if along == "indices" else uniforms(steps, same)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    found = np.bincount((drawn * bins).astype(int), minlength=bins)
    statistic = float(((found - count / bins) ** 2 / (count / bins)).sum())
    assert statistic < bins - 1 + 6 * math.sqrt(2 * (bins - 1))
    neighbours = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(count)
