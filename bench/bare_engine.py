"""The engine alone, in this process: what a request costs with nothing between it and its caller.

with bare_engine() as engine:  engine.stream(prompt, tokens) -> when each token was made
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cache_tiers.keys import KeyMaker
from pdserve.config import Config
from pdserve.engine import api
from pdserve.engine.build import BuiltEngine, build_engine
from pdserve.engine.host_memory import HostShare
from pdserve.engine.resolve import default_cache, prepare_model
from pdserve.errors import Cancelled
from pdserve.types import ID_BYTES, AttemptTokens, Incarnation, Sampling


@dataclass(slots=True)
class Running:
    """One sequence: ``token_s`` counts from its Submit, in seconds."""

    seq: api.SeqId
    began: float
    token_s: list[float] = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> tuple[float, ...]:
        if not self.ended.wait(120):
            raise TimeoutError("the engine did not finish a sequence within 120 s")
        return tuple(self.token_s)


class BareEngine:
    """Owns the sequences that run; events come on the engine's thread."""

    def __init__(self, config: Config) -> None:
        prepared = prepare_model(config.model, default_cache(), lambda step: None)
        self._keys = KeyMaker(os.urandom(16))
        self._running: dict[api.SeqId, Running] = {}
        self.built: BuiltEngine = build_engine(
            config=config,
            model_path=str(prepared.path),
            pool_blocks=config.engine.pool_blocks,
            device="cpu",
            threads=config.pools.threads_per_worker,
            incarnation=Incarnation(os.urandom(16)),
            hasher=self._keys.child,
            has_tiers=False,
            sink=self._sink,
            share=HostShare(),
        )
        self._root = self._keys.root(self.built.facts.fingerprint, b"")
        self.built.engine.start()

    def submit(self, prompt: Sequence[int], tokens: int) -> Running:
        """Greedy, to exactly ``tokens`` tokens; the keys are computed before the clock starts."""
        size = self.built.facts.block_size
        what = AttemptTokens(
            token_ids=tuple(prompt),
            prompt_len=len(prompt),
            key_root=self._root,
            block_keys=self._keys.chain(self._root, prompt, size),
        )
        seq = api.SeqId(os.urandom(ID_BYTES))
        sampling = Sampling(max_tokens=tokens, temperature=0.0)
        running = Running(seq, time.perf_counter())
        self._running[seq] = running
        self.built.engine.post(api.Submit(seq, api.Job.GENERATE, what, sampling))
        return running

    def stream(self, prompt: Sequence[int], tokens: int) -> tuple[float, ...]:
        return self.submit(prompt, tokens).wait()

    def cancel(self, running: Running) -> None:
        self.built.engine.post(api.Cancel(running.seq, Cancelled("it ran long enough")))
        running.wait()

    def close(self) -> None:
        self.built.engine.stop()
        self.built.close()

    def _sink(self, events: Sequence[api.Event]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, api.Tokens):
                running = self._running[event.seq]
                running.token_s += [now - running.began] * len(event.tokens)
                running.first.set()
                if event.finish is not None:
                    del self._running[event.seq]
                    running.ended.set()
            elif isinstance(event, api.Failed):
                if not isinstance(event.error, Cancelled):
                    raise event.error
                self._running.pop(event.seq).ended.set()


@contextlib.contextmanager
def bare_engine(config: Config, niceness: int = 0) -> Iterator[BareEngine]:
    """``niceness``: of the engine's threads; that of the workers that it is compared with."""
    made: list[BareEngine] = []

    def make() -> None:
        os.nice(niceness)  # of this thread alone, and of those that it starts
        made.append(BareEngine(config))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not made:
        raise RuntimeError("the engine was not built; its thread has said why")
    try:
        yield made[0]
    finally:
        made[0].close()
