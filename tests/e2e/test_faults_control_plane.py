"""Ray's control plane is killed while streams run: they end as if nothing were, and it comes back.

Whoever would start it again is stopped meanwhile, so that it is away for as long as the test wants.
A worker that dies in that time is missed by nobody but the streams that it held, which go on
elsewhere; it is replaced once the control plane is back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdserve.faults import Action, Step
from tests.e2e.clusters import Clusters, Running
from tests.e2e.test_faults import TOLERANT, prompts, run_all
from tests.sockets import commands, with_mark

pytestmark = pytest.mark.cluster

BACK_S = 20.0
FROZEN_S = 2.0
# A look every second, and two to wait for its answer.
TOLD_S = 6.0


def process(clusters: Clusters, part: str) -> int:
    """The one process of Ray that has ``part`` in its command."""
    named = commands(with_mark(clusters.ray.mark))
    (found,) = [pid for pid, command in named.items() if part in command]
    return found


@contextmanager
def control_plane_away(clusters: Clusters) -> Iterator[None]:
    gcs, head = process(clusters, "gcs_server"), process(clusters, "pdserve.cluster.ray_head")
    os.kill(head, signal.SIGSTOP)
    try:
        os.kill(gcs, signal.SIGKILL)
        yield
    finally:
        os.kill(head, signal.SIGCONT)


def test_streams_run_on_and_restarts_resume(clusters: Clusters) -> None:
    cluster = clusters.get(TOLERANT["shm"])
    cluster.wait_whole()
    asked = prompts("control-plane")
    calm = [answer.tokens for answer in run_all(cluster, asked, "calm")]
    before = cluster.cluster.workers()
    victim = cluster.arm("decode", Step.DECODE_TOKENS, Action.KILL, 30)
    with control_plane_away(clusters):
        answers = run_all(cluster, asked, "away")
        assert [answer.tokens for answer in answers] == calm
        assert not Path(f"/proc/{victim.pid}").exists(), "the worker was to die meanwhile"
        time.sleep(FROZEN_S)
        assert cluster.cluster.workers() == before, "membership is frozen"
        cluster.wait(lambda: "control plane is away" in shortfalls(cluster), TOLD_S)
        assert cluster.get("/live.json")["now"]["ready"], "it serves all the same"
        assert [answer.tokens for answer in run_all(cluster, asked, "later")] == calm
    began = time.monotonic()
    cluster.wait(lambda: replaced(cluster, victim.incarnation), BACK_S)
    print(f"the worker was replaced {time.monotonic() - began:.1f} s after the release")
    cluster.wait_whole()
    cluster.wait(lambda: not shortfalls(cluster), TOLD_S)
    kept = {facts.incarnation for facts in before} - {victim.incarnation}
    assert kept < {facts.incarnation for facts in cluster.cluster.workers()}, "only one was lost"
    assert [answer.tokens for answer in run_all(cluster, asked, "back")] == calm
    cluster.check_idle()


def shortfalls(cluster: Running) -> str:
    """What ``pdserve status`` and the live page say beside the workers."""
    return "; ".join(cluster.get("/live.json")["now"]["shortfalls"])


def replaced(cluster: Running, incarnation: str) -> bool:
    workers = cluster.cluster.workers()
    return len(workers) == 4 and all(facts.incarnation != incarnation for facts in workers)


def test_a_worker_that_dies_after_the_return_is_replaced(clusters: Clusters) -> None:
    """The control plane itself comes back within seconds, and knows the actors that it had."""
    cluster = clusters.get(TOLERANT["shm"])
    cluster.wait_whole()
    asked = prompts("killed-alone")
    calm = [answer.tokens for answer in run_all(cluster, asked, "calm")]
    gcs = process(clusters, "gcs_server")
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(run_all, cluster, asked, "killed")
        os.kill(gcs, signal.SIGKILL)
        began = time.monotonic()
        cluster.wait(lambda: gcs_pid(clusters) not in (0, gcs), BACK_S)
        print(f"the control plane was started again after {time.monotonic() - began:.1f} s")
        assert [answer.tokens for answer in streams.result(60)] == calm
    victim = next(f for f in cluster.cluster.workers() if f.role.value == "prefill")
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    cluster.wait(lambda: replaced(cluster, victim.incarnation), BACK_S)
    print(f"a worker killed then was replaced after {time.monotonic() - began:.1f} s")
    cluster.wait_whole()
    assert [answer.tokens for answer in run_all(cluster, asked, "after")] == calm


def gcs_pid(clusters: Clusters) -> int:
    try:
        return process(clusters, "gcs_server")
    except ValueError:
        return 0
