"""A Ray that cannot be joined, or that an earlier import has shaped, is said in one clear line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pdserve.cluster import orphans, ray_node
from pdserve.errors import ConfigError


def test_a_ray_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1'.*Connection refused"):
        ray_node.start_ray("127.0.0.1:1", tmp_path, "x:y", 1)
    assert time.monotonic() - begin < 5


def test_a_ray_that_was_imported_before_still_starts(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("ab" * 32)  # of another Ray of the user
    short = Path(f"/tmp/pds-test-early-{os.getpid()}")
    code = (
        "import sys, ray; from pathlib import Path\n"
        "from pdserve.cluster.ray_node import start_ray\n"
        "node = start_ray('local', Path(sys.argv[1]), sys.argv[2], 1); node.stop()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(short), orphans.mark_value(tmp_path, "r")],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(short)
    assert done.returncode == 0, done.stderr
    assert "without an access token" in done.stderr
    assert orphans.find_marked(tmp_path) == ()


def test_a_ray_that_does_not_count_this_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "here")
    ray = SimpleNamespace(get_runtime_context=lambda: context)
    monkeypatch.setattr(ray_node, "_ray", lambda: ray)
    others = [{"NodeID": "there", "RayletSocketName": "/nowhere"}]
    with pytest.raises(ConfigError, match="does not count this host among its living nodes"):
        ray_node._watch_raylet(others, lambda what: None)
