"""A Ray cluster on hosts of its own, and ``pdserve up`` on one of them that offers nothing.

    with Hosts({"head": {}, "router": {}, "left": {"prefill": 1}}) as hosts:
        hosts.join("head") ... hosts.up("pools.prefill=1", ...) ... hosts.ask(...)

Each host is a network and a mount namespace with an address, a /tmp and a /dev/shm of its own; what
one sends another crosses a veth pair and a bridge. Nothing supervises a host: what ends stays ended
until the test starts it again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.deploy.pods import Pod, Site, path_inside, source_path
from tests.models import tiny_model

GRPC = 50051
TOKEN = "a-token-for-the-hosts-of-a-test"
CLIENT = "client"
SEED = 3
# Ray gives up a silent node after some seconds, where it would wait for half a minute.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}


@dataclass(frozen=True)
class Stream:
    """How one stream ended."""

    tokens: list[int]
    took_s: float
    gap_s: float  # longest silence between two messages
    prefill: str
    decode: str
    moved: int  # bytes of KV
    transport: str
    skipped: str
    resumes: int


class Asked:
    """Streams on their way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def streaming(self) -> Asked:
        """Returns once every stream has begun."""
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"streaming": True}
        return self

    def answers(self) -> list[Stream]:
        out, err = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, err[-3000:]
        return [Stream(**found) for found in json.loads(out.splitlines()[-1])]


class Hosts:
    """Owns the site and what runs on it."""

    def __init__(
        self, offers: Mapping[str, Mapping[str, float]], name: str, router: str = "router"
    ) -> None:
        """``offers``: hosts with the resources of each. ``router``: where ``pdserve up`` runs."""
        self._offers = offers
        self._name = name
        self._router = router
        self.site = Site(dict.fromkeys((*offers, CLIENT), ()))
        self._salt = 0
        self._up: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Hosts:
        self.site.__enter__()
        tiny_model("llama", self.site.folder / "model", SEED)
        (self.site.folder / "token").write_text(TOKEN)
        subprocess.run(["chmod", "-R", "a+rX", str(self.site.folder)], check=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.site.close()

    def pod(self, host: str) -> Pod:
        return self.site.pods[host]

    def env(self, host: str) -> dict[str, str]:
        home = self.pod(host).folder / "home"
        return {
            "PATH": path_inside(),
            "PYTHONPATH": source_path(),
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "CLUSTER_TOKEN": TOKEN,
            "GRPC_DNS_RESOLVER": "native",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "5e" * 32,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
            **_HEALTH,
        }

    def join(self, host: str, options: str = "", env: Mapping[str, str] | None = None) -> None:
        """``ray start`` on that host; does not wait."""
        command = f"exec {self._ray_start(host)} --block {options}"
        self.pod(host).start(command, self.env(host) | dict(env or {}))

    def _ray_start(self, host: str) -> str:
        where = "--address=head:6379"
        if host == "head":
            where = "--head --port=6379 --include-dashboard=false"
        offer = shlex.quote(json.dumps(dict(self._offers[host])))
        return (
            f"ray start {where} --node-ip-address={self.pod(host).address} --num-cpus=0"
            f" --num-gpus=0 --resources={offer} --object-store-memory=83886080"
            " --disable-usage-stats"
        )

    def keep_tables(self, host: str) -> None:
        """A Redis for the head's tables, which then outlive the head."""
        command = f"exec redis-server --bind 0.0.0.0 --requirepass {TOKEN} --save ''"
        self.pod(host).start(f"cd {self.pod(host).folder}/data; {command}", self.env(host))
        self.await_port(host, 6379)

    def join_head(self, tables: str) -> None:
        """The head, with its tables in that host's Redis."""
        redis = {"RAY_REDIS_ADDRESS": f"{tables}:6379", "RAY_external_storage_namespace": "hosts"}
        self.join("head", f"--redis-password={TOKEN}", redis)
        self.await_port("head", 6379)

    def await_port(self, host: str, wanted: int, timeout_s: float = 60.0) -> None:
        pod = self.pod(host)
        limit = time.monotonic() + timeout_s
        while not any(port == wanted for _, port, _, _ in pod.sockets("-l")):
            assert time.monotonic() < limit, pod.log.read_text()[-2000:]
            time.sleep(0.2)

    def up(self, *settings: str) -> None:
        """``pdserve up --address``, on a host that has joined, or does so now."""
        values = [
            f"model.path={self.site.folder}/model",
            "model.numerics=exact",
            "engine.pool_blocks=400",
            "engine.prefill_chunk=48",
            "pools.threads_per_worker=1",
            "transfer.transports=tcp",
            "cache.redis.mode=off",
            "router.host=0.0.0.0",
            "router.skip_handoff_tokens=0",
            "router.policy=round_robin",
            f"security.cluster_token_file={self.site.folder}/token",
            *settings,
        ]
        sets = " ".join(f"--set {shlex.quote(value)}" for value in values)
        command = f"exec pdserve up --address head:6379 --name {self._name} {sets}"
        if self._router != "head":
            command = f"{self._ray_start(self._router)} && {command}"
        self._up = self.pod(self._router).start(command, self.env(self._router))

    def end(self, within_s: float) -> int:
        """The exit status of ``pdserve up``, which ends by itself."""
        assert self._up is not None
        return self._up.wait(within_s)

    def log(self) -> str:
        return self.pod(self._router).log.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, str]:
        done = self.pod(CLIENT).run(
            f"curl -s -m 5 -w '\\n%{{http_code}}' http://{self._router}:8000{path}",
            self.env(CLIENT),
        )
        body, _, status = done.stdout.rpartition("\n")
        return int(status or 0), body

    def workers(self) -> dict[str, dict[str, Any]]:
        status, body = self.get("/workers")
        return {w["id"]: w for w in json.loads(body)["workers"]} if status == 200 else {}

    def ready(self) -> dict[str, str]:
        """Workers that are ready, with the host that each is on."""
        names = {pod.address: name for name, pod in self.site.pods.items()}
        return {
            worker: names[one["node"]]
            for worker, one in self.workers().items()
            if one["state"] == "ready"
        }

    def wait(self, true: Callable[[], bool], within_s: float) -> float:
        """Seconds until it was so."""
        began = time.monotonic()
        while not true():
            ended = self._up is not None and self._up.poll() is not None
            late = time.monotonic() - began > within_s
            assert not ended, self.log()[-3000:]
            assert not late, f"{self.workers()}\n{self.log()[-3000:]}"
            time.sleep(0.1)
        return time.monotonic() - began

    def ask(self, seed: str, count: int = 6, tokens: int = 24) -> Asked:
        """Streams from the client's host; each call reads its prompts anew."""
        self._salt += 1
        words = [seed, str(count), str(tokens), f"salt-{self._salt}"]
        command = f"exec python -m tests.deploy.asker {self._router}:{GRPC} {shlex.join(words)}"
        process = subprocess.Popen(
            self.pod(CLIENT).command(f"cd {source_path()}; {command}", self.env(CLIENT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Asked(process)

    def check_idle(self, hosts: Iterable[str], within_s: float = 20.0) -> None:
        """Every worker on these hosts has all blocks free or cached, and nothing else open."""
        on = {self.pod(host).address for host in hosts}
        workers = [w["address"] for w in self.workers().values() if w["node"] in on]
        assert workers
        limit = time.monotonic() + within_s
        while not all(found := self._idle(workers)):
            assert time.monotonic() < limit, dict(zip(workers, found, strict=True))
            time.sleep(0.5)

    def _idle(self, workers: Sequence[str]) -> list[bool]:
        command = (
            f"cd {source_path()}; exec python -m tests.deploy.asker idle {shlex.join(workers)}"
        )
        done = self.pod(CLIENT).run(command, self.env(CLIENT))
        assert done.returncode == 0, done.stderr[-2000:]
        found: list[bool] = json.loads(done.stdout)
        return found

    def link(self, host: str, state: str) -> None:
        """``down``: as if its cable were out, in both directions; ``up``: in again."""
        port = f"v{self.pod(host).address.rpartition('.')[2]}"
        words = ["ip", "-n", self.site.hub, "link", "set", port, state]
        subprocess.run(words, check=True, capture_output=True, timeout=10)

    def leave(self, host: str, within_s: float) -> subprocess.CompletedProcess[str]:
        """What a host's own service manager, or its pod's preStop, runs first."""
        command = f"exec pdserve leave --address head:6379 --within {within_s:g}"
        return self.pod(host).run(command, self.env(host), timeout=within_s + 30)

    def kill_raylet(self, host: str) -> None:
        (raylet,) = self.pod(host).pids("raylet")
        self.pod(host).kill(raylet)

    def rejoin(self, host: str) -> None:
        """What a host's own supervisor does when its ``ray start`` has ended."""
        self.pod(host).end()
        self.join(host)

    def route(self, host: str, kind: str, target: str) -> None:
        """``ip route KIND`` on a host: ``add blackhole`` or ``del blackhole`` to another."""
        address = f"{self.pod(target).address}/32"
        words = ["ip", "-n", self.pod(host).namespace, "route", *kind.split(), address]
        subprocess.run(words, check=True, capture_output=True, timeout=10)
