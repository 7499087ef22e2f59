"""Decode steps replayed from CUDA graphs: one launch for a step instead of thousands.

    graphs.takes(plan, ...) every row is a single token, and there is a graph for so many
    graphs.run(plan)        packed, padded -> copied to the graph's buffer -> replayed -> logits

A graph is captured for each size of batch (1, 2, 4, ...), before anything is served (``prepare``),
over buffers that stay where they are. Fewer rows are padded up to the size: padding sees no key and
writes none. The only thing copied there is the packed plan; nothing waits but the sampler for its
tokens. A model that cannot be captured is run as all other steps are, and ``reason`` says why.

How a pass is captured is given (``Capture``), so that all of this but CUDA's own part is tested on
the CPU. Not run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdserve.engine.device_plan import DevicePlan, Int32, pack_padding, pack_plan, packed_size
from pdserve.engine.plan import StepPlan

log = logging.getLogger(__name__)

# Runs a pass over the plan: logits [tokens, vocabulary]. Reads nothing but what the plan's buffer
# holds at that moment.
Pass = Callable[[DevicePlan], torch.Tensor]
# Captures a function; what it returns is called to replay it. RuntimeError where that fails.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Callable[[], None]
    logits: torch.Tensor  # [size, vocabulary]; overwritten by every replay


class DecodeGraphs:
    """Used on the engine's thread alone.

    ``most_rows``: of a step. ``table_width``: blocks of the longest sequence.
    """

    def __init__(
        self,
        run_pass: Pass,
        capture: Capture,
        device: torch.device,
        most_rows: int,
        table_width: int,
    ) -> None:
        self._run_pass = run_pass
        self._capture = capture
        self._sizes = graph_sizes(most_rows)
        self._table_width = table_width
        room = packed_size(self._sizes[-1], self._sizes[-1], self._sizes[-1] * table_width)
        cuda = device.type == "cuda"
        self._buffer = torch.zeros(room, dtype=torch.int32, device=device)
        self._host = torch.zeros(room, dtype=torch.int32, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._graphs: dict[int, _Graph] = {}
        self.reason = ""  # why no step is replayed; empty while they are

    def takes(self, plan: StepPlan, places: torch.Tensor) -> bool:
        """``places``: on the CPU, where of the line logits are wanted: all of it, in order."""
        rows = len(plan.begins) - 1
        return (
            not self.reason
            and plan.size == rows == len(plan.short_tokens) == len(places)
            and rows <= self._sizes[-1]
            and plan.tables.shape[1] <= self._table_width
            and torch.equal(places, torch.arange(rows))
        )

    def prepare(self) -> None:
        """Captures every size, largest first, over rows that are padding alone.

        Called before anything is served: capturing stops all streams, and takes memory.
        """
        for size in reversed(self._sizes):
            self._copy(pack_padding(size))
            if self._graph(size) is None:
                return

    def run(self, plan: StepPlan) -> torch.Tensor | None:
        """Logits [rows, vocabulary], good until the next run; None where capturing failed."""
        size = next(size for size in self._sizes if size >= plan.size)
        self._copy(pack_plan(plan, size))
        graph = self._graph(size)
        if graph is None:
            return None
        graph.replay()
        return graph.logits[: plan.size]

    def _graph(self, size: int) -> _Graph | None:
        """Made over what lies in the buffer, where there is none yet."""
        graph = self._graphs.get(size)
        if graph is None:
            try:
                graph = self._made(size)
            except RuntimeError as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.reason = f"the model's pass cannot be captured: {first}"
                self._graphs.clear()
                log.warning("decode steps are not replayed: %s", self.reason)
                return None
            self._graphs[size] = graph
        return graph

    def _copy(self, plan: Int32) -> None:
        packed = torch.from_numpy(plan)
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy has left the host's buffer
        self._host[: len(packed)] = packed
        self._buffer[: len(packed)].copy_(self._host[: len(packed)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _made(self, size: int) -> _Graph:
        plan = DevicePlan(self._buffer, size, size)
        # Once without capture: libraries set themselves up, kernels are compiled. It writes the
        # step's own KV, which the replay then writes again.
        logits = torch.empty_like(self._run_pass(plan))

        def whole() -> None:
            logits.copy_(self._run_pass(plan))

        return _Graph(self._capture(whole), logits)


def graph_sizes(most: int) -> tuple[int, ...]:
    """Powers of two up to 8, then steps of 8; the last is ``most``."""
    sizes = [size for size in (1, 2, 4, *range(8, most, 8)) if size < most]
    return (*sizes, most)


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs that share one pool of memory; not run on a GPU yet."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        # Other threads (tiers, hand-offs) may set up what they need meanwhile.
        mode = "thread_local"
        before = torch.cuda.current_stream(device)
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=pool, capture_error_mode=mode),
            ):
                run()
        except BaseException:
            # A capture that cannot be ended leaves its stream the current one; every copy that
            # comes after the engine's work knows that by the default stream.
            torch.cuda.set_stream(before)
            raise
        return graph.replay

    return capture
