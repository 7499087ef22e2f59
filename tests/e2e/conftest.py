from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster.ray_node import LOCAL, start_ray
from tests.e2e.clusters import Clusters


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    """One Ray for the whole run; paths of its sockets have to be short."""
    short = Path(tempfile.mkdtemp(prefix="pds-t"))
    node = start_ray(LOCAL, short / "ray", f"test:{secrets.token_hex(8)}", threads=2)
    made = Clusters(tmp_path_factory.mktemp("clusters"), node)
    try:
        yield made
    finally:
        made.stop()
        node.stop()
        shutil.rmtree(short, ignore_errors=True)
