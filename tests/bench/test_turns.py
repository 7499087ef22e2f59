"""What a comparison counts: prefill until all have begun, decode until the first one ends."""

from __future__ import annotations

import pytest

from bench.contenders.turns import Seen, Turn, seen
from bench.engines import SHAPES


def test_decode_is_counted_while_all_streams_run() -> None:
    early, late = [1.0, 2.0, 3.0, 4.0], [2.5, 3.0, 3.5, 4.5]
    found = seen(0.5, [early, late])
    assert (found.prefill_s, found.decode_s) == (2.0, 1.5)
    assert found.decoded == 4  # two of each, after 2.5 and up to 4.0


def test_prompts_depend_on_the_seed_alone_and_differ() -> None:
    turn = Turn(streams=3, prompt=40, tokens=2, seed=9)
    assert turn.prompts() == Turn(3, 40, 7, 9).prompts()
    assert len({tuple(prompt) for prompt in turn.prompts()}) == 3
    assert turn.prompts() != Turn(3, 40, 2, 10).prompts()


def test_a_shape_of_one_token_is_a_rate_of_prompts() -> None:
    rates = {shape.name: shape.rate(Seen(2.0, 4.0, 100)) for shape in SHAPES}
    assert rates["prefill 8 x 512"] == pytest.approx(2048)
    assert rates["decode, 32 streams"] == pytest.approx(25)
