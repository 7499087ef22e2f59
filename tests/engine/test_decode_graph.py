"""Replayed decode steps: padding, sizes and buffers, with a capture that replays by calling again.

What is replayed reads the plan's buffer alone, so a recorder on the CPU shows everything but CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from pdserve.engine.decode_graph import DecodeGraphs, cuda_capture, graph_sizes
from pdserve.engine.device_plan import (
    NO_BLOCK,
    DevicePlan,
    pack_padding,
    pack_plan,
    packed_size,
    upload,
)
from pdserve.engine.plan import StepPlan, plan_step
from pdserve.engine.step import Row
from tests.engine.model_world import family_model, running
from tests.models import VOCAB

BLOCK = 4
CPU = torch.device("cpu")


def singles(contexts: Sequence[int], first_block: int = 0) -> StepPlan:
    rows, block = [], first_block
    for context in contexts:
        count = -(-context // BLOCK)
        table = np.arange(block, block + count, dtype=np.int32)[::-1].copy()
        rows.append(Row([100 + context], context - 1, table))
        block += count
    return plan_step(rows, BLOCK, 1)


def test_a_packed_plan_is_read_back_as_it_was() -> None:
    rows = [
        Row([5, 6, 7], 2, np.array([9, 8], np.int32)),
        Row([1], 12, np.array([3, 2, 1, 0], np.int32)),
    ]
    plan = plan_step(rows, BLOCK, 1)
    found = upload(plan, CPU)
    assert (found.size, found.items) == (4, 1)
    for name in ("tokens", "positions", "slot_blocks", "slot_offsets"):
        assert getattr(found, name).tolist() == getattr(plan, name).tolist(), name
    assert found.item_tokens.tolist() == plan.short_tokens.tolist() == [3]
    assert found.item_rows.tolist() == [1]
    assert found.item_contexts.tolist() == [13]
    assert int(found.buffer[0]) == 4
    assert found.tables.tolist() == plan.tables.reshape(-1).tolist()


def test_padding_belongs_to_no_row() -> None:
    plan = singles([3, 9])
    step = DevicePlan(torch.from_numpy(pack_plan(plan, 4)), 4, 4)
    assert step.slot_blocks.tolist() == [*plan.slot_blocks, NO_BLOCK, NO_BLOCK]
    assert step.item_contexts.tolist() == [3, 9, 0, 0]
    assert step.item_tokens.tolist() == [0, 1, 2, 3], "padding has places of its own to write to"
    assert step.tables.tolist() == plan.tables.reshape(-1).tolist()


@pytest.mark.parametrize(("size", "items"), [(1, 1), (5, 3), (8, 8), (300, 7), (6, 0)])
def test_every_part_is_aligned_whatever_the_others_sizes(size: int, items: int) -> None:
    """Else a kernel is compiled anew while somebody waits for the step."""
    plan = DevicePlan(torch.zeros(packed_size(size, items, 3), dtype=torch.int32), size, items)
    names = ("tokens", "positions", "slot_blocks", "slot_offsets")
    names += ("item_tokens", "item_rows", "item_contexts", "tables")
    for name in names:
        part = getattr(plan, name)
        assert (part.data_ptr() - plan.buffer.data_ptr()) % 16 == 0 or not len(part), name
    assert len(plan.tables) == 3


def test_sizes_reach_the_most_rows() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(3) == (1, 2, 3)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)


class World:
    """A pass whose logits say what it read; a capture that counts and calls again."""

    def __init__(self, most: int, width: int, fails: bool = False) -> None:
        self.captured = 0
        self.replayed = 0
        self.replaying = False
        self.passes: list[int] = []  # tokens of each, replays left out
        self.fails = fails
        self.graphs = DecodeGraphs(self.run_pass, self.capture, CPU, most, width)

    def run_pass(self, step: DevicePlan) -> torch.Tensor:
        if not self.replaying:
            self.passes.append(step.size)
        width = int(step.buffer[0])
        first = [int(step.tables[row * width]) for row in step.item_rows]
        told = [step.tokens, step.positions, step.item_contexts, step.slot_blocks]
        return torch.stack([*told, torch.tensor(first)], 1).float()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            self.replaying = True
            run()
            self.replaying = False

        return replay

    def step(self, plan: StepPlan) -> torch.Tensor | None:
        assert self.graphs.takes(plan, torch.arange(plan.size))
        return self.graphs.run(plan)


def test_every_step_reads_its_own_plan_and_sizes_are_captured_once() -> None:
    world = World(most=8, width=10)
    draw = np.random.default_rng(1)
    sizes = set()
    for _ in range(40):
        contexts = draw.integers(1, 40, int(draw.integers(1, 9))).tolist()
        plan = singles(contexts, int(draw.integers(0, 50)))
        found = world.step(plan)
        assert found is not None
        told = (plan.tokens, plan.positions, plan.short_contexts, plan.slot_blocks)
        expected = np.stack([*told, plan.tables[:, 0]], 1)
        assert found.tolist() == expected.tolist()
        sizes.add(next(size for size in graph_sizes(8) if size >= len(contexts)))
    assert world.captured == len(sizes)
    assert world.replayed == 40


def test_every_size_is_captured_before_anything_is_served() -> None:
    world = World(most=20, width=6)
    world.graphs.prepare()
    assert world.passes == [20, 16, 8, 4, 2, 1], "the largest first"
    assert (world.captured, world.replayed) == (6, 0)
    plan = singles([3, 9, 17])
    found = world.step(plan)
    assert found is not None
    assert found[:, 0].tolist() == plan.tokens.tolist()
    assert (world.captured, world.replayed) == (6, 1)
    broken = World(most=20, width=6, fails=True)
    broken.graphs.prepare()
    assert broken.passes == [20], "it is not tried with other sizes"
    assert "cannot be captured" in broken.graphs.reason


def test_padding_alone_sees_and_writes_nothing() -> None:
    step = DevicePlan(torch.from_numpy(pack_padding(3)), 3, 3)
    assert step.slot_blocks.tolist() == [NO_BLOCK] * 3
    assert step.item_contexts.tolist() == step.item_rows.tolist() == [0] * 3
    assert step.item_tokens.tolist() == [0, 1, 2]
    assert step.tokens.tolist() == step.positions.tolist() == [0] * 3
    assert step.tables.tolist() == []
    assert int(step.buffer[0]) == 1


def test_other_steps_are_not_taken() -> None:
    graphs = World(most=4, width=3).graphs
    plan = singles([3, 9])
    assert graphs.takes(plan, torch.arange(2))
    assert not graphs.takes(plan, torch.tensor([1, 0])), "the order of the logits is another"
    assert not graphs.takes(plan, torch.arange(1))
    assert not graphs.takes(singles([1] * 5), torch.arange(5)), "more rows than any graph has"
    assert not graphs.takes(singles([13]), torch.arange(1)), "a longer table than there is room"
    two = plan_step([Row([1, 2], 0, np.array([0], np.int32))], BLOCK, 1)
    assert not graphs.takes(two, torch.arange(2))


def test_a_model_that_cannot_be_captured_is_run_plainly(caplog: pytest.LogCaptureFixture) -> None:
    world = World(most=4, width=4, fails=True)
    assert world.step(singles([3])) is None
    reason = "cannot be captured: operation not permitted when stream is capturing"
    assert world.graphs.reason.endswith(reason)
    assert reason in caplog.text
    assert not world.graphs.takes(singles([3]), torch.arange(1)), "it is not tried again"


def test_how_decode_steps_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's log, and what a measurement keeps, must not call replayed what is not."""
    with running(family_model("llama", "float32"), 16, 8, None) as runner:
        assert runner.notes == (f"layers: {runner.layers_note}",)
        monkeypatch.setattr(runner, "_graph_pass", lambda step: torch.zeros(step.size, VOCAB))
        runner.use_graphs(lambda run: run, 4)
        assert runner.notes[1] == "decode steps: replayed from graphs"

        def refused(run: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted")

        runner.use_graphs(refused, 4)
        assert runner.notes[1].endswith("cannot be captured: operation not permitted")


@pytest.mark.gpu
def test_cuda_replays_what_it_captured() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    device = torch.device("cuda")
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(device)

    def run_pass(step: DevicePlan) -> torch.Tensor:
        told = [step.tokens, step.positions, step.item_contexts, step.slot_blocks]
        return torch.stack(told, 1).float() @ weight

    graphs = DecodeGraphs(run_pass, cuda_capture(device), device, 8, 10)
    for contexts in ([3], [9, 1, 30], [5] * 8, [7]):
        plan = singles(contexts)
        found = graphs.run(plan)
        assert found is not None, graphs.reason
        # Products of another size may be added up in another order.
        torch.testing.assert_close(found, run_pass(upload(plan, device)), rtol=1e-4, atol=1e-4)
