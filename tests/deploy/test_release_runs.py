"""The chart's own commands on seven hosts: non-root, read-only root, an address of its own each.

One release is started once, asked, looked at, loses a worker and then its head, and is stopped, in
that order.
"""

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.pods import can_isolate, path_inside
from tests.deploy.release import NAME, Release
from tests.deploy.tools import of_kind, render
from tests.models import tiny_model

pytestmark = [pytest.mark.deploy, pytest.mark.cluster, pytest.mark.timeout(400)]
SEED = 3
READY_S = 120.0
LONG = " ".join(f"line {index} of the story" for index in range(24))
ENV = {"PATH": path_inside()}


@pytest.fixture(scope="module")
def release() -> Iterator[Release]:
    reason = can_isolate()
    if reason:
        pytest.skip(f"SKIPPED HOSTS IN NAMESPACES: {reason}")
    sets = ("config.model.path=/models/tiny", f"test.prompt={LONG}", "config.timers.drain_s=10")
    with Release(render("values-cpu.yaml", *sets)) as made:
        folder = tiny_model("llama", made.site.folder / "models" / "tiny", SEED)
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        for component in ("cache", "gcs"):
            made.start(component)
        made.start("head")
        made.probe_ray("head")
        # Pods start in any order: the router waits for its workers' hosts.
        made.start("router")
        for component in ("prefill", "decode"):
            made.start(component)
        for component in ("prefill", "decode"):
            made.probe_ray(component)
        yield made


def get(release: Release, path: str) -> tuple[int, str]:
    """The Service's answer, from the pod of the test."""
    url = f"http://{NAME}-router:8000{path}"
    done = release.pod("test").run(f"curl -s -m 5 -w '\\n%{{http_code}}' {url}", ENV)
    body, _, status = done.stdout.rpartition("\n")
    return int(status or 0), body


def wait_ready(release: Release) -> None:
    limit = time.monotonic() + READY_S
    while (answer := get(release, "/ready"))[0] != 200:
        log = release.pod("router").log.read_text(errors="replace")
        assert time.monotonic() < limit, f"{answer}\n{log[-3000:]}"
        time.sleep(0.5)


def test_helm_test_gets_its_answer_by_way_of_both_pools(release: Release) -> None:
    wait_ready(release)
    done = release.ask()
    assert done.returncode == 0, done.stderr
    moved = re.search(r"([0-9,]+) bytes of KV moved by tcp", done.stderr)
    assert moved is not None, done.stderr
    assert int(moved[1].replace(",", "")) > 0


def test_workers_live_on_the_hosts_of_their_role(release: Release) -> None:
    status, body = get(release, "/workers")
    assert status == 200
    workers: list[dict[str, Any]] = json.loads(body)["workers"]
    nodes = {worker["role"]: worker["node"] for worker in workers}
    assert nodes == {role: release.pod(role).address for role in ("prefill", "decode")}


def allows(release: Release, source: str, target: str, port: int) -> bool:
    """Whether the rendered policies let ``source`` call ``target`` there: both ends must agree."""
    policies = of_kind(release.objects, "NetworkPolicy")
    out = any(
        selects(policy["spec"]["podSelector"], source)
        and any(
            any(selects(peer.get("podSelector"), target) for peer in rule.get("to", ()))
            and covers(rule, port)
            for rule in policy["spec"].get("egress", ())
        )
        for policy in policies
    )
    into = any(
        selects(policy["spec"]["podSelector"], target)
        and any(
            covers(rule, port)
            and (
                "from" not in rule
                or any(selects(peer.get("podSelector"), source) for peer in rule["from"])
            )
            for rule in policy["spec"].get("ingress", ())
        )
        for policy in policies
    )
    return out and into


def selects(selector: dict[str, Any] | None, component: str) -> bool:
    if selector is None:
        return False
    wanted = selector.get("matchLabels", {}).get("app.kubernetes.io/component")
    if wanted is not None and wanted != component:
        return False
    return all(component in entry["values"] for entry in selector.get("matchExpressions", ()))


def covers(rule: dict[str, Any], port: int) -> bool:
    return any(
        entry["protocol"] == "TCP" and entry["port"] <= port <= entry.get("endPort", entry["port"])
        for entry in rule["ports"]
    )


def test_every_connection_is_one_that_the_policies_allow(release: Release) -> None:
    owners = {pod.address: name for name, pod in release.site.pods.items()}
    seen = set()
    for target, pod in release.site.pods.items():
        listening = {port for _, port, _, _ in pod.sockets("-l")}
        for local, port, peer, _ in pod.sockets("state", "established"):
            if local == pod.address and port in listening and peer in owners:
                seen.add((owners[peer], target, port))
    between = {(source, target) for source, target, _ in seen if source != target}
    assert {("router", "decode"), ("decode", "prefill"), ("decode", "cache")} <= between
    assert ("head", "gcs") in between, "the control plane keeps its tables in Redis"
    refused = [link for link in seen if link[0] != link[1] and not allows(release, *link)]
    assert not refused


def test_what_the_policies_refuse_is_noticed() -> None:
    made = Release.__new__(Release)
    made.objects = render("values-cpu.yaml")
    assert allows(made, "decode", "prefill", 20001)
    assert not allows(made, "test", "prefill", 20001)
    assert not allows(made, "cache", "router", 8000)
    assert not allows(made, "decode", "gcs", 6379)
    assert not allows(made, "router", "head", 22)


def lose_worker(release: Release) -> int:
    """Kills the decode worker; returns how asking ended once another one is there."""
    before = json.loads(get(release, "/workers")[1])["workers"]
    decode = next(worker for worker in before if worker["role"] == "decode")
    release.pod("decode").kill(decode["pid"])
    limit = time.monotonic() + 60
    while True:
        now = json.loads(get(release, "/workers")[1])["workers"]
        fresh = [w for w in now if w["id"] == decode["id"] and w["state"] == "ready"]
        if fresh and fresh[0]["incarnation"] != decode["incarnation"]:
            break
        log = release.pod("router").log.read_text(errors="replace")
        assert time.monotonic() < limit, f"{now}\n{log[-2000:]}"
        time.sleep(0.5)
    return release.ask().returncode


def test_a_worker_that_dies_is_back_and_answers(release: Release) -> None:
    assert lose_worker(release) == 0


def test_streams_go_on_while_the_head_is_away_and_it_comes_back(release: Release) -> None:
    script = (
        f"curl -sN -m 60 http://{NAME}-router:8000/v1/completions -H 'content-type: "
        'application/json\' -d \'{"prompt": "on and on", "max_tokens": 400, "ignore_eos": true, '
        '"stream": true}\''
    )
    answers: list[str] = []
    stream = threading.Thread(
        target=lambda: answers.append(release.pod("test").run(script, ENV, 90).stdout)
    )
    stream.start()
    release.pod("head").end()
    done = release.ask()
    assert done.returncode == 0, f"asked while the head is away: {done.stderr}"
    stream.join(90)
    assert answers[0].rstrip().endswith("data: [DONE]"), answers[0][-300:]
    release.start("head")
    release.probe_ray("head")
    assert get(release, "/ready")[0] == 200
    assert release.ask().returncode == 0


def test_a_worker_that_dies_after_the_heads_return_is_back_as_well(release: Release) -> None:
    assert lose_worker(release) == 0


def test_the_last_worker_of_its_kind_serves_until_its_pod_ends(release: Release) -> None:
    """The hook of a pod that is to end, with less time than the kubelet gives it."""
    (container,) = release.templates["decode"]["spec"]["containers"]
    words = container["lifecycle"]["preStop"]["exec"]["command"]
    assert words[-2] == "--within"
    done = release.execute("decode", [*words[:-1], "4"])
    assert done.returncode == 1, done.stdout
    assert "workers still run here after 4 s" in done.stderr
    log = release.pod("router").log.read_text(errors="replace")
    assert "decode-0: on a host that leaves, and nobody else could do their work" in log
    assert release.ask().returncode == 0


def test_the_router_drains_within_its_grace(release: Release) -> None:
    spec = release.templates["router"]["spec"]
    grace = spec["terminationGracePeriodSeconds"]
    release.pod("router").stop(signal.SIGTERM)
    began = time.monotonic()
    while release.pod("router").pids("pdserve"):
        assert time.monotonic() - began < grace
        time.sleep(0.2)
    log = release.pod("router").log.read_text(errors="replace")
    assert log.rstrip().endswith("stopped"), log[-500:]
