"""Pages are taken before their first write, and nothing that is in them changes meanwhile."""

import mmap
import os
import resource

import numpy as np
import pytest

from pdserve.engine.memory import allocate_shared
from pdserve.pages import Bytes, arena, take_pages
from pdserve.types import Incarnation

SPAN = 5_000  # no multiple of a page
ROWS = 3_000


def private() -> Bytes:
    return arena(ROWS, SPAN)


def shared() -> Bytes:
    # Keeps its mapping alive itself.
    return allocate_shared(ROWS, SPAN, Incarnation(os.urandom(16))).blocks.numpy()


def faults_of_writing(memory: Bytes) -> int:
    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt

    before = faults()
    memory[:] = 1
    return faults() - before


@pytest.mark.parametrize("make", [private, shared])
def test_writing_to_taken_pages_waits_for_none(make) -> None:
    pages = ROWS * SPAN // mmap.PAGESIZE
    untouched, taken = make(), make()
    take_pages(taken).join(30)
    assert faults_of_writing(untouched) > pages // 64  # a fault may bring some neighbours along
    assert faults_of_writing(taken) <= 3


@pytest.mark.parametrize("make", [private, shared])
def test_what_is_written_meanwhile_stays(make) -> None:
    memory = make()
    rng = np.random.default_rng()
    wanted = rng.integers(0, 256, memory.shape, dtype=np.uint8)
    taking = take_pages(memory)
    for row in rng.permutation(ROWS):
        memory[row] = wanted[row]
    taking.join(30)
    assert not taking.is_alive()
    assert (memory == wanted).all()


def test_memory_of_no_rows_is_empty() -> None:
    assert arena(0, SPAN).shape == (0, SPAN)


def test_it_is_less_urgent_than_its_process_and_does_without_the_right_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray starts actors at a niceness of 15, from which nobody may go back without a privilege."""
    asked: list[int] = []

    def refuse(which: int, who: int, niceness: int) -> None:
        asked.append(niceness)
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    for own, wanted in ((0, 10), (5, 15), (15, 19), (19, 19)):
        monkeypatch.setattr(os, "getpriority", lambda which, who, own=own: own)
        memory = private()
        take_pages(memory).join(30)
        assert asked.pop() == wanted
        assert faults_of_writing(memory) <= 3
