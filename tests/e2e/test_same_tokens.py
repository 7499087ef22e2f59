"""Promise 1: the cluster writes what one process running the model alone writes.

Dimensions: model family, transport, pool size, length of the prompt, alone or in a mixed batch, and
where the prompt's prefix is found. Every pair of their values occurs (PDSERVE_LONG=1 runs the full
product). A case whose oracle wavers (two best logits closer than a few units in the last place of
the accumulated arithmetic) would prove nothing; margins are recorded and checked.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from tests.e2e.ask import Caller
from tests.e2e.clusters import BLOCK, CHUNK, Clusters, Variant
from tests.e2e.oracle import Oracle
from tests.e2e.pairwise import Case, pairwise

pytestmark = pytest.mark.cluster

SEED = int(os.environ.get("PDSERVE_TEST_SEED", "20"))
LONG = os.environ.get("PDSERVE_LONG") == "1"
FAMILIES = ("smollm2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
DIMENSIONS = {
    "family": FAMILIES,
    "transport": ("shm", "tcp"),
    "pool": ("roomy", "tight"),
    "prompt": ("one", "block-1", "block", "block+1", "chunks", "most"),
    "batch": ("alone", "mixed"),
    "cache": ("cold", "device", "host", "redis"),
}
MIXED_BATCH = 16


def started(case: Case) -> bool:
    """Two clusters per family hold every pair of (family, transport, pool)."""
    crossed = FAMILIES.index(case["family"]) % 2 == 1
    return (case["transport"] == "tcp") == ((case["pool"] == "tight") != crossed)


def cases() -> list[Case]:
    if LONG:
        product = itertools.product(*DIMENSIONS.values())
        chosen = [dict(zip(DIMENSIONS, values, strict=True)) for values in product]
    else:
        chosen = list(pairwise(DIMENSIONS, started, SEED))
    # Cases of one cluster follow each other: it is started once.
    return sorted(chosen, key=lambda c: (c["family"], c["transport"], c["pool"], c["cache"]))


def name(case: Case) -> str:
    return "-".join(case.values())


def prompt_length(kind: str, context: int) -> int:
    return {
        "one": 1,
        "block-1": BLOCK - 1,
        "block": BLOCK,
        "block+1": BLOCK + 1,
        "chunks": 3 * CHUNK + 5,
        "most": context * 9 // 10,
    }[kind]


def fresh(rng: random.Random, oracle: Oracle, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, oracle.vocab_size) for _ in range(length))


def warm(
    cluster: Clusters.Running,
    caller: Caller,
    prompt: tuple[int, ...],
    cache: str,
    room: int,
    times: int,
) -> None:
    """Leaves the prompt's blocks in the tier named, and in no faster one."""
    if cache == "cold":
        return
    # What a tier had no time for, as in a tight pool, is offered to it again when it is found.
    for _ in range(times):
        caller.ask(prompt, room)
        cluster.settle()
    if cache != "device":
        cluster.flush("device")
    if cache == "redis":
        cluster.flush("host")


@pytest.mark.parametrize("case", cases(), ids=name)
def test_tokens_equal_the_oracle(
    case: Case, clusters: Clusters, record_property: Callable[[str, object], None]
) -> None:
    variant = Variant(case["family"], case["transport"], case["pool"])
    cluster = clusters.get(variant)
    oracle = clusters.oracle(case["family"])
    rng = random.Random(f"{SEED}-{name(case)}")
    print(f"seed {SEED}")
    length = prompt_length(case["prompt"], cluster.context)
    room = min(24, cluster.context - length - 1)
    prompt = fresh(rng, oracle, length)
    expected = oracle.greedy(prompt, room)
    record_property("margin", expected.margin)
    caller = cluster.caller
    warm(cluster, caller, prompt, case["cache"], room, 2 if case["pool"] == "tight" else 1)
    others: list[tuple[int, ...]] = []
    if case["batch"] == "mixed":
        lengths = [rng.choice((1, BLOCK, 40, CHUNK + 3)) for _ in range(MIXED_BATCH - 1)]
        others = [fresh(rng, oracle, length) for length in lengths]
    # A prompt of whole blocks may else be in Redis before the decode worker looks there.
    holding = cluster.writes_held() if case["cache"] == "cold" else nullcontext()
    with holding:
        answer, *rest = caller.ask_all([prompt, *others], room)
    for other, its_answer in zip(others, rest, strict=True):
        assert its_answer.tokens == oracle.greedy(other, room).tokens
    assert answer.tokens == expected.tokens, f"margin {expected.margin}"
    check_usage(case, answer.usage, length)
    cluster.check_idle()


def check_usage(case: Case, usage: object, length: int) -> None:
    """The answer says how it was made, and that is how the case wanted it."""
    cached = usage.cached_tokens  # type: ignore[attr-defined]
    reusable = (length - 1) // BLOCK * BLOCK
    found = {"device": cached.device, "host": cached.host, "redis": cached.redis}
    assert usage.prompt_tokens == length  # type: ignore[attr-defined]
    assert usage.prefill_worker  # type: ignore[attr-defined]
    assert usage.decode_worker  # type: ignore[attr-defined]
    if case["cache"] == "cold":
        assert sum(found.values()) == 0
        assert usage.kv_transport == case["transport"]  # type: ignore[attr-defined]
        assert usage.kv_bytes_transferred > 0  # type: ignore[attr-defined]
    elif case["pool"] == "roomy" or case["batch"] == "alone":
        # In a tight pool and a full batch, others may have evicted it by now.
        assert found[case["cache"]] == reusable, found
