"""One run per name: a second is refused, and what a killed one left is found and ended."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.cluster import orphans, ports, run_dir
from pdserve.config import Config, SecurityConfig
from pdserve.errors import ConfigError

IGNORES_TERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(60)"
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="t", state_dir=str(tmp_path / "state"))


@pytest.fixture
def spawned() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def spawn(
    spawned: list[subprocess.Popen[bytes]], mark: str | None, code: str = IGNORES_TERM
) -> subprocess.Popen[bytes]:
    env = {key: value for key, value in os.environ.items() if key != orphans.MARK}
    if mark is not None:
        env[orphans.MARK] = mark
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    spawned.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_a_sweep_ends_only_what_carries_the_mark(
    tmp_path: Path, spawned: list[subprocess.Popen[bytes]]
) -> None:
    ours, other = tmp_path / "a", tmp_path / "ab"  # one path is a prefix of the other
    marked = [spawn(spawned, f"{ours}:1"), spawn(spawned, f"{ours}:2")]
    spared = [spawn(spawned, None), spawn(spawned, f"{other}:1"), spawn(spawned, str(ours))]
    assert {p.pid for p in orphans.find_marked(ours)} == {p.pid for p in marked}
    assert {p.pid for p in orphans.find_marked(ours, "2")} == {marked[1].pid}

    ended = orphans.sweep(ours, grace_s=0.3)

    assert {p.pid for p in ended} == {p.pid for p in marked}
    assert [p.wait(5) for p in marked] == [-signal.SIGKILL] * 2  # they ignored SIGTERM
    assert [p.poll() for p in spared] == [None] * 3


def test_a_stopped_process_and_its_children_are_ended_too(
    tmp_path: Path, spawned: list[subprocess.Popen[bytes]]
) -> None:
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('up', flush=True); time.sleep(60)"
    )
    parent = spawn(spawned, f"{tmp_path}:x", code)
    assert len(orphans.find_marked(tmp_path)) == 2
    parent.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert len(orphans.sweep(tmp_path, grace_s=0.3)) == 2
    assert time.monotonic() - begin < 5
    assert orphans.find_marked(tmp_path) == ()


def test_killing_by_pid_asks_for_the_mark(
    tmp_path: Path, spawned: list[subprocess.Popen[bytes]]
) -> None:
    process = spawn(spawned, f"{tmp_path}:x")
    assert not orphans.kill_pid(process.pid, f"{tmp_path}:y")
    assert not orphans.wait_gone(process.pid, 0.1)
    assert orphans.kill_pid(process.pid, f"{tmp_path}:x")
    assert process.wait(5) == -signal.SIGKILL
    assert orphans.wait_gone(process.pid, 0)
    assert not orphans.kill_pid(process.pid, f"{tmp_path}:x")


def test_a_second_run_of_the_same_name_is_refused_and_names_the_first(config: Config) -> None:
    first = run_dir.open_run(config)
    first.record(http="http://127.0.0.1:8000")
    with pytest.raises(ConfigError) as caught:
        run_dir.open_run(config)
    assert f"pid {os.getpid()}, http://127.0.0.1:8000" in str(caught.value)
    assert "--name" in str(caught.value)
    first.close()
    run_dir.open_run(config).close()


def test_a_run_cleans_up_after_one_that_was_killed(
    config: Config, spawned: list[subprocess.Popen[bytes]]
) -> None:
    code = (
        "import sys; from pdserve.cluster.run_dir import open_run; "
        "from pdserve.config import Config; import time; "
        "run = open_run(Config(name='t', state_dir=sys.argv[1])); "
        "(run.short_dir / 'ray').mkdir(); print(run.mark, run.short_dir, flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, config.state_dir], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    mark, short_dir = holder.stdout.readline().split()
    left_behind = spawn(spawned, mark)
    bystander = spawn(spawned, None)
    holder.kill()
    holder.wait()
    assert Path(short_dir, "ray").is_dir()

    run = run_dir.open_run(config)

    assert [p.pid for p in run.orphans] == [left_behind.pid]
    assert bystander.poll() is None
    assert not Path(short_dir).exists()
    assert run.short_dir.is_dir()
    assert str(run.short_dir) != short_dir
    run.close()
    assert not run.short_dir.exists()
    assert run_dir.read_record(run.state_dir) is None


def test_a_forged_record_removes_nothing(config: Config, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    state = run_dir.state_dir_of(config)
    state.mkdir(parents=True)
    record = run_dir.RunRecord(1, "x", str(precious))
    (state / "run.json").write_text(json.dumps(dataclasses.asdict(record)))
    assert run_dir.read_record(state) == record
    run_dir.open_run(config).close()
    assert precious.is_dir()


def test_folders_are_private_and_short_enough_for_sockets(config: Config) -> None:
    run = run_dir.open_run(config)
    try:
        for folder in (run.state_dir, run.short_dir, run.boot_dir, run.logs):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
        session = "ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
        assert len(str(run.short_dir / session)) <= 107
    finally:
        run.close()


def test_logs_of_the_run_before_are_kept_once(config: Config) -> None:
    for text in ("first", "second", "third"):
        run = run_dir.open_run(config)
        (run.logs / "router.log").write_text(text)
        run.close()
    state = run_dir.state_dir_of(config)
    assert (state / "logs" / "router.log").read_text() == "third"
    assert (state / "logs.previous" / "router.log").read_text() == "second"


def test_a_state_folder_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state folder"):
        run_dir.open_run(Config(state_dir=str(tmp_path / "file" / "state")))


def test_a_full_disk_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "FREE_BYTES_MIN", 2**60)
    with pytest.raises(ConfigError, match="disk full"):
        run_dir.open_run(config)
    monkeypatch.undo()
    run_dir.open_run(config).close()  # the lock was given back


def test_the_hash_key_outlives_runs_and_the_token_does_not(config: Config) -> None:
    run = run_dir.open_run(config)
    key, token = run_dir.hash_key(config, run.state_dir), run_dir.cluster_token(config)
    run.close()
    assert len(key) == run_dir.HASH_KEY_BYTES
    assert run_dir.hash_key(config, run.state_dir) == key
    assert run_dir.cluster_token(config) != token
    assert stat.S_IMODE((run.state_dir / "hash.key").stat().st_mode) == 0o600


def test_secrets_from_files(config: Config, tmp_path: Path) -> None:
    good, short, empty = tmp_path / "good", tmp_path / "short", tmp_path / "empty"
    good.write_text("ab" * 32 + "\n")
    short.write_text("abcd")
    empty.write_text("\n")

    def with_files(**files: str) -> Config:
        return replace(config, security=SecurityConfig(**files))

    assert run_dir.hash_key(with_files(hash_key_file=str(good)), tmp_path) == b"\xab" * 32
    assert run_dir.cluster_token(with_files(cluster_token_file=str(good))) == "ab" * 32
    with pytest.raises(ConfigError, match="64 hex digits"):
        run_dir.hash_key(with_files(hash_key_file=str(short)), tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        run_dir.hash_key(with_files(hash_key_file=str(tmp_path / "absent")), tmp_path)
    with pytest.raises(ConfigError, match="empty"):
        run_dir.cluster_token(with_files(cluster_token_file=str(empty)))
    with pytest.raises(ConfigError, match="fewer than 16"):
        run_dir.cluster_token(with_files(cluster_token_file=str(short)))


def test_a_port_in_use_names_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ports.owner_of(port) == os.getpid()
        with pytest.raises(ConfigError) as caught:
            ports.check_free("127.0.0.1", port, "router.http_port")
    assert f"router.http_port = {port}" in str(caught.value)
    assert f"process {os.getpid()}" in str(caught.value)
    ports.check_free("127.0.0.1", port, "router.http_port")
    ports.check_free("127.0.0.1", 0, "router.http_port")
    with pytest.raises(ConfigError, match=r"router\.host"):
        ports.check_free("no such host", port, "router.http_port")
