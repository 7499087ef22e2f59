"""A cluster of mixed workers alone: each reads what it answers, and none waits for another.

Pools are so small that a worker has to preempt. Were one to read for the other, both could be full
of prompts that wait for a grant of the other side, until their leases ran out.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.ask import Answer
from tests.e2e.clusters import Clusters, Variant

pytestmark = pytest.mark.cluster

SEED = 47
LEASE_S = 15.0
STREAMS = 24
TOKENS = 40
MIXED = Variant(
    "llama",
    "shm",
    "tight",
    prefill=0,
    decode=0,
    settings=("pools.mixed=2", f"transfer.lease_s={LEASE_S}", "router.policy=round_robin"),
)


def test_full_mixed_workers_do_not_wait_for_each_other(clusters: Clusters) -> None:
    cluster = clusters.get(MIXED)
    oracle = clusters.oracle("llama")
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    asked = [tuple(rng.randrange(5, 512) for _ in range(200)) for _ in range(STREAMS)]

    def one(prompt: tuple[int, ...]) -> Answer:
        return cluster.caller.ask(prompt, TOKENS)

    began = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(one, asked))
    took = time.monotonic() - began
    print(f"{STREAMS} streams ended after {took:.1f} s")
    assert took < LEASE_S
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.tokens == oracle.greedy(prompt, TOKENS).tokens
        assert answer.usage.prefill_worker in ("", answer.usage.decode_worker)
        assert answer.usage.kv_bytes_transferred == 0
    assert {answer.usage.decode_worker for answer in answers} == {"mixed-0", "mixed-1"}
    cluster.check_idle()
