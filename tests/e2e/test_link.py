"""The link between two pools at its worst: whatever happens to the bytes, streams stay the same.

Every byte of KV passes a relay that resets, stalls, cuts, repeats, swaps or bends it at a place
drawn from a seed, or that poses as a server of another layout or version. The hand-off may be
retried or given up; the answer may not change.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest

from pdserve.rpc import identity
from pdserve.types import PROTOCOL_VERSION
from pdserve.v1 import kv_pb2, kv_pb2_grpc
from tests.e2e.ask import Answer
from tests.e2e.clusters import BLOCK, TOKEN, Clusters, Running, Variant
from tests.e2e.relay import Damage, Impostor, Relay

pytestmark = pytest.mark.cluster

SEED = 57
DEADLINE_S = 1.5
SETTINGS = (
    f"transfer.deadline_s={DEADLINE_S}",
    "timers.heartbeat_s=0.3",
    "cache.redis.mode=off",
    "cache.host.bytes_max=0",
)
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "presence_penalty": 0.3}


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.close()


@pytest.fixture
def cluster(clusters: Clusters, relay: Relay) -> Running:
    variant = Variant("llama", "tcp", "roomy", settings=SETTINGS)
    through = replace(variant, settings=(*SETTINGS, f"testing.transfer_relay={relay.address}"))
    running = clusters.get(through)
    running.wait_whole()
    return running


def prompts(tag: str, count: int, length: int) -> list[tuple[int, ...]]:
    print(f"seed {SEED}-{tag}")
    rng = random.Random(f"{SEED}-{tag}")
    return [tuple(rng.randrange(5, 512) for _ in range(length)) for _ in range(count)]


def run_all(cluster: Running, asked: list[tuple[int, ...]], salt: str) -> list[Answer]:
    def one(prompt: tuple[int, ...]) -> Answer:
        return cluster.caller.ask(prompt, 12, cache_salt=salt, ignore_eos=True, **SAMPLED)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, asked))


def same(stormy: list[Answer], calm: list[Answer]) -> None:
    assert [a.tokens for a in stormy] == [a.tokens for a in calm]
    assert [a.text for a in stormy] == [a.text for a in calm]
    assert [a.finish for a in stormy] == [a.finish for a in calm]


@pytest.mark.parametrize("damage", list(Damage), ids=lambda damage: damage.value)
def test_a_bad_link_changes_no_stream(cluster: Running, relay: Relay, damage: Damage) -> None:
    asked = prompts(damage.value, 6, 130)
    before = relay.passed
    calm = run_all(cluster, asked, f"calm-{damage.value}")
    moved = relay.passed - before
    assert moved >= sum(a.usage.kv_bytes_transferred for a in calm) > 0, "KV took another way"
    at = random.Random(f"{SEED}-{damage.value}-at").randrange(moved // 8, moved // 2)
    relay.arm(damage, at)
    started = time.monotonic()
    stormy = run_all(cluster, asked, f"storm-{damage.value}")
    took = time.monotonic() - started
    assert relay.struck == 1, "the damage was never done: this run proves nothing"
    same(stormy, calm)
    assert sum(a.usage.resumes for a in stormy) >= 1, "damaged bytes were believed"
    assert took < 8.0, took
    cluster.check_idle()


def test_one_flipped_bit_in_a_thousand_blocks(cluster: Running, relay: Relay) -> None:
    asked = prompts("thousand", 36, 30 * BLOCK)
    calm = run_all(cluster, asked, "calm-thousand")
    moved = sum(a.usage.kv_bytes_transferred for a in calm)
    relay.arm(Damage.FLIP, random.Random(f"{SEED}-bit").randrange(moved // 4, moved // 2))
    stormy = run_all(cluster, asked, "storm-thousand")
    assert sum(len(p) for p in asked) // BLOCK >= 1000
    assert relay.struck == 1
    same(stormy, calm)
    # Its own read failed, and others of the same read with it; most never noticed.
    assert 1 <= sum(a.usage.resumes for a in stormy) <= len(asked) // 2
    cluster.check_idle()


@pytest.mark.parametrize("impostor", [Impostor.OTHER_LAYOUT, Impostor.OTHER_VERSION])
def test_a_server_of_another_kind_is_refused_and_the_request_served(
    cluster: Running, relay: Relay, impostor: Impostor
) -> None:
    asked = prompts(impostor.value, 2, 100)
    calm = run_all(cluster, asked, f"calm-{impostor.value}")
    relay.impostor = impostor
    relay.cut()
    try:
        met = run_all(cluster, asked, f"met-{impostor.value}")
    finally:
        relay.impostor = Impostor.NONE
        relay.cut()
    same(met, calm)
    assert all(a.usage.kv_bytes_transferred == 0 for a in met), "KV of a stranger was taken"
    assert all(a.usage.kv_skipped_reason for a in met), "nobody says why no KV moved"
    again = run_all(cluster, asked, f"again-{impostor.value}")
    same(again, calm)
    cluster.check_idle()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layout_fingerprint": b"x" * 32}, "kv_layout_mismatch"),
        ({"protocol_version": PROTOCOL_VERSION + 1}, "protocol_error"),
        ({"expected_incarnation": b"y" * 16}, "stale_incarnation"),
    ],
    ids=["layout", "version", "incarnation"],
)
def test_a_prefill_worker_refuses_a_peer_of_another_kind(
    cluster: Running, change: dict[str, object], code: str
) -> None:
    facts = next(f for f in cluster.cluster.workers() if f.role.value == "prefill")
    start = kv_pb2.StartPrefill(
        attempt_id=b"a" * 16,
        protocol_version=PROTOCOL_VERSION,
        expected_incarnation=facts.incarnation,
        layout_fingerprint=facts.model.fingerprint,
    )
    start.MergeFrom(kv_pb2.StartPrefill(**change))  # type: ignore[arg-type]
    header = identity.mint(TOKEN, identity.Caller.DECODE).header("/pdserve.v1.Prefill/")
    with grpc.insecure_channel(facts.address) as channel:
        call = kv_pb2_grpc.PrefillStub(channel).Run(
            iter([kv_pb2.DecodeToPrefill(start=start)]),
            metadata=(("authorization", header),),
            timeout=10,
        )
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
    metadata = {item.key: item.value for item in refused.value.trailing_metadata() or ()}
    assert code in str(metadata), metadata
    asked = prompts(code, 1, 60)
    assert run_all(cluster, asked, "after")[0].usage.kv_bytes_transferred > 0
