"""Our engine without anything around it: ``python our_engine.py MODEL_FOLDER``."""

from __future__ import annotations

import dataclasses
import sys
import time

from turns import Seen, Turn, seen, take_turns  # type: ignore[import-not-found]

from bench.bare_engine import bare_engine
from pdserve.config import Config


def main(folder: str) -> None:
    plain = Config()
    config = dataclasses.replace(plain, model=dataclasses.replace(plain.model, path=folder))
    with bare_engine(config) as engine:

        def answer(turn: Turn) -> Seen:
            prompts = turn.prompts()
            began = time.perf_counter()
            running = [engine.submit(prompt, turn.tokens) for prompt in prompts]
            times = [[each.began + at for at in each.wait()] for each in running]
            return seen(began, times)

        layers = next(note for note in engine.built.notes if note.startswith("layers"))
        take_turns(answer, {"engine": f"pdserve, {layers}"})


if __name__ == "__main__":
    main(sys.argv[1])
