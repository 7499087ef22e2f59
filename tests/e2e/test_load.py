"""Load with faults, the short form of ``python -m tests.soak``: every stream exact, nothing left.

The phases share one cluster and one set of answers; each says all that did not hold.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.e2e.clusters import Clusters
from tests.e2e.test_faults import TOLERANT
from tests.soak.cases import make_cases
from tests.soak.phases import Result, Soak
from tests.soak.report import counters, row
from tests.soak.session import begin

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("PDSERVE_TEST_SEED", "41"))
CASES = 56
STREAMS = 32
# Longer than it takes to be fenced, shorter than to be killed: the worker wakes.
HANG_S = 4.0

Phase = Callable[[Soak], Coroutine[Any, Any, Result]]
PHASES: dict[str, Phase] = {
    "crowd": lambda soak: soak.crowd(200),
    "kills": lambda soak: soak.kills(STREAMS, seconds=25),
    "hangs": lambda soak: soak.hangs(STREAMS, seconds=20, hang_s=HANG_S, every=8.0),
    "aborts": lambda soak: soak.aborts(400, burst=200),
    "rolling": lambda soak: soak.rolling(STREAMS),
}


@pytest.mark.timeout(240)
def test_load_with_faults_is_held(clusters: Clusters) -> None:
    running = clusters.get(TOLERANT["shm"])
    running.wait_whole()
    print(f"seed {SEED}")

    async def run() -> list[Result]:
        cases = make_cases(SEED, CASES)
        async with begin(running, clusters.oracle("llama"), cases, SEED) as (soak, confirmed):
            assert confirmed >= CASES // 4
            for phase in PHASES.values():
                result = await phase(soak)
                print(row(result), counters(result), *result.faults, sep="\n")
            return soak.results

    results = {result.name: result for result in asyncio.run(run())}
    assert {name: result.broken for name, result in results.items() if result.broken} == {}
    struck = [fault.what for fault in results["kills"].faults]
    assert len(struck) >= 2, "too few were killed: this run proves nothing"
    assert any(outcome.resumes for outcome in results["kills"].outcomes)
    assert any(outcome.ending == "cancelled" for outcome in results["aborts"].outcomes)
    assert len(results["rolling"].faults) == 2 * len(running.cluster.workers())
