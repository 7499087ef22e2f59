"""What a process makes while it starts is not collected again; what it makes later is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from pdserve.collector import starting_up


class Node:
    """Reachable from itself alone once nobody holds it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.collect()


def test_what_lives_at_the_end_is_looked_at_no_more() -> None:
    with starting_up():
        assert not gc.isenabled()
        lives, garbage = Node(), weakref.ref(Node())
    assert gc.isenabled()
    assert garbage() is None
    assert gc.get_freeze_count() > 0
    frozen, later = weakref.ref(lives), weakref.ref(Node())
    del lives
    gc.collect()
    assert frozen() is not None
    assert later() is None


def test_what_a_failed_start_leaves_is_collected() -> None:
    kept: list[weakref.ref[Node]] = []
    frozen = gc.get_freeze_count()

    def start() -> None:
        with starting_up():
            kept.append(weakref.ref(Node()))
            raise RuntimeError("no port")

    with pytest.raises(RuntimeError):
        start()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    gc.collect()
    assert kept[0]() is None
