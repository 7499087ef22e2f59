"""One copy of a model's packed weights for all CPU workers of a host, made by the first of them.

    load_shared(folder, recipe, make)
        a kept file of this recipe -> the model is built empty, the file's tensors are put in
        none                       -> make() loads from the model's own files; what it made is
                                      kept, and put together like that, too

A recipe names everything that decides the file's content: the model's files by their times and
sizes, and the code that names and packs the tensors. One worker makes at a time, others wait for
it and map what it made. Whatever keeps a file from being made or used is told, and leaves the
worker with a copy of its own. Loading as if there were no such file is the reference.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ctypes import CDLL
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from pdserve.engine import gguf_blocks, linear, load_weights, quantized, quantized_linear, tiles
from pdserve.engine.compiler import sole_builder
from pdserve.engine.gguf_blocks import blocks_file
from pdserve.engine.kept_weights import (
    SUFFIX,
    KeptUnusable,
    KeptWeights,
    can_keep,
    check_room,
    open_kept,
    sweep,
    write_kept,
)
from pdserve.engine.linear import PackedLinear
from pdserve.engine.load_weights import EmptyModel, empty_model
from pdserve.engine.quantized import Quantization
from pdserve.engine.quantized_linear import QuantizedLinear, groups_work
from pdserve.engine.tiles import TiledLinear
from pdserve.engine.weights import weight_files

log = logging.getLogger(__name__)

LEAST_BYTES = 64 * 2**20  # of weights that are worth a file
# For another worker that makes the file; then this one makes it, too. Below any start's time-out.
PATIENCE_S = 120.0
DTYPE = torch.bfloat16  # what the kernels' weights are packed from
# Whose change may change what is kept.
_MAKERS = (gguf_blocks, linear, load_weights, quantized, quantized_linear, tiles)
_PACKED = "packed"


@dataclass(frozen=True, slots=True)
class Weighted:
    """A model with its weights in place."""

    model: Any
    revision: str  # of all that they were made from
    packed_bytes: int  # of linear layers, which are no parameters any more
    note: str  # for the log
    mapped: bool = False  # from the one copy of all workers of the host


@dataclass(frozen=True, slots=True)
class Recipe:
    path: Path  # the model's folder
    config: Any
    quantization: Quantization
    kernels: CDLL

    @property
    def family(self) -> str:
        """What a newer file of the same begins with."""
        folder = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:12]
        return f"{folder}-{self.quantization.value}-"

    def file_name(self) -> str:
        """OSError, ModelRefused."""
        quantized = self.quantization is not Quantization.NONE
        blocks = blocks_file(self.path) if quantized else None
        blocks_serve = quantized and groups_work(self.kernels)
        facts: list[object] = [torch.__version__, transformers.__version__, blocks_serve, _code()]
        files = [self.path / "config.json", *weight_files(self.path)]
        for file in files if blocks is None else [*files, blocks]:
            info = file.stat()
            # The last two change with the content even where somebody sets the first back.
            facts.append((file.name, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
        return f"{self.family}{key}{SUFFIX}"


@cache
def _code() -> str:
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in _MAKERS)
    return hashlib.sha256(sources).hexdigest()


def load_shared(folder: Path, recipe: Recipe, make: Callable[[], Weighted]) -> Weighted:
    """Raises what ``make`` raises, and nothing else."""
    try:
        file = folder / recipe.file_name()
        found = _find(file, recipe)
        if found is not None:
            return found
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Those that would wait for nothing do not wait.
        _check_worth(folder, recipe)
        lock = ExitStack()
        lock.enter_context(sole_builder(folder, PATIENCE_S, recipe.family.rstrip("-")))
    except Exception as error:
        return _alone(make(), error)
    with lock:
        return _find(file, recipe) or _make(file, recipe, make)


def _make(file: Path, recipe: Recipe, make: Callable[[], Weighted]) -> Weighted:
    made = make()
    try:
        # Who lost patience may find that the other came to an end after all.
        kept = _find(file, recipe) or _keep(file, recipe, made)
    except Exception as error:
        return _alone(made, error)
    del made
    _give_back()
    return kept


def _give_back() -> None:
    """To the system: what freed tensors leave in the allocator is as much as they were."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _alone(made: Weighted, reason: Exception) -> Weighted:
    told = str(reason) or type(reason).__name__
    note = f"{made.note}; a copy of this worker's own, because {told}"
    return replace(made, note=note)


def _check_worth(folder: Path, recipe: Recipe) -> None:
    """KeptUnusable: there is no use in making the file."""
    size = sum(file.stat().st_size for file in weight_files(recipe.path))
    if size < LEAST_BYTES:
        raise KeptUnusable(f"{size} bytes are not worth a file")
    check_room(folder, size)
    _empty(recipe)


def _find(file: Path, recipe: Recipe) -> Weighted | None:
    """From a file that is there; None: there is none, or it does not serve."""
    if not file.exists():
        return None
    try:
        return _filled(recipe, file)
    except Exception as error:
        log.warning("weights: read from the model's files again, because %s", error)
        return None


def _empty(recipe: Recipe) -> EmptyModel:
    empty = empty_model(recipe.path, recipe.config, DTYPE)
    if empty is None:
        raise KeptUnusable("the model does not simply hold its files' tensors")
    return empty


def _filled(recipe: Recipe, file: Path) -> Weighted:
    """KeptUnusable, among others: these are not exactly the model's tensors."""
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(open_kept, file)  # reads while the model is built
        empty, kept = _empty(recipe), opening.result()
    notes = kept.notes
    _put(kept, empty.model, recipe.kernels)
    left = empty.unfilled()
    if left:
        raise KeptUnusable(f"{len(left)} of the model's tensors are not kept ({left[0]}, ...)")
    note = f"{notes['note']}; one copy for all workers of this host, mapped from {file}"
    return Weighted(empty.model, notes["revision"], notes["packed_bytes"], note, mapped=True)


def _keep(file: Path, recipe: Recipe, made: Weighted) -> Weighted:
    """Writes what was made, and takes it over from there."""
    gathered = _gather(made.model)
    notes = {
        "model": str(recipe.path.resolve()),
        "revision": made.revision,
        "packed_bytes": made.packed_bytes,
        "note": made.note,
        "layers": gathered.layers,
        "places": gathered.places,
    }
    sweep(file, recipe.family)
    write_kept(file, gathered.tensors, notes)
    try:
        return _filled(recipe, file)
    except Exception:
        file.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class _Gathered:
    tensors: dict[str, torch.Tensor]  # by the first of its places: "module.path.name"
    places: dict[str, list[str]]  # all of them, when it is tied
    layers: dict[str, int]  # packed linear layers: bits of a weight


def _gather(model: Any) -> _Gathered:
    """All that loading filled. KeptUnusable when something cannot be kept like that."""
    gathered = _Gathered({}, {}, {})
    first: dict[tuple[int, torch.Size], str] = {}
    saved = {tensor.data_ptr() for tensor in model.state_dict().values()}

    def add(name: str, tensor: torch.Tensor) -> None:
        if not can_keep(tensor):
            raise KeptUnusable(f"{name} is no plain tensor")
        home = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        gathered.tensors.setdefault(home, tensor)
        gathered.places.setdefault(home, []).append(name)

    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            raise KeptUnusable(f"{path} is packed by oneDNN")
        if isinstance(module, TiledLinear | QuantizedLinear):
            gathered.layers[path] = module.struct.bits
            add(f"{path}.{_PACKED}", module.packed)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.data_ptr() in saved:
                add(f"{path}.{name}", tensor)
    return gathered


def _put(kept: KeptWeights, model: Any, kernels: CDLL) -> None:
    """Each kept tensor to its places in an empty model.

    KeptUnusable: it has not these places, or not with these shapes.
    """
    layers = kept.notes["layers"]
    packed: dict[str, torch.Tensor] = {}
    for home, tensor in kept.tensors.items():
        floats = tensor.is_floating_point()
        parameter = nn.Parameter(tensor, requires_grad=False) if floats else None
        for place in kept.notes["places"][home]:
            path, _, name = place.rpartition(".")
            if name == _PACKED and path in layers:
                packed[path] = tensor
                continue
            module = _module(model, path)
            if parameter is not None and _fits(module._parameters.get(name), tensor):
                module._parameters[name] = parameter
            elif _fits(module._buffers.get(name), tensor):
                module._buffers[name] = tensor
            else:
                raise KeptUnusable(f"the model has no {place} of that shape")
    if packed.keys() != layers.keys():
        raise KeptUnusable("the packed layers are not those that are told of")
    for path, tensor in packed.items():
        _put_packed(model, path, tensor, int(layers[path]), kernels)


def _put_packed(model: Any, path: str, tensor: torch.Tensor, bits: int, kernels: CDLL) -> None:
    module = _module(model, path)
    layer: nn.Module
    if type(module) is not nn.Linear:
        raise KeptUnusable(f"{path} is no linear layer")
    try:
        if bits == 16:
            layer = TiledLinear.over(tensor, module, kernels)
        else:
            layer = QuantizedLinear.over(tensor, bits, module, kernels)
    except ValueError as error:
        raise KeptUnusable(f"{path}: {error}") from error
    parent, _, own = path.rpartition(".")
    setattr(_module(model, parent), own, layer)


def _module(model: Any, path: str) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise KeptUnusable(f"the model has no {path}") from error
    return module


def _fits(own: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return own is not None and own.shape == tensor.shape and own.dtype is tensor.dtype
