"""What quantized weights cost in quality: perplexity and greedy agreement, beside float32.

Texts are cut into windows of 512 tokens: a chapter that ships here (public domain), and our own
documentation, whose state is noted. Every kind of weights reads every window; the reference is the
same model folder in float32. Agreement: how often the best token is the reference's (the text is
given), and how many of 32 tokens are the reference's before the first other one (left alone).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from bench.record import Record
from pdserve.config import Config
from pdserve.engine.layout import block_layout
from pdserve.engine.model import load_model
from pdserve.engine.native import load_native
from pdserve.engine.pool_view import pool_view
from pdserve.engine.quantized import Quantization
from pdserve.engine.resolve import default_cache, prepare_model
from pdserve.engine.runner import ModelRunner
from pdserve.engine.step import Row
from pdserve.types import Numerics

HERE = Path(__file__).parent
WINDOW = 512
WINDOWS = 4  # of each text, at most
PROMPT, ANSWER = 64, 32
BLOCK = 16
REFERENCE = "float32"
KINDS = {
    REFERENCE: ("float32", Quantization.NONE),
    "bfloat16": ("bfloat16", Quantization.NONE),
    "int8": ("bfloat16", Quantization.INT8),
    "int4": ("bfloat16", Quantization.INT4),
}


@dataclass(slots=True)
class Reading:
    """What one kind of weights said of one text; of every position but the windows' first."""

    losses: list[torch.Tensor] = field(default_factory=list)  # nats
    best: list[torch.Tensor] = field(default_factory=list)
    divergence: list[torch.Tensor] = field(default_factory=list)  # from the reference, nats
    answers: list[list[int]] = field(default_factory=list)  # greedy, to each window's start


def run() -> Record:
    record = Record("quality")
    folder = prepare_model(Config().model, default_cache(), lambda step: None).path
    library = load_native(default_cache() / "kernels").kernels
    runners = {name: _runner(folder, *kind, library) for name, kind in KINDS.items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for title, text in _texts().items():
        record.notes[f"{title}: SHA-256"] = hashlib.sha256(text.encode()).hexdigest()
        ids = tokenizer.encode(text).ids
        windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
        _report(record, title, _read(runners, windows[:WINDOWS]))
    return record


def _texts() -> dict[str, str]:
    pages = sorted(HERE.parent.glob("docs/*.md"))
    return {
        "story": (HERE / "texts" / "alice.txt").read_text(encoding="utf-8"),
        "our docs": "\n".join(page.read_text(encoding="utf-8") for page in pages),
    }


def _runner(
    folder: Path, dtype: str, quantization: Quantization, library: CDLL | None
) -> ModelRunner:
    loaded = load_model(
        folder,
        dtype=dtype,
        numerics=Numerics.FAST,
        device=torch.device("cpu"),
        quantization=quantization,
        library=library,
    )
    layout = block_layout(BLOCK, loaded.dtype, loaded.shapes)
    memory = torch.zeros((WINDOW // BLOCK, layout.span_bytes), dtype=torch.uint8)
    # The kernels know bfloat16 alone; the reference runs through the library's layers.
    kernels = library if dtype == "bfloat16" else None
    return ModelRunner(loaded, pool_view(memory, layout), kernels)


@torch.inference_mode()
def _read(runners: dict[str, ModelRunner], windows: Sequence[Sequence[int]]) -> dict[str, Reading]:
    readings = {name: Reading() for name in runners}
    for window in windows:
        following = torch.tensor(window[1:])
        reference = None
        for name, runner in runners.items():
            own = readings[name]
            own.answers.append(_answer(runner, window[:PROMPT]))
            logits = runner.logits([_row(window, 0)]).float()
            said = torch.log_softmax(logits[:-1], -1)
            reference = said if reference is None else reference
            own.losses.append(-said.gather(1, following[:, None])[:, 0])
            own.best.append(said.argmax(-1))
            own.divergence.append((reference.exp() * (reference - said)).sum(-1))
    return readings


def _answer(runner: ModelRunner, prompt: Sequence[int]) -> list[int]:
    tokens = list(prompt)
    start = 0
    while len(tokens) < len(prompt) + ANSWER:
        logits = runner.logits([_row(tokens[start:], start)])
        start = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def _row(tokens: Sequence[int], start: int) -> Row:
    return Row(tokens, start, np.arange(WINDOW // BLOCK, dtype=np.int32))


def _report(record: Record, title: str, readings: dict[str, Reading]) -> None:
    right = readings[REFERENCE]
    for name, own in readings.items():
        perplexity = float(torch.cat(own.losses).mean().exp())
        record.value(f"{title}, {name}: perplexity", "", [perplexity])
        if own is right:
            continue
        worse = [float(a.mean() - b.mean()) for a, b in zip(own.losses, right.losses, strict=True)]
        record.value(f"{title}, {name}: loss of a token above {REFERENCE}'s", "nats", worse)
        same = float((torch.cat(own.best) == torch.cat(right.best)).float().mean())
        record.value(f"{title}, {name}: best token is {REFERENCE}'s", "", [same])
        divergence = float(torch.cat(own.divergence).mean())
        record.value(f"{title}, {name}: divergence from {REFERENCE}", "nats", [divergence])
        shared = [_shared(a, b) for a, b in zip(own.answers, right.answers, strict=True)]
        record.value(f"{title}, {name}: of {ANSWER} tokens like {REFERENCE}'s", "tokens", shared)


def _shared(one: Sequence[int], other: Sequence[int]) -> float:
    """How many tokens come before the first that differs."""
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return float(index)
    return float(len(one))
