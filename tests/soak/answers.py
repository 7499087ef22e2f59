"""The calm answers: asked one after the other, greedy ones compared with transformers' own."""

from __future__ import annotations

import asyncio

from tests.e2e.oracle import Oracle
from tests.soak.cases import Answers, Case, Expected, Kind, with_stop
from tests.soak.streams import Fronts

AT_ONCE = 4
# What a single process of transformers computes without any sampler of ours.
CHECKED = (Kind.GREEDY, Kind.LOGPROBS)


async def learn(
    fronts: Fronts, cases: list[Case], oracle: Oracle
) -> tuple[list[Case], Answers, int]:
    """Cases (stop strings now chosen), their answers, and how many transformers confirmed."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(case: Case) -> tuple[Case, tuple[Expected, ...]]:
        async with gate:
            answer = await calm(fronts, case)
            if case.kind is Kind.STOPPED:
                case = with_stop(case, answer[0].text)
                answer = await calm(fronts, case)
            return case, answer

    learned = await asyncio.gather(*(one(case) for case in cases))
    confirmed = 0
    for case, answer in learned:
        if case.kind in CHECKED:
            alone = oracle.greedy(case.prompt, case.max_tokens)
            assert answer[0].tokens == alone.tokens, f"{case.name}: margin {alone.margin}"
            confirmed += 1
    answers = {case.index: answer for case, answer in learned}
    return [case for case, _ in learned], answers, confirmed


async def calm(fronts: Fronts, case: Case) -> tuple[Expected, ...]:
    outcome = await fronts.ask(case, f"calm-{case.index}")
    outcome.judge(None)
    assert not outcome.wrong, f"{case.name}, with nothing else going on: {outcome.wrong}"
    return tuple(outcome.sequences)
