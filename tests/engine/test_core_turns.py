"""Engines that share a host's cores compute one after the other, and none waits for the dead."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pdserve.config import Config
from pdserve.engine.build import _turn
from pdserve.engine.step import Row
from pdserve.engine.tiles import tiles_work
from pdserve.engine.turns import PATIENCE, PLACES, Turn, open_turn
from pdserve.errors import ConfigError
from tests.engine.model_world import kernel, running
from tests.engine.test_fused import loaded

pytestmark = pytest.mark.skipif(
    not tiles_work(kernel()), reason="this processor has neither AVX-512 nor AVX2, or has AMX"
)
SLICE_S = 0.05


def take(turn: Turn) -> None:
    kernel().pdserve_take_turn(ctypes.byref(turn.struct))


def give(turn: Turn) -> None:
    kernel().pdserve_give_turn(ctypes.byref(turn.struct))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "turns"


@pytest.fixture
def pair(path: Path) -> Iterator[tuple[Turn, Turn]]:
    one, other = open_turn(SLICE_S, path), open_turn(SLICE_S, path)
    yield one, other
    one.close()
    other.close()


def test_one_at_a_time_in_the_order_of_asking(path: Path) -> None:
    turns = [open_turn(10.0, path) for _ in range(4)]
    order: list[int] = []
    inside = threading.Lock()
    wrong = []

    def compute(which: int) -> None:
        take(turns[which])
        if not inside.acquire(blocking=False):
            wrong.append(which)
        else:
            order.append(which)
            time.sleep(0.01)
            inside.release()
        give(turns[which])

    take(turns[0])
    waiting = [threading.Thread(target=compute, args=(which,)) for which in (2, 1, 3)]
    for which, thread in zip((2, 1, 3), waiting, strict=True):
        thread.start()
        since = 8 + 8 * turns[which].place
        while turns[which]._map[since : since + 8] == bytes(8):
            time.sleep(0.001)  # it has not asked yet: the order of asking is to be known
    time.sleep(0.06)
    assert order == []
    give(turns[0])
    for thread in waiting:
        thread.join(30)
    assert order == [2, 1, 3]
    assert wrong == []
    assert [turn.forced for turn in turns] == [0, 0, 0, 0]
    assert turns[2].waited_s > 0.05
    assert turns[0].waited_s < turns[2].waited_s
    for turn in turns:
        turn.close()


def test_everybody_sees_whether_somebody_computes(pair: tuple[Turn, Turn]) -> None:
    one, other = pair
    assert not one.is_taken
    take(other)
    assert one.is_taken
    assert other.is_taken
    give(other)
    assert not one.is_taken


def test_many_engines_in_many_turns_are_never_two_at_once(path: Path) -> None:
    turns = [open_turn(10.0, path) for _ in range(5)]
    inside, most, rounds = 0, 0, [0] * len(turns)
    began = time.monotonic()

    def compute(which: int) -> None:
        nonlocal inside, most
        while time.monotonic() < began + (1.0 if min(rounds) > 10 else 5.0):
            take(turns[which])
            inside += 1
            most = max(most, inside)
            time.sleep(0.0002 * which)
            inside -= 1
            rounds[which] += 1
            give(turns[which])

    threads = [threading.Thread(target=compute, args=(i,)) for i in range(len(turns))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == 1
    assert min(rounds) > 10, rounds
    assert not any(turn.forced for turn in turns)
    for turn in turns:
        turn.close()


def test_who_never_gives_delays_the_other_once(pair: tuple[Turn, Turn]) -> None:
    stuck, other = pair
    take(stuck)
    began = time.monotonic()
    take(other)
    waited = time.monotonic() - began
    assert PATIENCE * SLICE_S * 0.9 < waited < PATIENCE * SLICE_S + 5
    assert other.forced == 1
    give(other)
    give(stuck)  # comes late, and takes nothing from anybody
    for turn in (other, stuck, other):
        take(turn)
        give(turn)
    assert (other.forced, stuck.forced) == (1, 0)


def test_the_place_of_a_killed_engine_is_free_and_its_turn_over(path: Path) -> None:
    script = (
        "import ctypes, sys, time; from pathlib import Path;"
        "from pdserve.engine.turns import open_turn; turn = open_turn(30.0, Path(sys.argv[1]));"
        "library = ctypes.CDLL(sys.argv[2]);"
        "library.pdserve_take_turn(ctypes.byref(turn.struct));"
        "print(turn.place, flush=True); time.sleep(60)"
    )
    keeper = open_turn(30.0, path)
    # Linked against torch's OpenMP, which the child has to load first.
    child = subprocess.Popen(
        [sys.executable, "-c", "import torch; " + script, str(path), kernel()._name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LD_PRELOAD": _openmp()},
    )
    assert child.stdout is not None
    place = int(child.stdout.readline())
    assert place != keeper.place
    child.send_signal(signal.SIGKILL)
    child.wait()
    heir = open_turn(30.0, path)
    assert heir.place == place
    began = time.monotonic()
    take(keeper)
    assert time.monotonic() - began < 5, "waited for the dead"
    give(keeper)
    heir.close()
    keeper.close()


def _openmp() -> str:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        name = line.rsplit(maxsplit=1)[-1]
        if "gomp" in name or "omp" in Path(name).name:
            return name
    return ""


def test_there_are_so_many_places(path: Path) -> None:
    turns = [open_turn(SLICE_S, path) for _ in range(PLACES)]
    assert sorted(turn.place for turn in turns) == list(range(PLACES))
    with pytest.raises(ConfigError, match="places are taken"):
        open_turn(SLICE_S, path)
    turns.pop(7).close()
    again = open_turn(SLICE_S, path)
    assert again.place == 7
    for turn in (*turns, again):
        turn.close()


@pytest.mark.parametrize("wrong", ["others may write", "a link", "a folder"])
def test_a_file_that_is_not_this_users_alone_is_refused(wrong: str, path: Path) -> None:
    if wrong == "others may write":
        path.touch()
        path.chmod(0o666)
    elif wrong == "a link":
        path.with_name("other").touch(0o600)
        path.symlink_to(path.with_name("other"))
    else:
        path.mkdir()
    with pytest.raises(ConfigError, match=str(path)):
        open_turn(SLICE_S, path)


@pytest.mark.parametrize(("slice_s", "lets_in"), [(1e-9, True), (30.0, False)])
def test_a_step_lets_others_in_between_its_layers(
    slice_s: float, lets_in: bool, path: Path
) -> None:
    """Whoever waits gets a turn after each layer, once the slice is over; and changes nothing."""
    model = loaded("llama, 3 heads of 32 under 1", "fused")
    row = Row(list(range(5, 405)), 0, np.arange(32, dtype=np.int32))
    own, other = open_turn(slice_s, path), open_turn(30.0, path)
    own.struct.patience = other.struct.patience
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            take(other)
            give(other)

    with running(model, 16, 32, kernel()) as runner:
        expected = runner.logits([row])
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with running(model, 16, 32, kernel(), own) as runner:
            # Of some steps the other one sees the end before it has asked.
            for _ in range(300 if lets_in else 20):
                assert torch.equal(runner.logits([row]), expected)
                if own.given >= 3:
                    break
    finally:
        stop.set()
        asking.join()
    assert own.forced == other.forced == 0
    assert (own.given >= 3) == lets_in
    assert own.given == 0 or lets_in
    own.close()
    other.close()


def test_an_engines_threads_keep_to_a_core_each_and_nobody_elses() -> None:
    cores = os.sched_getaffinity(0)
    model = loaded("llama, 3 heads of 32 under 1", "fused")
    threads = torch.get_num_threads()
    row = Row(list(range(5, 45)), 0, np.arange(32, dtype=np.int32))
    seen: list[list[set[int]]] = []  # of the engine's thread, then of those that came with it

    def engine(count: int) -> None:
        before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
        torch.set_num_threads(count)
        with running(model, 16, 32, kernel(), pin=True) as runner:
            runner.begin()
            runner.logits([row])
            after = {int(task.name) for task in Path("/proc/self/task").iterdir()}
            seen.append([os.sched_getaffinity(task) for task in (0, *(after - before))])

    try:
        for count in (len(cores), len(cores) + 1):
            thread = threading.Thread(target=engine, args=(count,))
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(threads)
    kept, unkept = seen
    assert kept[0] == cores, "between steps the first thread may run anywhere"
    assert all({core} in kept for core in sorted(cores)[1:])
    assert all(own == cores for own in unkept), "there is no core for each"
    assert os.sched_getaffinity(0) == cores


def test_the_first_thread_keeps_to_one_core_while_it_computes() -> None:
    cores = os.sched_getaffinity(0)
    model = loaded("llama, 3 heads of 32 under 1", "fused")
    row = Row(list(range(5, 405)), 0, np.arange(32, dtype=np.int32))
    began, stop = threading.Event(), threading.Event()
    threads = torch.get_num_threads()

    def engine() -> None:
        torch.set_num_threads(len(cores))
        with running(model, 16, 32, kernel(), pin=True) as runner:
            runner.begin()
            began.set()
            while not stop.is_set():
                runner.logits([row])

    thread = threading.Thread(target=engine)
    thread.start()
    began.wait(60)
    seen: set[frozenset[int]] = set()
    end = time.monotonic() + 30
    while frozenset({min(cores)}) not in seen and time.monotonic() < end:
        assert thread.native_id is not None
        seen.add(frozenset(os.sched_getaffinity(thread.native_id)))
    stop.set()
    thread.join()
    torch.set_num_threads(threads)
    assert frozenset({min(cores)}) in seen
    assert seen <= {frozenset({min(cores)}), frozenset(cores)}


def test_who_computes_out_of_turn_says_so_once_in_a_while(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded("llama, 3 heads of 32 under 1", "fused")
    row = Row([7, 8, 9], 0, np.arange(1, dtype=np.int32))
    own, stuck = open_turn(0.005, path), open_turn(0.005, path)
    with running(model, 16, 32, kernel(), own) as runner:
        for _ in range(3):
            take(stuck)  # and keeps it
            runner.logits([row])
    assert own.forced >= 3
    assert [each.message for each in caplog.records if "out of turn" in each.message] == [
        "computed out of turn 1 times: another engine holds the cores"
    ]
    own.close()
    stuck.close()


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "device", "not_fused", "threads", "why"),
    [
        ({}, torch.device("cuda:0"), "", 0, "computes on cuda:0"),
        ({"turn_ms": 0.0}, CPU, "", 0, "turn_ms is 0"),
        ({}, CPU, "it is Gemma", 0, "one by one: it is Gemma"),
        ({}, CPU, "", -1, "threads on"),
    ],
)
def test_who_takes_no_turns_says_why(
    changes: dict[str, float], device: torch.device, not_fused: str, threads: int, why: str
) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores + threads < 1:
        pytest.skip("there is one core")
    config = replace(Config(), engine=replace(Config().engine, **changes))  # type: ignore[arg-type]
    before = torch.get_num_threads()
    torch.set_num_threads(cores + threads)
    try:
        turn, note = _turn(config, device, not_fused)
    finally:
        torch.set_num_threads(before)
    assert turn is None
    assert note.startswith("turns: none, because ")
    assert why in note


def test_engines_of_the_same_cores_and_slices_share_turns_and_others_do_not() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    longer = replace(Config(), engine=replace(Config().engine, turn_ms=77.0))
    try:
        found = [_turn(config, CPU, "")[0] for config in (Config(), Config(), longer)]
    finally:
        torch.set_num_threads(before)
    one, other, apart = found
    assert one is not None
    assert other is not None
    assert apart is not None
    take(one)
    began = time.monotonic()
    take(apart)
    assert time.monotonic() - began < 0.05, "they share nothing"
    take(other)
    assert time.monotonic() - began > 0.1
    assert (other.forced, apart.forced) == (1, 0)
    for turn in (one, other, apart):
        give(turn)
        turn.close()
