"""Changes to a running cluster: nothing is lost by a drain, and each change is what it says.

One cluster for the whole file; the commands are run as an operator runs them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from pdserve.cli import main as cli
from pdserve.cluster.admin_access import read_access
from pdserve.cluster.run_dir import ADMIN_FILE
from pdserve.faults import Action, Step
from pdserve.v1 import admin_pb2 as pb
from pdserve.v1 import admin_pb2_grpc
from tests.e2e.ask import Answer, request
from tests.e2e.clusters import Clusters, Running, Variant

VARIANT = Variant(
    "llama",
    "shm",
    "roomy",
    prefill=1,
    decode=2,
    settings=(
        "pools.decode_max=3",
        "timers.start_timeout_s=60",
        "timers.heartbeat_s=0.2",
        "cache.kv_events=true",
        "testing.faults=true",
    ),
)
LONG = 400
# Shorter than the death timer: the worker that is held up lives.
HELD_S = 4.0


@pytest.fixture
def running(clusters: Clusters) -> Running:
    return clusters.get(VARIANT)


class Operator:
    """Runs ``pdserve admin`` against one cluster and reads its answer."""

    def __init__(self, running: Running, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = running.cluster.run.state_dir
        self._capsys = capsys

    def run(self, action: str, *words: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        state = f"state_dir={self.folder}"
        status = cli.main(["admin", action, *words, "--set", state])
        out, err = self._capsys.readouterr()
        return status, out, err

    def done(self, action: str, *words: str) -> Any:
        status, out, err = self.run(action, *words, "--json")
        assert status == 0, out + err
        return json.loads(out)


@pytest.fixture
def operator(running: Running, capsys: pytest.CaptureFixture[str]) -> Operator:
    return Operator(running, capsys)


def prompts(count: int, length: int = 40) -> list[list[int]]:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    return [[draw.randrange(3, 100) for _ in range(length)] for _ in range(count)]


def ask_all(running: Running, asked: list[list[int]], length: int) -> list[Answer]:
    """All at once, each to its full length."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(
            pool.map(lambda p: running.caller.stream(request(p, length, ignore_eos=True)), asked)
        )


def begin(
    pool: ThreadPoolExecutor, running: Running, asked: list[list[int]], worker: str
) -> Future[list[Answer]]:
    """The streams are under way, some of them on this worker."""
    # A worker's last heartbeat may still tell of the requests before these.
    running.wait(lambda: not any(w["running"] for w in running.workers()))
    answers = pool.submit(ask_all, running, asked, LONG)
    running.wait(lambda: any(w["running"] for w in running.workers() if w["id"] == worker))
    return answers


def tokens(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def ids(running: Running, state: str = "ready") -> list[str]:
    return sorted(worker["id"] for worker in running.workers() if worker["state"] == state)


def test_streams_lose_nothing_when_their_worker_is_drained(
    running: Running, operator: Operator
) -> None:
    asked = prompts(8)
    expected = tokens(ask_all(running, asked, LONG))
    operator.done("flush", "all")
    with ThreadPoolExecutor(1) as pool:
        answers = begin(pool, running, asked, "decode-0")
        done = operator.done("drain", "decode-0", "--drain-s", "0")
        got = answers.result()
    assert tokens(got) == expected
    drained = done["drained"]
    assert drained.get("handed_over", 0) > 0, "it was idle: nothing was shown"
    assert ids(running, "draining") == ["decode-0"]
    assert any(a.usage.resumes for a in got)
    # No new work, until told.
    assert {a.usage.decode_worker for a in running.caller.ask_all(prompts(4), 4)} == {"decode-1"}
    # Its process may end and come back: it still takes nothing.
    before = {w["id"]: w["incarnation"] for w in running.workers()}
    running.cluster.kill_worker(running.cluster.workers()[1].id)
    running.wait(
        lambda: any(
            w["id"] == "decode-0"
            and w["incarnation"] != before["decode-0"]
            and w["state"] == "draining"
            for w in running.workers()
        )
    )
    assert running.caller.ask(asked[0], 4).usage.decode_worker == "decode-1"
    # The other one does the only work there is.
    status, _, error = operator.run("drain", "decode-1")
    assert status == 1
    assert "no other decode or mixed worker takes work" in error
    assert operator.done("undrain", "decode-0") == {"was_drained": True}
    running.wait_ready()
    running.check_idle()


def test_a_drain_with_time_lets_streams_end_where_they_are(
    running: Running, operator: Operator
) -> None:
    asked = prompts(6)
    with ThreadPoolExecutor(1) as pool:
        answers = begin(pool, running, asked, "decode-1")
        drained = operator.done("drain", "decode-1", "--drain-s", "60")["drained"]
        got = answers.result()
    assert "handed_over" not in drained
    assert [a.usage.resumes for a in got] == [0] * 6
    assert all(len(a.tokens) == LONG for a in got)
    assert drained["finished"] > 0, "it was idle: nothing was shown"
    operator.done("undrain", "decode-1")
    running.wait_ready()


def test_pools_grow_and_shrink_and_what_is_added_takes_work(
    running: Running, operator: Operator
) -> None:
    assert operator.done("add", "decode")["added"] == ["decode-2"]
    assert ids(running) == ["decode-0", "decode-1", "decode-2", "prefill-0"]
    status, _, error = operator.run("add", "decode")
    assert status == 1
    assert "decode = 4: allowed are 0 to 3" in error
    assert operator.done("resize", "decode=3").get("added", []) == [], "already so"
    busy = {a.usage.decode_worker for a in running.caller.ask_all(prompts(12), 12)}
    assert "decode-2" in busy
    gone = operator.done("remove", "decode-1")
    assert [one["worker"] for one in gone["removed"]] == ["decode-1"]
    assert [w["id"] for w in running.workers()] == ["decode-0", "decode-2", "prefill-0"]
    back = operator.done("resize", "prefill=2", "decode=1")
    assert back["added"] == ["prefill-1"]
    assert [one["worker"] for one in back["removed"]] == ["decode-2"]
    assert ids(running) == ["decode-0", "prefill-0", "prefill-1"]
    assert {w.id for w in running.cluster.workers()} == {"decode-0", "prefill-0", "prefill-1"}
    back = operator.done("resize", "prefill=1", "decode=2")
    assert ids(running) == ["decode-0", "decode-1", "prefill-0"]
    assert running.caller.ask(prompts(1)[0], 4).usage.prefill_worker == "prefill-0"
    running.check_idle()


def test_flushed_tiers_serve_nothing_any_more(running: Running, operator: Operator) -> None:
    (prompt,) = prompts(1, 100)

    def cached() -> Any:
        answer = running.caller.ask(prompt, 4)
        running.settle()
        return answer.cached

    def flushed(tier: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for worker in operator.done("flush", tier)["workers"]:
            assert "error" not in worker
            for one in worker.get("tiers", []):
                found[one["tier"]] = found.get(one["tier"], 0) + one.get("blocks", 0)
        return found

    flushed("all")
    assert cached().device == 0
    assert cached().device >= 96
    assert flushed("device")["device"] >= 6
    assert cached().host >= 96, "the next tier still has them"
    assert flushed("device")["device"] >= 6
    assert flushed("host")["host"] >= 6
    assert cached().redis >= 96
    gone = flushed("all")
    assert gone["redis"] >= 6
    assert set(gone) == {"device", "host", "redis"}
    last = cached()
    assert (last.device, last.host, last.redis) == (0, 0, 0)


def test_a_flush_spares_what_is_in_use(running: Running, operator: Operator) -> None:
    asked = prompts(3)
    expected = tokens(ask_all(running, asked, LONG))
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask_all, running, asked, LONG)
        while not answers.done():
            operator.done("flush", "all")
    assert tokens(answers.result()) == expected
    running.check_idle()


def test_log_levels_change_while_all_runs(running: Running, operator: Operator) -> None:
    logs = running.cluster.run.logs
    answer = operator.done("log-level", "debug", "--worker", "router")
    assert answer == {"targets": [{"target": "router", "before": "info"}]}
    running.caller.ask(prompts(1)[0], 2, request_id="said-at-debug")
    running.wait(lambda: "said-at-debug: attempt" in (logs / "router.log").read_text(), 5)
    targets = operator.done("log-level", "info")["targets"]
    found = {one["target"]: one["before"] for one in targets}
    assert found["router"] == "debug"
    assert found["decode-0"] == "info"
    assert set(found) == {"router", *(f.id for f in running.cluster.workers())}
    status, _, error = operator.run("log-level", "info", "--worker", "decode-9")
    assert status == 1
    assert "allowed are router, prefill-0" in error


def test_one_change_at_a_time(running: Running, operator: Operator) -> None:
    """The drain is under way for as long as a stream is held up on its worker."""
    access = read_access(operator.folder / ADMIN_FILE)
    request = pb.DrainWorkerRequest(worker="decode-0", drain_s=60)
    header = access.identity.header("/pdserve.v1.Admin/")
    victim = running.arm("decode", Step.ENGINE_STEP, Action.HANG, 40, HELD_S)
    assert victim.id == "decode-0"
    fired = running.fired(victim)
    with grpc.insecure_channel(access.address) as channel, ThreadPoolExecutor(2) as pool:
        stub = admin_pb2_grpc.AdminStub(channel)
        answers = begin(pool, running, prompts(4), "decode-0")
        running.wait(lambda: running.fired(victim) > fired)
        first = pool.submit(stub.DrainWorker, request, metadata=(("authorization", header),))
        running.wait(lambda: operator.done("pools").get("under_way", "") == "drain decode-0", 10)
        status, _, error = operator.run("resize", "decode=3")
        assert not first.done(), "it was too fast: nothing was shown"
        assert status == 1
        assert "drain decode-0" in error
        first.result()
        assert all(len(answer.tokens) == LONG for answer in answers.result())
    text = operator.run("pools")[1]
    assert "decode-0 (drained)" in text
    operator.done("undrain", "decode-0")
    running.wait_ready()


def test_strangers_and_other_roles_are_refused(running: Running, operator: Operator) -> None:
    access = read_access(operator.folder / ADMIN_FILE)
    assert (operator.folder / ADMIN_FILE).stat().st_mode & 0o777 == 0o600
    assert access.address.startswith("127.0.0.1:")
    methods = pb.DESCRIPTOR.services_by_name["Admin"].methods
    with grpc.insecure_channel(access.address) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        for method in methods:
            make: Any = method.input_type._concrete_class
            for header in ("", "Bearer guess", access.identity.header("/pdserve.v1.Worker/")):
                with pytest.raises(grpc.RpcError) as caught:
                    getattr(stub, method.name)(
                        make(), metadata=(("authorization", header),), timeout=5
                    )
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    for worker in running.cluster.workers():
        with grpc.insecure_channel(worker.address) as channel:
            header = access.identity.header("/pdserve.v1.Logging/")
            call = admin_pb2_grpc.LoggingStub(channel).SetLevel
            with pytest.raises(grpc.RpcError) as caught:
                call(
                    pb.SetLevelRequest(level="debug"),
                    metadata=(("authorization", header),),
                    timeout=5,
                )
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("drain", "decode-7"), 1, "'decode-7' is none of this cluster's: prefill-0, decode-0"),
        (("drain", "decode-0", "--drain-s", "-1"), 1, "drain_s: -1; expected 0 to 86400"),
        (("resize", "decode=0"), 1, "somebody must write the answers"),
        (("resize", "decoder=1"), 2, "decoder=1: expected ROLE=N, ROLE one of prefill, decode"),
        (("add", "decode", "0"), 2, "expected a number of at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    operator: Operator, words: tuple[str, ...], status: int, text: str
) -> None:
    got, out, error = operator.run(*words)
    assert (got, out) == (status, "")
    assert text in error
    assert error.count("\n") == 1
