"""Compares a loaded model's paged attention with its own eager attention before it serves anybody.

One short prompt runs twice: as transformers would run it (eager attention, its own cache), and over
a small pool of blocks in shuffled order, in two chunks cut inside a block and then token by token,
beside a second sequence in the same line. A model whose numbers differ, or whose layers do not all
attend over the pool, is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pdserve.engine.attention import IMPLEMENTATION
from pdserve.engine.layout import block_layout
from pdserve.engine.model import LoadedModel
from pdserve.engine.pool_view import pool_view
from pdserve.engine.quiet import first_line
from pdserve.engine.runner import ModelRunner
from pdserve.engine.step import Row
from pdserve.engine.triton_layer import TritonKernels
from pdserve.errors import ConfigError, ModelRefused

PROMPT_TOKENS = 40
DECODED_TOKENS = 4
BLOCK_SIZE = 16
# Largest relative difference of logits (root mean square, median over positions) that rounding
# explains. Attention that is wrong differs by something near 1.
TOLERANCE: Mapping[str, float] = {
    "float64": 1e-3,
    "float32": 1e-3,
    "float16": 3e-2,
    "bfloat16": 1e-1,
}


@dataclass(frozen=True, slots=True)
class ProbeReport:
    difference: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """Kernels that reproduce the model, or None to gather; ``problem``: of those that did not."""

    kernels: CDLL | TritonKernels | None
    report: ProbeReport
    problem: str

    @property
    def note(self) -> str:
        """What was chosen instead of what failed; empty when nothing did."""
        if not self.problem:
            return ""
        what = "gather" if self.kernels is None else "Triton kernels, prompts one by one"
        return f"attention: {what}, because {self.problem}"


@dataclass(frozen=True, slots=True)
class _Script:
    """What is computed: a prompt of ``prompt`` tokens in two chunks, then token by token."""

    tokens: tuple[int, ...]
    first: int  # where the first chunk ends
    prompt: int
    beside: tuple[int, ...]  # a second sequence, computed with the first chunk

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where each step ends."""
        ends = {self.first, *range(self.prompt, len(self.tokens) + 1)}
        return tuple(sorted(ends))

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """What is judged as one: each chunk, and the single tokens together."""
        borders = ((0, self.first), (self.first, self.prompt), (self.prompt, len(self.tokens)))
        return tuple((low, high) for low, high in borders if low < high)


def probe_or_gather(
    loaded: LoadedModel, library: CDLL | TritonKernels | None, must: bool
) -> Chosen:
    """Kernels that were compiled for this very device may fail on it: then the reference serves.

    ``must``: they were asked for, so ConfigError. ModelRefused when the reference is wrong, too.
    """
    if not isinstance(library, TritonKernels):
        return Chosen(library, probe(loaded, library), "")
    problem = ""
    candidates = [library]
    if library.varlen is not None:
        candidates.append(TritonKernels(library.module))
    for kernels in candidates:
        try:
            return Chosen(kernels, probe(loaded, kernels), problem)
        except Exception as error:  # the compiler's own, the driver's, or a wrong result
            with_varlen = " with torch's varlen_attn" if kernels.varlen is not None else ""
            problem = f"Triton's kernels{with_varlen} failed their probe: {first_line(error)}"
            failure = error
    if must:
        raise ConfigError(
            f"engine.attention is native, but {problem}", param="engine.attention"
        ) from failure
    return Chosen(None, probe(loaded, None), problem)


def probe(loaded: LoadedModel, library: CDLL | TritonKernels | None) -> ProbeReport:
    """ModelRefused when the paged attention does not reproduce the model."""
    script = _script(loaded)
    expected = _eager_logits(loaded, script.tokens, script.prompt)
    found = _paged_logits(loaded, library, script)
    each = [
        relative_difference(found[low:high], expected[low:high]) for low, high in script.segments
    ]
    # NaN is the largest of all, which max() alone does not know.
    difference = max(each, key=lambda value: (math.isnan(value), value))
    tolerance = TOLERANCE[loaded.dtype]
    # "not <=" also refuses NaN.
    if not difference <= tolerance:
        raise ModelRefused(
            f"{loaded.model.config.model_type}: over a paged pool its logits differ from its own "
            f"eager attention's by {difference:.2g} (more than {tolerance:g} in {loaded.dtype})"
        )
    return ProbeReport(difference, tolerance)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Median over positions of the relative root mean square; logits [positions, vocabulary]."""
    a, b = found.double(), expected.double()
    b = b - b.mean(-1, keepdim=True)
    a = a - a.mean(-1, keepdim=True)
    each = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    # median() would pass over a NaN that is not in the middle.
    return float("nan") if bool(each.isnan().any()) else float(each.median())


def _script(loaded: LoadedModel) -> _Script:
    total = min(PROMPT_TOKENS + DECODED_TOKENS, loaded.max_model_len)
    prompt = max(1, total - DECODED_TOKENS)
    draw = np.random.default_rng(7)
    return _Script(
        tokens=tuple(draw.integers(0, loaded.vocab_size, total).tolist()),
        # Inside a block, wherever the prompt is longer than one.
        first=(prompt + 1) // 2 + (3 if prompt > BLOCK_SIZE else 0),
        prompt=prompt,
        beside=tuple(draw.integers(0, loaded.vocab_size, min(11, total)).tolist()),
    )


def _eager_logits(loaded: LoadedModel, tokens: Sequence[int], prompt: int) -> torch.Tensor:
    """Logits [tokens, vocabulary], as the model computes them with a cache of its own."""
    model = loaded.model
    line = torch.tensor(tokens, device=loaded.device)[None]
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            out = model(input_ids=line[:, :prompt], use_cache=True)
            parts = [out.logits[0]]
            for at in range(prompt, len(tokens)):
                out = model(
                    input_ids=line[:, at : at + 1],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                parts.append(out.logits[0])
            return torch.cat(parts)
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


def _paged_logits(
    loaded: LoadedModel, library: CDLL | TritonKernels | None, script: _Script
) -> torch.Tensor:
    layout = block_layout(BLOCK_SIZE, loaded.dtype, loaded.shapes)
    own, other = layout.blocks_for(len(script.tokens)), layout.blocks_for(len(script.beside))
    order = np.random.default_rng(11).permutation(own + other).astype(np.int32)
    memory = torch.zeros((own + other, layout.span_bytes), dtype=torch.uint8, device=loaded.device)
    runner = ModelRunner(loaded, pool_view(memory, layout), library)
    parts = []
    try:
        start = 0
        for end in script.cuts:
            rows = [_row(script.tokens[start:end], start, order[:own])]
            if start == 0:
                rows.insert(0, _row(script.beside, 0, order[own:]))
            logits = runner.logits(rows)
            if runner.attended != len(loaded.layers):
                raise ModelRefused(
                    f"{loaded.model.config.model_type}: {runner.attended} of "
                    f"{len(loaded.layers)} layers attended over the pool"
                )
            parts.append(logits[-(end - start) :])
            start = end
    finally:
        runner.detach()
    return torch.cat(parts)


def _row(tokens: Sequence[int], start: int, table: npt.NDArray[np.int32]) -> Row:
    return Row(tokens=tokens, start=start, block_table=table)
