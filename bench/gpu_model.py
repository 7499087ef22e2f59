"""Models of real shapes with random weights, and how to run bare steps on them.

What a step costs depends on shapes alone, so nothing has to be downloaded. Not run on a GPU yet;
tests/bench/test_gpu.py runs it on the CPU, with small shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pdserve.config import Config
from pdserve.engine import attention
from pdserve.engine.build import choose_kernel
from pdserve.engine.decode_graph import cuda_capture
from pdserve.engine.layout import BlockLayout, block_layout
from pdserve.engine.model import LoadedModel, trace_model
from pdserve.engine.pool_view import pool_view
from pdserve.engine.probe import probe_or_gather
from pdserve.engine.runner import ModelRunner
from pdserve.engine.step import Row
from pdserve.engine.triton_layer import TritonKernels
from pdserve.types import Numerics, Sampling

BLOCK = 16
GREEDY = Sampling(max_tokens=2**20, temperature=0.0)
LLAMA_8B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    eos_token_id=None,
)
QWEN3_8B = transformers.Qwen3Config(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    eos_token_id=None,
)
SHAPES = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-8B": QWEN3_8B}


def random_model(config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    library: Any = transformers.AutoModelForCausalLM
    with torch.device(device):
        # A configuration of its own: it also holds which attention a model uses.
        model = library.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


@dataclass(slots=True)
class Bench:
    """A runner over a pool of its own."""

    loaded: LoadedModel
    layout: BlockLayout
    runner: ModelRunner
    blocks: int  # of the pool
    notes: tuple[str, ...]  # how it computes, and why

    @property
    def step_bytes(self) -> int:
        """Weights that a decode step reads: all but the table of embeddings."""
        model = self.loaded.model
        skipped = model.get_input_embeddings().weight
        if skipped is model.get_output_embeddings().weight:
            skipped = skipped[:0]  # tied: the output layer reads it
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        return int(total - skipped.numel() * skipped.element_size())

    def rows(self, contexts: Sequence[int], tokens: Sequence[int], room: int = 0) -> list[Row]:
        """One sequence each, whose last ``tokens[i]`` of ``contexts[i]`` tokens are computed.

        ``room``: tokens that each may have in the end, so that its blocks stay the same.
        """
        rows, block = [], 0
        for context, count in zip(contexts, tokens, strict=True):
            needed = self.layout.blocks_for(max(context, room))
            table = np.arange(block, block + needed, dtype=np.int32)
            block += needed
            ids = np.random.default_rng(context).integers(5, 1000, count).tolist()
            sampler = self.runner.open_sampler(GREEDY, ids, count)
            rows.append(Row(ids, context - count, table, sampler))
        assert block <= self.blocks, f"the rows need {block} blocks, the pool has {self.blocks}"
        return rows


def bench_model(model: Any, max_tokens: int, most_rows: int) -> Bench:
    """``max_tokens``: what the pool holds."""
    device = next(model.parameters()).device
    layers = trace_model(model, max_tokens)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    loaded = LoadedModel(
        model=model,
        layers=layers,
        dtype="bfloat16",
        numerics=Numerics.FAST,
        device=device,
        max_model_len=max_tokens,
        vocab_size=int(model.config.vocab_size),
        weights_bytes=0,
        weights_mapped=False,
        identity={},
        takes_positions=True,
        weights_note="random",
    )
    config = Config(model_cache=str(Path.home() / ".cache" / "pdserve"))
    # Figures of kernels that compute something else would say nothing.
    found, note = choose_kernel(config, "bfloat16", device)
    chosen = probe_or_gather(loaded, found, must=False)
    layout = block_layout(BLOCK, "bfloat16", loaded.shapes)
    blocks = layout.blocks_for(max_tokens) + most_rows
    memory = torch.zeros((blocks, layout.span_bytes), dtype=torch.uint8, device=device)
    runner = ModelRunner(loaded, pool_view(memory, layout), chosen.kernels)
    if isinstance(chosen.kernels, TritonKernels):
        runner.use_graphs(cuda_capture(device), most_rows)
    probed = f"probe: {chosen.report.difference:.1e} (at most {chosen.report.tolerance:g})"
    return Bench(loaded, layout, runner, blocks, (chosen.note or note, *runner.notes, probed))
