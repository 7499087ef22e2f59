"""Workers that die, stop, hang or damage bytes at a named step: every stream stays what it was.

Two workers of each role; a batch of requests runs while the fault strikes one of them. Each request
must end with exactly the tokens of the fault-free run, and what is left of the cluster must be idle
and sound afterwards.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pdserve.faults import Action, Step
from pdserve.types import WorkerFacts
from tests.e2e.ask import Answer
from tests.e2e.clusters import Clusters, Running, Variant, is_stopped

pytestmark = pytest.mark.cluster

SEED = 31
FAST_TIMERS = (
    "timers.heartbeat_s=0.3",
    "timers.dead_after_s=2",
    "timers.stuck_after_s=3",
    "timers.kill_after_s=4",
    "transfer.lease_s=3",
    "transfer.deadline_s=3",
    "router.policy=round_robin",
    "testing.faults=true",
)
TOLERANT = {
    transport: Variant("llama", transport, "roomy", prefill=2, decode=2, settings=FAST_TIMERS)
    for transport in ("shm", "tcp")
}
REQUESTS = 8
# Detection, a retry, and the time to recompute.
GAP_S = 8.0
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 77, "frequency_penalty": 0.2}


def prompts(tag: str) -> list[tuple[int, ...]]:
    rng = random.Random(f"{SEED}-{tag}")
    print(f"seed {SEED}-{tag}")
    return [
        tuple(rng.randrange(5, 512) for _ in range(rng.choice((60, 130, 200))))
        for _ in range(REQUESTS)
    ]


def run_all(cluster: Running, asked: list[tuple[int, ...]], salt: str) -> list[Answer]:
    def one(prompt: tuple[int, ...]) -> Answer:
        return cluster.caller.ask(prompt, 24, cache_salt=salt, ignore_eos=True, **SAMPLED)

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(one, asked))


@pytest.fixture
def cluster(clusters: Clusters, request: pytest.FixtureRequest) -> Iterator[Running]:
    transport = request.node.callspec.params.get("transport", "shm")
    running = clusters.get(TOLERANT[transport])
    running.wait_whole()
    yield running
    running.resume_stopped()


CASES = [
    *((step, Action.KILL, nth) for step, nth in (
        (Step.PREFILL_ACCEPT, 2),
        (Step.PREFILL_START, 2),
        (Step.PREFILL_OFFER, 3),
        (Step.PREFILL_FINISH, 2),
        (Step.DECODE_START, 3),
        (Step.DECODE_GRANT, 2),
        (Step.DECODE_READ, 3),
        (Step.DECODE_COMMIT, 2),
        (Step.DECODE_TOKENS, 30),
    )),
    (Step.PREFILL_OFFER, Action.STOP, 3),
    (Step.DECODE_TOKENS, Action.STOP, 30),
    (Step.ENGINE_STEP, Action.HANG, 4),
    (Step.PREFILL_OFFER, Action.RAISE, 2),
    (Step.DECODE_START, Action.RAISE, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "action", "nth"), CASES, ids=[f"{s.value}-{a.value}" for s, a, _ in CASES]
)
def test_streams_survive_a_worker(cluster: Running, step: Step, action: Action, nth: int) -> None:
    tag = f"{step.value}-{action.value}"
    asked = prompts(tag)
    calm = run_all(cluster, asked, f"calm-{tag}")
    role = "prefill" if step.value.startswith("prefill") else "decode"
    victim = cluster.arm(role, step, action, nth, seconds=20.0)
    started = time.monotonic()
    stormy = run_all(cluster, asked, f"storm-{tag}")
    took = time.monotonic() - started
    assert [a.tokens for a in stormy] == [a.tokens for a in calm]
    assert [a.finish for a in stormy] == [a.finish for a in calm]
    assert [a.text for a in stormy] == [a.text for a in calm]
    assert cluster.was_struck(victim), "the fault never struck: this run proves nothing"
    assert took < 3 * GAP_S, took
    cluster.check_idle(ignoring=victim.id)


@pytest.mark.parametrize("transport", ["tcp"])
def test_a_flipped_bit_never_reaches_attention(cluster: Running, transport: str) -> None:
    asked = prompts("flip")
    calm = run_all(cluster, asked, "calm-flip")
    victim = cluster.arm("prefill", Step.TRANSFER_SERVE, Action.FLIP, 2)
    stormy = run_all(cluster, asked, "storm-flip")
    assert [a.tokens for a in stormy] == [a.tokens for a in calm]
    assert cluster.fired(victim) == 1
    assert sum(a.usage.resumes for a in stormy) >= 1, "a damaged block was believed"
    cluster.check_idle()


@pytest.mark.parametrize("step", [Step.PREFILL_OFFER, Step.DECODE_TOKENS])
@pytest.mark.parametrize("transport", ["tcp", "shm"])  # one cluster each
def test_what_a_woken_worker_still_does_is_counted_and_reaches_nobody(
    cluster: Running, transport: str, step: Step
) -> None:
    """It wakes after its requests went on elsewhere, and before it is given up for good."""
    tag = f"woken-{transport}-{step.value}"
    asked = prompts(tag)
    calm = run_all(cluster, asked, f"calm-{tag}")
    role = "prefill" if step is Step.PREFILL_OFFER else "decode"
    victim = cluster.arm(role, step, Action.STOP, 3 if role == "prefill" else 12)
    before = dropped(cluster, victim)
    with ThreadPoolExecutor(1) as pool:
        storm = pool.submit(run_all, cluster, asked, f"storm-{tag}")
        cluster.wait(lambda: is_stopped(victim.pid))
        cluster.wait(lambda: entry(cluster, victim)["state"] == "suspect")
        cluster.resume_stopped()
        stormy = storm.result()
    assert [a.tokens for a in stormy] == [a.tokens for a in calm]
    assert [a.text for a in stormy] == [a.text for a in calm]
    assert sum(a.usage.resumes for a in stormy) > 0, "nothing had to go on elsewhere"
    cluster.wait(lambda: entry(cluster, victim)["state"] == "ready")
    cluster.wait(lambda: dropped(cluster, victim) > before, 5.0)
    cluster.check_idle()
    again = run_all(cluster, asked, f"again-{tag}")
    assert [a.tokens for a in again] == [a.tokens for a in calm]


def entry(cluster: Running, worker: WorkerFacts) -> dict[str, Any]:
    """Of ``/workers``; it is the same process still."""
    found = next(one for one in cluster.workers() if one["id"] == worker.id)
    assert found["incarnation"] == worker.incarnation.hex(), "it was replaced"
    return found


def dropped(cluster: Running, worker: WorkerFacts) -> int:
    told = entry(cluster, worker)
    return int(told["late_events"] + told["late_kv_reads"])
