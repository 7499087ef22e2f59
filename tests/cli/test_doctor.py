"""``pdserve doctor`` on a healthy set-up and on broken ones, each broken for real."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.protobuf
import pytest
import redis

from pdserve.cli.checks import machine_checks
from pdserve.cli.checks.check import Check, Verdict
from pdserve.cli.checks.hand_off import hand_offs
from pdserve.cluster.redis_server import find_binary
from pdserve.config_load import keys, load_config
from tests.models import tiny_model

PASSWORD = "a password of the test"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny", 3)


@pytest.fixture
def sets(model: Path, tmp_path: Path) -> list[str]:
    """A set-up that lacks nothing."""
    ports = [f"{key}=0" for key in keys() if key.endswith("port")]
    return [f"state_dir={tmp_path / 'state'}", f"model.path={model}", *ports]


def looked(sets: list[str]) -> dict[str, Check]:
    """What the checks of this machine say; the command adds the hand-offs."""
    return {one.name: one for one in machine_checks(load_config(overrides=sets))}


def only_bad(sets: list[str], name: str) -> Check:
    """The one check that fails."""
    found = looked(sets)
    bad = {one.name for one in found.values() if one.verdict is Verdict.BAD}
    assert bad == {name}, [one.line for one in found.values()]
    assert found[name].remedy, "it must say what to do"
    return found[name]


def doctor(
    sets: list[str], before: str = "", env: dict[str, str] | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and findings of the command; ``before``: what its shell does first, as root."""
    options = [part for text in sets for part in ("--set", text)]
    command = [sys.executable, "-m", "pdserve.cli.main", "doctor", "--json", *options]
    if before:
        command = ["/bin/sh", "-ec", f'{before}\nexec "$@"', "sh", *command]
        if "mount " in before:
            command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["-r"]), *command]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["healthy"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in answer["checks"]}


def bad(found: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in found.items() if check["verdict"] == "bad"}


def test_a_healthy_set_up_lacks_nothing_and_moves_kv(sets: list[str]) -> None:
    status, found = doctor(sets)
    assert status == 0, found
    for name in ("shm", "tcp"):
        assert found[f"KV by {name}"]["text"].startswith("2,097,152 bytes in ")
    assert found["cluster"]["text"] == "none called 'default' runs on this machine"
    assert "llama, " in found["model"]["text"]
    assert "starts and answers" in found["redis"]["text"]


def test_a_transport_that_moves_nothing_is_bad() -> None:
    (one,) = hand_offs(load_config(overrides=["transfer.transports=[nccl]"]))
    assert one.verdict is Verdict.BAD
    assert "moves nothing on a CPU; allow shm or tcp" in one.line


def test_a_port_of_another_program_names_it(sets: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = only_bad([*sets, f"router.http_port={port}"], "ports")
    assert f"router.http_port = {port}: cannot listen" in found.text
    assert f"by process {os.getpid()}" in found.text


@pytest.fixture
def guarded_redis(tmp_path: Path) -> Iterator[int]:
    """The port of a Redis that wants a password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", PASSWORD]
    command = [str(find_binary()), *options, "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            limit = time.monotonic() + 20
            while True:
                try:
                    assert redis.Redis(port=port, password=PASSWORD).ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < limit, "Redis did not start"
                    time.sleep(0.02)
            yield port
        finally:
            process.terminate()


def test_redis_with_the_right_and_a_wrong_password_and_address(
    sets: list[str], guarded_redis: int, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    given = [*sets, "cache.redis.mode=url", f"cache.redis.url=redis://127.0.0.1:{guarded_redis}/0"]
    right = [*given, f"cache.redis.password_file={tmp_path / 'password'}"]
    found = looked(right)
    assert found["redis"].good, found["redis"].line
    assert "Redis' host" in found["clock"].text, "its time of day is compared with ours"
    assert "password" in only_bad(given, "redis").remedy
    (tmp_path / "password").write_text("another\n")
    refused = only_bad(right, "redis")
    assert "refuses us" in refused.text
    assert PASSWORD not in refused.line
    away = only_bad([*given, "cache.redis.url=redis://127.0.0.1:1/0"], "redis")
    assert "127.0.0.1:1 cannot be reached" in away.text


def test_a_model_that_is_missing_or_damaged(sets: list[str], model: Path, tmp_path: Path) -> None:
    missing = only_bad([*sets, f"model.path={tmp_path / 'absent'}"], "model")
    assert f"there is no model folder {tmp_path / 'absent'}" in missing.text
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    given = [*sets, f"model.path={broken}"]
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    assert "model.safetensors: " in only_bad(given, "model").text
    weights.unlink()
    assert "no *.safetensors file" in only_bad(given, "model").text
    shutil.copy(model / "model.safetensors", weights)
    assert looked(given)["model"].good
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json is no JSON" in only_bad(given, "model").text
    (broken / "tokenizer.json").unlink()
    assert "tokenizer.json: No such file" in only_bad(given, "model").text


def test_a_hub_model_is_no_fault(sets: list[str]) -> None:
    found = looked([*sets, "model.path=owner/name"])["model"]
    assert found.verdict is Verdict.NOTE
    assert "would be downloaded" in found.text


def test_files_that_may_not_be_long_hold_for_shared_memory(sets: list[str]) -> None:
    status, found = doctor(sets, before="ulimit -f 1000")
    assert status == 1
    assert {"shared memory", "hand-off"} <= bad(found), found
    assert "ulimit -f unlimited" in found["shared memory"]["remedy"]


def test_a_small_shared_memory_and_a_full_disk(sets: list[str], tmp_path: Path) -> None:
    can = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if os.geteuid() == 0 and can.returncode:
        pytest.skip(f"mount namespaces cannot be made here: {can.stderr.decode().strip()}")
    full = tmp_path / "full"
    full.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k tmpfs /dev/shm\nmount -t tmpfs -o size=1m tmpfs {full}\n"
        f"head -c 2000000 /dev/zero > {full}/all || true"
    )
    status, found = doctor([*sets, f"state_dir={full}/state"], before=script)
    assert status == 1
    assert bad(found) == {"object store", "disk"}, found
    assert f"state_dir: 0 MiB free at {full}, 200 needed" in found["disk"]["text"]
    assert "--shm-size" in found["object store"]["remedy"]


def test_an_unwritable_shared_memory(sets: list[str]) -> None:
    script = "mount -t tmpfs -o ro tmpfs /dev/shm"
    status, found = doctor(sets, before=script)
    assert status == 1
    assert bad(found) == {"object store"}, found
    assert "/dev/shm cannot be written: Read-only file system" in found["object store"]["text"]


def test_a_protobuf_that_is_older_than_the_stubs(sets: list[str], tmp_path: Path) -> None:
    """The installed one, made to say that it is 6.30.0."""
    package = Path(google.protobuf.__file__).parent
    shutil.copytree(package, tmp_path / "google" / "protobuf")
    own = tmp_path / "google" / "protobuf" / "runtime_version.py"
    text = own.read_text()
    assert "OSS_MAJOR = 7" in text
    own.write_text(text.replace("OSS_MAJOR = 7", "OSS_MAJOR = 6"))
    info = tmp_path / "protobuf-6.30.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: protobuf\nVersion: 6.30.0\n")
    status, found = doctor(sets, env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"})
    assert status == 1
    assert {"packages", "stubs", "hand-off"} <= bad(found), found
    assert "protobuf is 6.30.0, needed is >=7.35" in found["packages"]["text"]
    assert "VersionError" in found["stubs"]["text"]


def test_without_a_compiler_there_is_a_note_only(
    sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/no/such")
    found = looked(sets)["compiler"]
    assert found.verdict is Verdict.NOTE
    assert "slower; install g++" in found.line


def test_a_compiler_is_tried_and_not_believed(
    sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false --at-all")
    found = looked(sets)["compiler"]
    assert found.verdict is Verdict.NOTE
    assert "false failed" in found.line
    monkeypatch.setenv("CXX", "env LC_ALL=C g++ -O1")
    assert looked(sets)["compiler"].verdict is Verdict.OK
