"""The command line is instant, and what is wrong takes one clear line and status 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pdserve.cli.main import main
from pdserve.cli.show import PlainShow
from pdserve.cli.status import table
from pdserve.cluster.run_dir import open_run
from pdserve.config import Config


def up(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Status and the one line of a ``pdserve up`` that is refused."""
    status = main(["up", "--set", f"state_dir={tmp_path / 'state'}", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return status, lines[0]


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from pdserve.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'grpc', 'transformers', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["up", "--help"], ["--version"], []):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "pdserve" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--prefill", "-1"], "pools.prefill = -1: expected a whole number from 0 to 1024"),
        (["--dtype", "bfloat61"], "did you mean bfloat16?"),
        (["--set", "ruoter.strict=true"], "did you mean router.strict?"),
        (["--config", "/no/such/file"], "configuration file /no/such/file: No such file"),
        (["--tls-cert", "x.pem"], "security.tls_key is not"),
        (["--decode", "0"], "somebody must write the answers"),
        (["--gpus", "2"], "pools.gpus_per_worker = 2"),
        (["--name", "a/b"], "name = 'a/b'"),
    ],
)
def test_a_wrong_option_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], part: str
) -> None:
    status, line = up(capsys, tmp_path, *arguments)
    assert status == 2
    assert line.startswith("pdserve up: ")
    assert part in line


def run_up(tmp_path: Path, *arguments: str) -> tuple[int, list[str]]:
    """A ``pdserve up`` in a process of its own; status and the lines of its standard error."""
    command = [sys.executable, "-m", "pdserve.cli.main", "up", *arguments]
    done = subprocess.run(
        [*command, "--set", f"state_dir={tmp_path / 'state'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


def test_a_port_in_use_is_one_line_that_names_the_owner(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        status, lines = run_up(tmp_path, "--port", str(port), "--grpc-port", "0")
    assert status == 2
    assert len(lines) == 1
    assert f"router.http_port = {port}: cannot listen on 127.0.0.1:{port}" in lines[0]
    assert f"process {os.getpid()}" in lines[0]


def test_a_missing_model_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path / "absent"), "--port", "0", "--grpc-port", "0"]
    status, lines = run_up(tmp_path, *arguments)
    assert status == 2
    assert len(lines) == 1
    assert str(tmp_path / "absent") in lines[0]
    assert not (tmp_path / "state" / "run.json").exists()


def test_a_running_cluster_of_the_same_name_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = open_run(Config(state_dir=str(tmp_path / "state")))
    try:
        status, line = up(capsys, tmp_path)
    finally:
        run.close()
    assert status == 2
    assert f"cluster 'default' already runs (pid {os.getpid()})" in line


@pytest.mark.parametrize("command", [["status"], ["generate", "hello"]])
def test_without_a_cluster_the_others_say_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    status = main([*command, "--set", f"state_dir={tmp_path}"])
    assert status == 2
    assert capsys.readouterr().err == (
        f"pdserve {command[0]}: no cluster 'default' runs on this machine; start one: pdserve up\n"
    )


def test_a_router_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:1"]) == 1
    assert "the router at http://127.0.0.1:1 does not answer" in capsys.readouterr().err


def test_mixed_alone_replaces_the_other_pools() -> None:
    from pdserve.cli.main import _parser
    from pdserve.cli.options import config_from

    def pools(*arguments: str) -> tuple[int, int, int]:
        found = config_from(_parser().parse_args(["up", *arguments])).pools
        return found.prefill, found.decode, found.mixed

    assert pools() == (1, 1, 0)
    assert pools("--mixed", "2") == (0, 0, 2)
    assert pools("--mixed", "2", "--decode", "1") == (1, 1, 2)
    assert pools("--mixed", "2", "--set", "pools.prefill=3") == (3, 0, 2)


def test_plain_progress_is_whole_lines_from_any_thread(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = PlainShow(sys.stdout)

    def work(key: str) -> None:
        show.begin(key, f"begin {key}")
        for _ in range(20):
            show.update(key, f"half {key}", 0.5)
        show.end(key, f"end {key}")

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    wanted = [f"{what} {i}{end}" for i in range(8) for what, end in _SHOWN]
    assert sorted(lines) == sorted(wanted)


_SHOWN = (("begin", " ..."), ("half", " (50%)"), ("end", ""))


def test_the_status_table_has_a_line_for_each_worker() -> None:
    worker = {
        "id": "prefill-0",
        "state": "ready",
        "role": "prefill",
        "pid": 5,
        "node": "here",
        "address": "127.0.0.1:9",
        "running": 1,
        "waiting": 2,
        "blocks": {"used": 3, "cached": 4, "total": 10},
    }
    head, line = table([worker]).splitlines()
    assert head.split()[:3] == ["id", "state", "role"]
    words = ["prefill-0", "ready", "prefill", "5", "here", "127.0.0.1:9", "1", "2", "3+4/10"]
    assert line.split() == words
