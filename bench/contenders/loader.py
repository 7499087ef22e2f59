"""Loads a model folder again and again in one way: ``loader.py WAY FOLDER KEPT``, a turn a line.

KEPT: a folder for files of packed weights. Answers a line of JSON: seconds until every weight lies
in memory and was touched once, by how much the process grew at most, and in memory that nobody
shares, what the weights take (bytes), and what the disk had to read for it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from bench.disk import read_through
from pdserve.engine.linear import LinearPacker, PackedLinear
from pdserve.engine.load_weights import read_model
from pdserve.engine.native import load_native
from pdserve.engine.quantized import Quantization
from pdserve.engine.resolve import default_cache
from pdserve.engine.shared_weights import Recipe, Weighted, load_shared
from pdserve.engine.tiles import TiledLinear

CPU = torch.device("cpu")
PAGE = 4096


def main(way: str, folder: Path, kept: Path) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    load = ways(folder, kept)[way]
    print(json.dumps({"ready": way}), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn(load)), file=out, flush=True)


def ways(folder: Path, kept: Path) -> dict[str, Callable[[], object]]:
    library = load_native(default_cache() / "kernels").kernels

    def ours(packer: LinearPacker | None = None) -> object:
        config = transformers.AutoConfig.from_pretrained(folder)
        return read_model(folder, config, torch.bfloat16, CPU, packer).model

    def mapped() -> object:
        assert library is not None
        config = transformers.AutoConfig.from_pretrained(folder)
        recipe = Recipe(folder, config, Quantization.NONE, library)

        def make() -> Weighted:
            return Weighted(ours(LinearPacker(library)), "of the bench", 0, "")

        loaded = load_shared(kept, recipe, make)
        assert str(kept) in loaded.note, loaded.note
        touch(weights_of(loaded.model))
        return loaded.model

    def theirs() -> object:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        touch(model.parameters())
        return model

    def plain() -> object:
        tensors = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        for own in tensors:
            touch(own.values())
        return tensors

    return {
        "ours": ours,
        "ours, packed": lambda: ours(LinearPacker(library)),
        "ours, mapped": mapped,
        "transformers": theirs,
        "load_file": plain,
        "disk": lambda: read_through(sorted(folder.glob("*.safetensors"))),
    }


def touch(tensors: Iterable[torch.Tensor]) -> None:
    """Reads a byte of every page: a mapped file may not be in memory before."""
    for tensor in tensors:
        int(tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum())


def turn(load: Callable[[], object]) -> dict[str, float]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, own, read = kilobytes("VmRSS"), kilobytes("RssAnon"), read_bytes()
    began = time.perf_counter()
    loaded = load()
    took = time.perf_counter() - began
    grown, weights = kilobytes("VmHWM") - before, bytes_of(loaded)
    own = kilobytes("RssAnon") - own
    del loaded
    from_disk = read_bytes() - read
    return {
        "seconds": took,
        "grown": 1024.0 * grown,
        "own": 1024.0 * own,
        "weights": float(weights),
        "from_disk": float(from_disk),
    }


def bytes_of(loaded: object) -> int:
    """What the weights of a model take; 0 for anything else."""
    if not isinstance(loaded, torch.nn.Module):
        return 0
    kept = {id(tensor): tensor for tensor in weights_of(loaded)}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    packed = [m.packed for m in model.modules() if isinstance(m, TiledLinear | PackedLinear)]
    return tensors + packed


def kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


def read_bytes() -> int:
    for line in Path("/proc/self/io").read_text("ascii").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise KeyError("read_bytes")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
