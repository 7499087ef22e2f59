"""``pdserve up`` from a shell's view: it proves itself, serves, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster import orphans
from tests.cli.terminal import Terminal
from tests.models import tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

START_S = 120.0
RAYLET_S = 20.0


class Up:
    """A ``pdserve up`` in a process group of its own, as a shell would start it."""

    def __init__(self, state: Path, model: Path, *arguments: str) -> None:
        self.state = state
        self.log = state.parent / f"up-{time.monotonic_ns()}.log"
        self.options = ["--set", f"state_dir={state}"]
        command = [sys.executable, "-m", "pdserve.cli.main", "up", *self.options]
        command += ["--model", str(model), "--port", "0", "--grpc-port", "0"]
        command += ["--set", "engine.pool_blocks=200", "--set", "pools.threads_per_worker=1"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--numerics", "exact", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> str:
        """The base URL of HTTP, once it says ready."""
        limit = time.monotonic() + START_S
        while "Ctrl-C stops everything" not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < limit, self.output
            time.sleep(0.05)
        found = re.search(r"HTTP +(http://\S+)", self.output)
        assert found is not None
        return found[1]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pdserve.cli.main", *arguments, *self.options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny", 3)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path.resolve() / "state"
    yield folder
    left = orphans.sweep(folder, grace_s=0)
    assert left == (), "processes were left behind"


def short_dir(state: Path) -> Path:
    return Path(json.loads((state / "run.json").read_text())["short_dir"])


def check_doctor(up: Up, url: str) -> None:
    """It knows the ports and the health of the cluster that runs as its own."""
    port = url.rpartition(":")[2]
    done = up.command("doctor", "--json", "--set", f"router.http_port={port}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["name"]: check["text"] for check in json.loads(done.stdout)["checks"]}
    assert f"{port} is this cluster's own" in found["ports"]
    assert f"runs (pid {up.process.pid}) with 2 workers, all ready" in found["cluster"]


def check_once(up: Up) -> None:
    """Without a terminal, or asked for it: one plain table, and an end."""
    piped = up.command("status")
    lines = piped.stdout.splitlines()
    assert piped.returncode == 0
    assert [line.split()[0] for line in lines] == ["id", "decode-0", "prefill-0"]
    assert "\x1b" not in piped.stdout
    terminal = Terminal([sys.executable, "-m", "pdserve.cli.main", "status", "--once", *up.options])
    try:
        assert terminal.wait_end(60) == 0
        assert "\x1b" not in terminal.raw
        assert terminal.wait_for(r"^decode-0 +ready +decode ")
    finally:
        terminal.close()


def check_live_status(up: Up) -> None:
    """On a terminal it goes on, changes as the cluster does, and leaves the terminal clean."""
    terminal = Terminal([sys.executable, "-m", "pdserve.cli.main", "status", *up.options])
    try:
        names = terminal.wait_for(r"^worker +state ").split()
        before = dict(zip(names, terminal.wait_for(r"^decode-0 +ready ").split(), strict=False))
        terminal.wait_for(r"^prefill +1/1 ")
        terminal.wait_for(r"generated [0-9.]+ tokens/s +KV [0-9.]+ MB/s")
        seen = len(terminal.lines)
        told = up.command("generate", "A prompt of its own, not yet in any cache", "--text")
        assert told.returncode == 0, told.stderr
        terminal.wait_for(
            # Whether a column follows the total depends on how many digits a pid has.
            rf"^decode-0 +ready .* 0 +(?!{before['cached']} )[0-9]+ +200( |$)",
            after=seen,
        )
        # A worker that stands still is shown as such.
        pid = int(before["pid"])
        os.kill(pid, signal.SIGSTOP)
        try:
            terminal.wait_for(r"^decode-0 +suspect ", after=seen)
        finally:
            os.kill(pid, signal.SIGCONT)
        terminal.wait_for(r"^decode-0 +ready ", after=len(terminal.lines))
        assert max(map(len, terminal.lines)) <= 80
        assert not [line for line in terminal.lines if "…" in line]
        terminal.key(b"\x03")
        assert terminal.wait_end() == 0
    finally:
        terminal.close()


def test_it_proves_itself_serves_and_cleans_up_after_a_kill(model: Path, state: Path) -> None:
    first = Up(state, model)
    url = first.wait_ready()
    way = r"tokens read by prefill-0; [\d,]+ bytes of KV moved by shm; \d+ tokens written by decode"
    assert re.search(way, first.output), first.output

    with urllib.request.urlopen(f"{url}/ready", timeout=10) as answer:
        assert answer.status == 200
    status = first.command("status", "--json")
    workers = json.loads(status.stdout)["workers"]
    assert sorted(worker["role"] for worker in workers) == ["decode", "prefill"]
    assert {worker["state"] for worker in workers} == {"ready"}
    assert len({worker["pid"] for worker in workers} | {first.process.pid}) == 3
    assert "prefill-0" in first.command("status").stdout
    told = first.command("generate", "Hello", "--max-tokens", "3", "--usage")
    assert told.returncode == 0, told.stderr
    assert "written by decode-0" in told.stderr
    check_doctor(first, url)
    check_once(first)
    check_live_status(first)
    second = first.command("up")
    assert second.returncode == 2
    assert f"already runs (pid {first.process.pid}, {url})" in second.stderr

    folder = short_dir(state)
    first.process.kill()
    first.process.wait()
    assert folder.is_dir()
    again = Up(state, model)
    again.wait_ready()
    assert not folder.exists()
    assert short_dir(state).is_dir()
    assert not any(Path(f"/proc/{worker['pid']}").exists() for worker in workers)

    folder = short_dir(state)
    # What Ctrl-C on a terminal does, and ``timeout`` and a closed window with other numbers: the
    # whole group is told, and the stop must still be in order.
    os.killpg(again.process.pid, signal.SIGTERM)
    assert again.process.wait(60) == 0, again.output
    assert again.output.rstrip().endswith("stopped")
    assert orphans.find_marked(state) == ()
    assert not folder.exists()
    assert not (state / "run.json").exists()


def test_the_end_of_the_raylet_ends_it_and_every_stream(model: Path, state: Path) -> None:
    """All workers end with it and none can be started again: nobody is to wait for that."""
    up = Up(state, model)
    url = up.wait_ready()
    body = {"prompt": "on and on", "max_tokens": 480, "ignore_eos": True, "stream": True}
    asked = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    (raylet,) = [m for m in orphans.find_marked(state) if m.command.split()[0].endswith("/raylet")]
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")
        os.kill(raylet.pid, signal.SIGKILL)
        began = time.monotonic()
        *_, last = [line for line in answer if line.strip()]
        print(f"the stream ended after {time.monotonic() - began:.1f} s: {last!r}")
    assert "error" in json.loads(last.removeprefix(b"data: "))
    assert up.process.wait(RAYLET_S) == 1, up.output
    print(f"all ended after {time.monotonic() - began:.1f} s")
    assert "Ray's raylet on this host ended, and the cluster with it" in up.output
    assert orphans.find_marked(state) == ()


def test_kv_that_does_not_move_fails_loudly(model: Path, state: Path) -> None:
    up = Up(state, model, "--set", "router.skip_handoff_tokens=100000")
    assert up.process.wait(START_S) == 1, up.output
    assert "KV did not move from prefill to decode" in up.output
    assert "ready after" not in up.output
    assert orphans.find_marked(state) == ()


def test_a_stop_during_the_start_leaves_nothing_and_two_signals_kill(
    model: Path, state: Path
) -> None:
    up = Up(state, model)
    limit = time.monotonic() + START_S
    while "starting 2 workers" not in up.output:
        assert time.monotonic() < limit, up.output
        time.sleep(0.02)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 130, up.output
    assert orphans.find_marked(state) == ()

    up = Up(state, model)
    while not (state / "run.json").exists():
        time.sleep(0.02)
    time.sleep(2)
    up.process.send_signal(signal.SIGINT)
    while "stopping" not in up.output:
        time.sleep(0.01)
    up.process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert up.process.wait(20) == 130, up.output
    assert time.monotonic() - begin < 10
    assert orphans.find_marked(state) == ()
