"""Our engine alone: ``python our_engine.py MODEL_FOLDER [none|int8|int4]``."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time

from turns import Seen, Turn, seen, take_turns  # type: ignore[import-not-found]

from bench.bare_engine import bare_engine
from pdserve.collector import starting_up
from pdserve.config import Config


def main(folder: str, quantization: str = "none") -> None:
    plain = Config()
    model = dataclasses.replace(plain.model, path=folder, quantization=quantization)
    config = dataclasses.replace(plain, model=model)
    with contextlib.ExitStack() as stack:
        with starting_up():  # as a worker's process does
            engine = stack.enter_context(bare_engine(config))

        def answer(turn: Turn) -> Seen:
            prompts = turn.prompts()
            began = time.perf_counter()
            running = [engine.submit(prompt, turn.tokens) for prompt in prompts]
            times = [[each.began + at for at in each.wait()] for each in running]
            return seen(began, times)

        told = [note for note in engine.built.notes if note.startswith(("layers", "weights"))]
        take_turns(answer, {"engine": f"pdserve, {', '.join(told)}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
