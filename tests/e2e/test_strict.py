"""Asked to separate the phases, a cluster that in fact does not is not ready, and says why.

Each story breaks one thing under a real cluster. In strict mode HTTP, gRPC's health service,
``pdserve status``, the live page's data and the metrics then tell the same; when it is mended, the
cluster gets ready by itself. Without strict mode it stays ready and is told to be degraded.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.cli.main import main
from pdserve.faults import Action, Step
from tests.cache_tiers.real_redis import RealRedis
from tests.e2e.clusters import Clusters, Running, Variant

pytestmark = pytest.mark.cluster

SEED = 17
# Longer than any test: the worker that is held up so is never let go.
HELD_S = 600.0
# Nobody listens there, so no transfer connects.
NOWHERE = "testing.transfer_relay=127.0.0.1:1"
STRICT = Variant(
    "llama",
    "tcp",
    "roomy",
    settings=(
        "router.strict=true",
        "timers.heartbeat_s=0.3",
        "timers.dead_after_s=2.6",
        "testing.faults=true",
        "cache.redis.mode=off",
        "transfer.deadline_s=1.5",
    ),
)


def get(cluster: Running, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(cluster.http + path, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def serving(cluster: Running) -> bool:
    with grpc.insecure_channel(cluster.cluster.addresses.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="pdserve.v1.Inference")
        return bool(stub.Check(asked, timeout=10).status == health_pb2.HealthCheckResponse.SERVING)


def gauge(cluster: Running, cause: str) -> float:
    _, text = get(cluster, "/metrics")
    (line,) = [
        one for one in text.splitlines() if one.startswith("pdserve:shortfall{") and cause in one
    ]
    return float(line.rpartition(" ")[2])


def now(cluster: Running) -> dict[str, Any]:
    return dict(cluster.get("/live.json")["now"])


def check_told(cluster: Running, capsys: pytest.CaptureFixture[str], cause: str, why: str) -> None:
    """Not ready everywhere, for one reason."""
    cluster.wait(lambda: why in get(cluster, "/ready")[1])
    assert get(cluster, "/ready")[0] == 503
    cluster.wait(lambda: not serving(cluster), 5)
    assert gauge(cluster, cause) == 1
    cluster.wait(lambda: why in now(cluster)["reason"], 5)
    assert now(cluster)["ready"] is False
    assert why in " ".join(now(cluster)["shortfalls"])
    capsys.readouterr()
    assert main(["status", "--once", "--url", cluster.http]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("not ready: ")]
    assert why in line


def never_ready_until(cluster: Running, why: str) -> None:
    """From its start on it says that it is not ready, and in the end that this is the reason."""

    def told() -> bool:
        status, text = get(cluster, "/ready")
        assert status == 503, "ready before it was known whether it is"
        return why in text

    cluster.wait(told)


def check_well(cluster: Running, cause: str) -> None:
    cluster.wait(lambda: get(cluster, "/ready")[0] == 200)
    cluster.wait(lambda: serving(cluster), 5)
    assert gauge(cluster, cause) == 0


def prompt(tag: str) -> tuple[int, ...]:
    print(f"seed {SEED}-{tag}")
    rng = random.Random(f"{SEED}-{tag}")
    return tuple(rng.randrange(5, 512) for _ in range(100))


def test_events_that_are_withheld(clusters: Clusters, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = clusters.get(STRICT)
    check_well(cluster, "events_unheard")
    victim = cluster.arm("decode", Step.KV_REPLAY, Action.HANG, 1, seconds=HELD_S)
    check_told(cluster, capsys, "events_unheard", f"the KV events of {victim.id} do not come")
    assert cluster.fired(victim) == 1
    answer = cluster.caller.ask(prompt("events"), 8)
    assert answer.usage.kv_bytes_transferred > 0, "not ready is told; who asks is still served"
    cluster.cluster.kill_worker(victim.id)  # the one that takes its place is held up by nothing
    check_well(cluster, "events_unheard")


def test_kv_that_never_moves(clusters: Clusters, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = clusters.get(replace(STRICT, settings=(*STRICT.settings, NOWHERE)))
    why = "KV does not move between workers: prefill_failed"
    never_ready_until(cluster, why)
    check_told(cluster, capsys, "kv_not_moved", why)
    with pytest.raises(grpc.RpcError):
        cluster.caller.ask(prompt("strict"), 8)
    cluster.check_idle()


def test_without_strict_mode_the_same_is_told_as_degraded(
    clusters: Clusters, capsys: pytest.CaptureFixture[str]
) -> None:
    lenient = [one for one in STRICT.settings if "strict" not in one]
    cluster = clusters.get(replace(STRICT, settings=(*lenient, NOWHERE)))
    why = "KV does not move between workers: prefill_failed"
    cluster.wait(lambda: why in " ".join(now(cluster)["shortfalls"]))
    check = now(cluster)
    assert (check["ready"], check["reason"]) == (True, "")
    assert get(cluster, "/ready")[0] == 200
    cluster.wait(lambda: serving(cluster), 5)  # it follows within a quarter of a second
    assert gauge(cluster, "kv_not_moved") == 1
    assert main(["status", "--once", "--url", cluster.http]) == 0
    assert f"degraded: {why}" in capsys.readouterr().out.splitlines()
    answer = cluster.caller.ask(prompt("lenient"), 8)
    assert len(answer.tokens) == 8
    assert answer.usage.kv_skipped_reason == "prefill_failed"


@pytest.fixture
def server() -> Iterator[RealRedis]:
    """Not started."""
    folder = Path(tempfile.mkdtemp(prefix="pds-r"))
    made = RealRedis(folder)
    yield made
    made.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_redis_that_was_never_reached(
    clusters: Clusters, server: RealRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [one for one in STRICT.settings if "redis" not in one]
    settings = (
        *others,
        "cache.redis.mode=url",
        f"cache.redis.url={server.url}",
        "cache.redis.breaker_open_s=0.5",
    )
    cluster = clusters.get(replace(STRICT, settings=settings))
    never_ready_until(cluster, "the redis tier never worked: ")
    check_told(cluster, capsys, "tier_unreached", "the redis tier never worked: ")
    answer = cluster.caller.ask(prompt("redis"), 8)
    assert answer.usage.kv_bytes_transferred > 0
    server.start()
    check_well(cluster, "tier_unreached")
    # Lost again, it costs speed and no more.
    server.kill()
    cluster.wait(lambda: all("redis" in one["degraded"] for one in cluster.workers()))
    check_well(cluster, "tier_unreached")
    clusters.stop()
