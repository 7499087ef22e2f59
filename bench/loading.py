"""Loading weights, cold and warm, beside transformers' loader, load_file and the disk itself.

Two checkpoints: the embedded model (0.27 GB, one file) and a generated one of several files, 8 GB
or as much as 0.3 of the free memory. Every way has a process of its own that imported all it needs;
they take turns. Cold: the files' pages are dropped before each turn; what the disk then really read
is kept in the notes. Mapped: packed weights that another load kept in a file. A load ends when
every weight lies in memory: mapped files are touched page by page.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from bench.disk import forget
from bench.record import Goal, Record, interleaved
from pdserve.config import Config
from pdserve.engine.resolve import default_cache, prepare_model
from pdserve.engine.sizing import measure_memory

HERE = Path(__file__).parent
LARGE = 8_000_000_000
SHARE_OF_MEMORY = 0.3
SHARD = 1_000_000_000
MAPPED = "ours, mapped"
WAYS = ("ours", "ours, packed", MAPPED, "transformers", "load_file", "disk")
KEPT = default_cache() / "bench-weights"
LAYER_BYTES = 436_207_616  # of such a layer, bfloat16


def run() -> Record:
    record = Record("loading")
    small = prepare_model(Config().model, default_cache(), lambda step: None).path
    free = measure_memory(torch.device("cpu")).free
    layers = int(min(LARGE, SHARE_OF_MEMORY * free) // LAYER_BYTES) - 1
    with contextlib.ExitStack() as after:
        after.callback(shutil.rmtree, KEPT, ignore_errors=True)
        _measure(record, "0.27 GB", small)
        _two_at_once(record, "0.27 GB", small)
        folder = after.enter_context(tempfile.TemporaryDirectory(dir=default_cache().parent))
        large = generate(Path(folder), layers, record.seed)
        size = sum(file.stat().st_size for file in _files(large))
        _measure(record, f"{size / 1e9:.2g} GB, {len(_files(large))} files", large)
    return record


def generate(folder: Path, layers: int, seed: int) -> Path:
    """A Llama-like checkpoint of random bits, in files of about SHARD bytes."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_key_value_heads=8,
        num_hidden_layers=layers,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    draw = np.random.default_rng(seed)
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, tensor in model.state_dict().items():
        if filled + 2 * tensor.numel() > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.shape
        filled += 2 * tensor.numel()
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        name = f"part-{number:03}.safetensors"
        tensors = {
            key: torch.frombuffer(bytearray(draw.bytes(2 * shape.numel())), dtype=torch.bfloat16)
            for key, shape in shapes.items()
        }
        shaped = {key: tensor.view(shapes[key]) for key, tensor in tensors.items()}
        save_file(shaped, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, name)
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), "utf-8")
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


class _Loader:
    """One way's process. CalledProcessError when it ends."""

    def __init__(self, way: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.contenders.loader", way, str(folder), str(KEPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parent,
        )
        self.turns: list[dict[str, float]] = []
        self._answer()

    def start(self) -> None:
        assert self.process.stdin is not None
        print("load", file=self.process.stdin, flush=True)

    def end(self) -> dict[str, float]:
        self.turns.append(self._answer())
        return self.turns[-1]

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self.process.wait(), self.process.args)
        return dict(json.loads(line))


@contextlib.contextmanager
def _loaders(folder: Path, ways: tuple[str, ...]) -> Iterator[dict[str, _Loader]]:
    started: dict[str, _Loader] = {}
    try:
        for way in ways:
            started[way] = _Loader(way.partition("#")[0], folder)
        yield started
    finally:
        for loader in started.values():
            assert loader.process.stdin is not None
            loader.process.stdin.close()
            loader.process.wait(60)


def _measure(record: Record, what: str, folder: Path) -> None:
    files = _files(folder)
    size = sum(file.stat().st_size for file in files)
    largest = max(file.stat().st_size for file in files)
    with _loaders(folder, WAYS) as loaders:
        loaders[MAPPED].start()  # makes the file
        loaders[MAPPED].end()
        kept = _files(KEPT)

        def rate(way: str, cold: bool) -> Callable[[], float]:
            """GB/s of one load."""

            def load() -> float:
                if cold:
                    forget([*files, *kept])
                loaders[way].start()
                return size / loaders[way].end()["seconds"] / 1e9

            return load

        cold = interleaved({way: rate(way, cold=True) for way in WAYS})
        warm = interleaved({way: rate(way, cold=False) for way in WAYS[:-1]})
        notes = {way: loader.turns for way, loader in loaders.items()}
    record.notes[what] = {"bytes": size, "largest file": largest, "turns": notes}
    for state, found in (("cold", cold), ("warm", warm)):
        for way, rates in found.items():
            record.value(f"{what}, {state}: {way}", "GB/s", rates)
        for peer in ("transformers", "load_file"):
            goal = Goal(2.0) if state == "cold" else None
            for way in ("ours", MAPPED):
                record.ratio(f"{what}, {state}: {way} / {peer}", found[way], found[peer], goal)
    for way in ("ours", "ours, packed", MAPPED):
        record.ratio(f"{what}, cold: {way} / disk", cold[way], cold["disk"], Goal(0.8))
        # The first turn also grew by what is loaded once and stays.
        peaks = [(turn["grown"] - turn["weights"]) / largest for turn in notes[way][1:]]
        name = f"{what}: most memory of {way}, beyond the weights"
        record.value(name, "of the largest file", peaks, Goal(1.0, at_least=False))
        own = [turn["own"] / turn["weights"] for turn in notes[way][1:]]
        record.value(f"{what}: memory of a worker's own, {way}", "of the weights", own)


def _two_at_once(record: Record, what: str, folder: Path) -> None:
    """Two workers that load the same files at the same time, cold."""
    shares = []
    size = sum(file.stat().st_size for file in _files(folder))
    with _loaders(folder, ("ours#1", "ours#2")) as loaders:
        for _ in range(3):
            forget(_files(folder))
            for loader in loaders.values():
                loader.start()
            shares.append(sum(loader.end()["from_disk"] for loader in loaders.values()) / size)
    record.value(f"{what}: read from disk by two workers at once", "of the files", shares)
