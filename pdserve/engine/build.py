"""Puts an engine together: model, pool, kernel and scheduler, with everything checked on the way.

measure memory -> choose the kernel -> load and trace the model -> probe
  -> size the pool -> allocate it -> bind -> Engine (not started)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.config import Config
from pdserve.engine.api import BlockHasher, EventSink
from pdserve.engine.decode_graph import cuda_capture
from pdserve.engine.dtypes import resolve_dtype
from pdserve.engine.engine import Engine
from pdserve.engine.fused import why_not_fused
from pdserve.engine.host_memory import HostShare, Memory, measure_host
from pdserve.engine.host_spans import choose_spans
from pdserve.engine.layout import BlockLayout, block_layout, fingerprint
from pdserve.engine.memory import PoolMemory, allocate_cuda, allocate_shared
from pdserve.engine.model import LoadedModel, load_model
from pdserve.engine.native import load_native, native_supports
from pdserve.engine.pool_view import TORCH_DTYPES, pool_view
from pdserve.engine.probe import ProbeReport, probe_or_gather
from pdserve.engine.quantized import Quantization
from pdserve.engine.resolve import default_cache
from pdserve.engine.runner import ModelRunner
from pdserve.engine.sizing import (
    PoolSize,
    SizingInputs,
    check_tiers,
    measure_memory,
    size_pool,
)
from pdserve.engine.triton_layer import TritonKernels, load_triton
from pdserve.engine.turns import Turn, open_turn
from pdserve.errors import ConfigError, PdserveError
from pdserve.pages import take_pages
from pdserve.types import Incarnation, ModelFacts, Numerics


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    engine: Engine  # not started
    memory: PoolMemory
    turn: Turn | None  # None: computes whenever it has to
    layout: BlockLayout
    facts: ModelFacts
    notes: tuple[str, ...]  # what was chosen and why, a line each, for the log

    def close(self) -> None:
        """After the engine stopped: gives back what it computed in."""
        self.memory.close()
        if self.turn is not None:
            self.turn.close()


def build_engine(
    config: Config,
    model_path: str,
    pool_blocks: int,
    device: str,
    threads: int,
    incarnation: Incarnation,
    hasher: BlockHasher,
    has_tiers: bool,
    sink: EventSink,
    share: HostShare,
    on_broken: Callable[[PdserveError], None] | None = None,
) -> BuiltEngine:
    """``model_path``: a folder. ``pool_blocks`` and ``threads``: 0 finds them out. ``share``: of
    the host's memory, for a worker on the CPU; on a device, of what is free there.

    ModelRefused (DoesNotFit among them) and ConfigError say why. Sets the process' torch threads.
    """
    where = _device(device)
    if where.type == "cpu":
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    free = (where.type == "cpu" and share.memory) or measure_memory(where, share.workers)
    dtype = resolve_dtype(config.model)
    library, kernel_note = choose_kernel(config, dtype, where)
    loaded = load_model(
        Path(model_path),
        dtype=dtype,
        numerics=Numerics(config.model.numerics),
        device=where,
        quantization=Quantization(config.model.quantization),
        max_model_len=config.model.max_model_len,
        library=library if isinstance(library, CDLL) else None,
        shared=_shared_weights(config, share),
    )
    chosen = probe_or_gather(loaded, library, config.engine.attention == "native")
    layout = block_layout(config.engine.block_size, loaded.dtype, loaded.shapes)
    inputs = _sizing_inputs(free, share, loaded, where)
    size = size_pool(inputs, layout, config.engine, pool_blocks or config.engine.pool_blocks)
    memory, spans_note = _allocate(size.blocks, layout, incarnation, where, chosen.kernels)
    turn, turn_note = _turn(config, where, why_not_fused(loaded))
    runner = ModelRunner(
        loaded, pool_view(memory.blocks, layout), chosen.kernels, turn, config.engine.pin_threads
    )
    if isinstance(chosen.kernels, TritonKernels):
        runner.use_graphs(cuda_capture(where), config.engine.max_running)
    engine = Engine(
        runner=runner,
        block_size=layout.block_size,
        num_blocks=size.blocks,
        generations=memory.generations,
        config=config.engine,
        hasher=hasher,
        has_tiers=has_tiers,
        sink=sink,
        on_broken=on_broken,
        max_model_len=loaded.max_model_len,
    )
    notes = (
        *_model_notes(loaded),
        chosen.note or kernel_note,
        *runner.notes,
        _probe_note(chosen.report),
        spans_note,
        *_pool_notes(size, loaded),
        turn_note,
        *_thread_notes(where, share.workers),
    )
    facts = _facts(model_path, loaded, layout)
    return BuiltEngine(engine, memory, turn, layout, facts, notes)


def _probe_note(report: ProbeReport) -> str:
    return (
        f"probe: logits differ from eager attention's by {report.difference:.1e} "
        f"(at most {report.tolerance:g})"
    )


def _sizing_inputs(
    free: Memory, share: HostShare, loaded: LoadedModel, where: torch.device
) -> SizingInputs:
    on_host = where.type == "cpu"
    if not on_host:
        check_tiers(share.tier_bytes, measure_host())
    return SizingInputs(
        memory=free,
        weights_bytes=loaded.weights_bytes,
        workers_on_host=share.workers,
        max_model_len=loaded.max_model_len,
        capped=on_host,
        tier_bytes=share.tier_bytes if on_host else 0,
        weights_holders=share.weights_holders if loaded.weights_mapped else 1,
    )


def choose_kernel(
    config: Config, dtype: str, device: torch.device
) -> tuple[CDLL | TritonKernels | None, str]:
    """The native kernels (Triton's on CUDA), or None to gather; and the line that says why.

    ConfigError when engine.attention asks for a native kernel that cannot be had.
    """
    wish = config.engine.attention
    if wish == "gather":
        return None, "attention: gather (asked for)"
    if device.type == "cuda":
        found = load_triton(device, TORCH_DTYPES[dtype])
        if found.kernels is not None:
            return found.kernels, "attention: Triton kernels"
        reason = found.reason
    elif not native_supports(TORCH_DTYPES[dtype], device):
        reason = f"there is no native kernel for {dtype} on {device}"
    else:
        loading = load_native(_kernel_cache(config))
        if loading.kernels is not None:
            return loading.kernels, "attention: native kernel"
        reason = loading.reason
    if wish == "native":
        raise ConfigError(f"engine.attention is native, but {reason}", param="engine.attention")
    return None, f"attention: gather, slower than the native kernel, because {reason}"


def _kernel_cache(config: Config) -> Path:
    models = Path(config.model_cache).expanduser() if config.model_cache else default_cache()
    return models / "kernels"


def _shared_weights(config: Config, share: HostShare) -> Path | None:
    """A worker that is alone on its host has nobody to keep them for."""
    if not config.engine.share_weights or share.workers == 1:
        return None
    return _kernel_cache(config).with_name("packed-weights")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name} is not supported: cpu and cuda are")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: this torch sees no CUDA device")
    return device


def _allocate(
    blocks: int,
    layout: BlockLayout,
    incarnation: Incarnation,
    device: torch.device,
    kernels: CDLL | TritonKernels | None,
) -> tuple[PoolMemory, str]:
    """And the line that says how its blocks are copied."""
    span_bytes = layout.span_bytes
    if device.type == "cuda":
        return allocate_cuda(blocks, span_bytes, incarnation, device), "blocks on the device"
    memory = allocate_shared(blocks, span_bytes, incarnation)
    take_pages(memory.blocks.numpy())
    native = kernels if isinstance(kernels, CDLL) else None
    memory.spans, note = choose_spans(native, span_bytes)
    return memory, note


def _model_notes(loaded: LoadedModel) -> tuple[str, ...]:
    return (
        f"{loaded.model.config.model_type}, {len(loaded.layers)} layers, {loaded.dtype}, "
        f"{loaded.numerics.value} numerics, on {loaded.device} with {torch.get_num_threads()} "
        "threads",
        loaded.weights_note,
    )


def _pool_notes(size: PoolSize, loaded: LoadedModel) -> tuple[str, ...]:
    if size.longest is None:
        return (size.sum,)
    return (
        size.sum,
        f"the pool holds {size.longest} tokens, fewer than the model's context of "
        f"{loaded.max_model_len}: longer sequences will be refused",
    )


def _turn(config: Config, device: torch.device, not_fused: str) -> tuple[Turn | None, str]:
    """A place among the engines that use all of these cores, and what to say of it.

    Only fused layers can let another engine in, so only they take turns. One that is alone has
    every turn at once.
    """
    slice_s = config.engine.turn_ms / 1000
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if device.type != "cpu":
        reason = f"it computes on {device}"
    elif threads < cores:
        reason = f"it has {threads} threads on {cores} cores"
    elif not slice_s:
        reason = "engine.turn_ms is 0"
    elif not_fused:
        reason = f"its layers run one by one: {not_fused}"
    else:
        try:
            return open_turn(slice_s), f"turns: of {config.engine.turn_ms:g} ms"
        except ConfigError as error:
            reason = str(error)
    return None, f"turns: none, because {reason}"


def _thread_notes(device: torch.device, workers_on_host: int) -> tuple[str, ...]:
    """OpenMP's threads spin while they wait, which ruins everybody once they outnumber the cores.

    The runtime reads the setting when it is loaded, so only whoever starts the process can set it.
    """
    threads, cores = torch.get_num_threads() * workers_on_host, len(os.sched_getaffinity(0))
    calm = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or (
        os.environ.get("GOMP_SPINCOUNT") == "0"
    )
    if device.type != "cpu" or threads <= cores or calm:
        return ()
    return (
        f"{workers_on_host} workers have {threads} threads on {cores} cores and wait by spinning: "
        "start them with OMP_WAIT_POLICY=passive, or with fewer threads",
    )


def _facts(path: str, loaded: LoadedModel, layout: BlockLayout) -> ModelFacts:
    return ModelFacts(
        path=path,
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.vocab_size,
        block_size=layout.block_size,
        dtype=loaded.dtype,
        numerics=loaded.numerics,
        fingerprint=fingerprint(layout, loaded.identity),
    )
