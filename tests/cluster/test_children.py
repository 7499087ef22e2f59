"""Children are awaited until they serve, restarted when they die, and never outlive their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from pdserve.cluster import orphans
from pdserve.cluster.child import Child, tail_of
from pdserve.cluster.redis_server import RedisServer
from pdserve.config import RedisTierConfig
from pdserve.errors import ConfigError, InternalError, PdserveError


def eventually(true: Callable[[], object], within_s: float = 10.0) -> None:
    limit = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit, "it never became true"
        time.sleep(0.02)


def redis_server(tmp_path: Path, notes: list[str], bytes_max: int = 2**20) -> RedisServer:
    config = RedisTierConfig(bytes_max=bytes_max)
    return RedisServer(config, tmp_path, tmp_path, f"{tmp_path}:run", notes.append)


def test_redis_serves_on_a_socket_alone_keeps_nothing_and_ends(tmp_path: Path) -> None:
    server = redis_server(tmp_path, [], bytes_max=4 * 2**20)
    server.start()
    server.wait_ready()
    try:
        with redis.Redis.from_url(server.url) as client:
            wanted = {
                "port": "0",
                "maxmemory": str(4 * 2**20),
                "maxmemory-policy": "allkeys-lru",
                "save": "",
                "appendonly": "no",
            }
            assert {key: client.config_get(key)[key] for key in wanted} == wanted
            for i in range(64):  # twice its memory: old entries go, writes do not fail
                client.set(f"k{i}", bytes(2**17))
            assert client.get("k63") == bytes(2**17)
            assert client.dbsize() < 64 // 2
        assert orphans.mark_of(server.pid) == f"{tmp_path}:run"
    finally:
        pid = server.pid
        server.stop()
    assert orphans.wait_gone(pid, 0)
    assert not list(tmp_path.glob("*.rdb"))


def test_a_redis_that_dies_comes_back_at_the_same_place(tmp_path: Path) -> None:
    notes: list[str] = []
    server = redis_server(tmp_path, notes)
    server.start()
    server.wait_ready()
    try:
        first = server.pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: "redis serves again, empty" in notes)
        assert server.pid not in (0, first)
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        assert notes[0].startswith("redis ended with code -9")
    finally:
        server.stop()
    assert orphans.find_marked(tmp_path) == ()


def test_a_redis_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "redis.sock").mkdir()
    server = redis_server(tmp_path, [])
    server.start()
    with pytest.raises(ConfigError, match="redis-server did not start"):
        server.wait_ready()
    server.stop()


def child(tmp_path: Path, code: str, ready: Callable[[subprocess.Popen[bytes]], None]) -> Child:
    command = [sys.executable, "-c", code]
    return Child("thing", lambda: command, ready, env={}, log=tmp_path / "log")


def test_a_child_that_never_gets_ready_fails_once_and_is_not_restarted(tmp_path: Path) -> None:
    starts: list[int] = []

    def ready(process: subprocess.Popen[bytes]) -> None:
        starts.append(process.pid)
        process.wait()
        raise ConfigError(tail_of(tmp_path / "log"))

    thing = child(tmp_path, "import sys; sys.exit('the reason')", ready)
    thing.start()
    with pytest.raises(ConfigError, match="the reason"):
        thing.wait_ready(10)
    thing.stop(1)
    assert len(starts) == 1
    assert thing.pid == 0


def test_a_broken_start_is_told_to_who_waits(tmp_path: Path) -> None:
    def ready(process: subprocess.Popen[bytes]) -> None:
        raise ValueError("a bug")

    thing = child(tmp_path, "import time; time.sleep(60)", ready)
    thing.start()
    with pytest.raises(InternalError, match="a bug"):
        thing.wait_ready(10)
    assert thing.pid == 0
    thing.stop(1)


def test_a_missing_program_is_a_clear_error(tmp_path: Path) -> None:
    thing = Child("x", lambda: ["/no/such/program"], lambda p: None, env={}, log=tmp_path / "log")
    thing.start()
    with pytest.raises(PdserveError, match="cannot start /no/such/program"):
        thing.wait_ready(10)
    thing.stop(1)


@pytest.mark.parametrize("missing", ["arguments", "logs", "program", "proof"])
def test_what_keeps_a_child_from_its_restart_is_not_final(tmp_path: Path, missing: str) -> None:
    """Files that are gone for a while stand for a full disk and for a host that is short of all."""
    arguments, program, proof = (tmp_path / name for name in ("arguments", "program", "proof"))
    logs = tmp_path / "logs"
    arguments.write_text("60")
    program.symlink_to("/bin/sleep")
    logs.mkdir()
    proof.touch()
    deaths: list[int] = []
    readies: list[bool] = []
    thing = Child(
        "thing",
        lambda: [str(program), arguments.read_text()],
        lambda process: proof.stat() and None,
        env={},
        log=logs / "log",
        on_ready=readies.append,
        on_death=deaths.append,
    )
    thing.start()
    thing.wait_ready(10)
    try:
        first = thing.pid
        (tmp_path / missing).rename(tmp_path / "away")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: deaths)
        time.sleep(1.0)  # some tries
        assert thing.pid == 0
        (tmp_path / "away").rename(tmp_path / missing)
        eventually(lambda: len(readies) == 2)
        assert thing.pid not in (0, first)
        assert readies == [False, True]
        assert deaths == [-signal.SIGKILL]
    finally:
        thing.stop(1)
    assert thing.pid == 0


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    thing = child(tmp_path, code, lambda p: time.sleep(0.3))
    thing.start()
    thing.wait_ready(10)
    pid = thing.pid
    begin = time.monotonic()
    thing.stop(0.2)
    assert time.monotonic() - begin < 5
    assert orphans.wait_gone(pid, 0)


def test_a_stop_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    reached = threading.Event()

    def ready(process: subprocess.Popen[bytes]) -> None:
        reached.set()
        process.wait()
        raise InternalError("ended")

    thing = child(tmp_path, "import time; time.sleep(60)", ready)
    thing.start()
    assert reached.wait(10)
    pid = thing.pid
    thing.stop(5)
    assert orphans.wait_gone(pid, 0)


def test_children_die_with_a_killed_owner(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pdserve.cluster.child import Child\n"
        "c = Child('x', lambda: [sys.executable, '-c', 'import time; time.sleep(60)'],"
        " lambda p: None, env={}, log=Path(sys.argv[1]))\n"
        "c.start(); c.wait_ready(10); print(c.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert not orphans.wait_gone(pid, 0.1)
    owner.kill()
    owner.wait()
    assert orphans.wait_gone(pid, 5)


BUSY_OWNER = """
import subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pdserve.cli import main
main.main(["status", "--name", "there-is-none"])  # imports what every command imports, in order
from pdserve.cluster.child import Child
import grpc

class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)

server = grpc.server(ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((Echo(),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
over = threading.Event()

def ask():
    asked = 0
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        while not over.is_set():
            channel.unary_unary("/a/b")(b"x")
            asked += 1
    return asked

with ThreadPoolExecutor(4) as threads:
    asking = [threads.submit(ask) for _ in range(4)]
    ended = [subprocess.Popen(["true"], preexec_fn=lambda: None).wait(10) for _ in range(100)]
    over.set()
assert all(one.result() for one in asking)
server.stop(None)
print(sorted(set(ended)))
"""


@pytest.mark.parametrize("given", [{}, {"GRPC_ENABLE_FORK_SUPPORT": "1"}], ids=["unset", "on"])
def test_children_start_while_their_owner_uses_grpc(given: dict[str, str]) -> None:
    """gRPC's own handlers of a fork abort a child now and then, before it is another program."""
    others = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    environment = {**others, **given}
    done = subprocess.run(
        [sys.executable, "-c", BUSY_OWNER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "[0]\n"
    assert "fork" not in done.stderr
