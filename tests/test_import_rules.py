"""Who may import whom. The rooms depend on each other in one direction, and the router is light."""

import ast
import subprocess
import sys

import pytest

from tests.source_tree import BENCH, ROOMS, ROOT, imports, sources

# Of our own rooms, each may import these (and itself).
MAY_IMPORT = {
    "pdserve": set(),
    "kv_transfer": {"pdserve"},
    "cache_tiers": {"pdserve"},
    "prefill_worker": {"pdserve", "kv_transfer", "cache_tiers"},
    "decode_worker": {"pdserve", "kv_transfer", "cache_tiers"},
    "router": {"pdserve", "cache_tiers"},
    BENCH: set(ROOMS),
}
# Only this folder may import Ray.
RAY_FOLDER = "pdserve/cluster/"
HEAVY = ("torch", "ray", "transformers", "kv_transfer", "prefill_worker", "decode_worker")


def broken_rules(room: str, name: str, found: list[tuple[int, str]]) -> list[str]:
    """What a file of ``room`` imports against the rules."""
    broken = []
    for line, module in found:
        top = module.split(".")[0]
        if top in MAY_IMPORT and top != room and top not in MAY_IMPORT[room]:
            broken.append(f"{name}:{line}: {room} must not import {module}")
        if top == "ray" and not name.startswith(RAY_FOLDER):
            broken.append(f"{name}:{line}: ray is imported outside {RAY_FOLDER}")
        if room == "router" and top in ("torch", "transformers"):
            broken.append(f"{name}:{line}: the router must not import {module}")
    return broken


def test_every_import_follows_the_rules() -> None:
    assert len(sources()) > 50
    broken = [
        problem
        for source in sources()
        for problem in broken_rules(
            source.room, source.name, list(imports(source.tree, source.package))
        )
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("room", "name", "code"),
    [
        ("pdserve", "pdserve/x.py", "import router.api"),
        ("pdserve", "pdserve/x.py", "def f():\n    from kv_transfer import base"),
        ("pdserve", "pdserve/engine/x.py", "import ray"),
        ("kv_transfer", "kv_transfer/x.py", "from cache_tiers.keys import KeyMaker"),
        ("decode_worker", "decode_worker/x.py", "import prefill_worker.server"),
        ("prefill_worker", "prefill_worker/x.py", "from ray import actor"),
        ("router", "router/x.py", "import torch.nn"),
        ("router", "router/x.py", "from bench.record import Record"),
        ("router", "router/x.py", "from kv_transfer.base import Endpoint"),
    ],
)
def test_the_scan_sees_each_kind_of_breach(room: str, name: str, code: str) -> None:
    package = name.rsplit("/", 1)[0].replace("/", ".")
    assert broken_rules(room, name, list(imports(ast.parse(code), package)))


def test_relative_imports_are_resolved() -> None:
    found = {module for _, module in imports(ast.parse("from ..rpc import auth"), "pdserve.engine")}
    assert "pdserve.rpc.auth" in found


def test_the_router_process_loads_nothing_heavy() -> None:
    """Every module of the router, imported in a process of its own."""
    code = f"""
import importlib, pkgutil, sys
import router
for module in pkgutil.walk_packages(router.__path__, "router."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "router.server" in sys.modules
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["cache_tiers.keys", "pdserve.rpc.channels", "pdserve.client"])
def test_what_the_router_shares_is_torch_free_by_itself(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False False"), done.stderr


def test_the_proto_folder_is_no_package() -> None:
    """It would hide the module ``proto`` that dependencies of Ray import."""
    assert list((ROOT / "proto").rglob("__init__.py")) == []
