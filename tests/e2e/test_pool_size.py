"""The size of a worker's pool is a fact of its cluster's start, also for one that starts again."""

from __future__ import annotations

import pytest

from pdserve.types import WorkerId
from tests.e2e.clusters import Clusters, Running, Variant

# Without a cap, a byte more or less of free memory shows.
VARIANT = Variant(
    "llama",
    "shm",
    "roomy",
    settings=(
        "engine.pool_blocks=0",
        "engine.memory_fraction=0.02",
        "engine.pool_bytes_max=1099511627776",
        "cache.host.bytes_max=1048576",
        "cache.redis.mode=off",
    ),
)

pytestmark = pytest.mark.cluster


def sizes(running: Running) -> dict[str, int]:
    return {str(facts.id): facts.blocks_total for facts in running.cluster.workers()}


def test_a_worker_that_starts_again_is_as_large_as_it_was(clusters: Clusters) -> None:
    running = clusters.get(VARIANT)
    before = sizes(running)
    assert before["prefill-0"] == before["decode-0"] > 40
    prompt = list(range(3, 90))
    expected = running.caller.ask(prompt, 8).tokens
    (old,) = [f.incarnation for f in running.cluster.workers() if f.id == "decode-0"]
    # Its neighbour's weights and pool are missed by whoever measures anew.
    running.cluster.kill_worker(WorkerId("decode-0"))
    running.wait(
        lambda: any(f.id == "decode-0" and f.incarnation != old for f in running.cluster.workers())
    )
    running.wait_ready()
    assert sizes(running) == before
    assert running.caller.ask(prompt, 8).tokens == expected
