"""Proof that requests go the whole way: the router sends itself one before it says ready.

    nobody to serve -> wait for a change -> test -> proven | failed, and again after a while

The test asks for two tokens after a prompt of two blocks and one token, under a salt of its own:
no cache can hold any of it, so where a prefill worker lives, KV has to move, and the second token
cannot be written without it. It is repeated when another model appears, when the first prefill
worker joins a cluster that was proven without one, when no decoding worker is left of those that
were there, and when a client's request failed by a fault of ours: a worker may be up and wedged.

KV that does not move is said loudly, and tried again until it does; in strict mode the router is
unready meanwhile (router/readiness.py). So a request that a decode worker had to read by
itself, its prefill workers having failed, is followed by a test, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass

from pdserve.errors import Overloaded, PdserveError
from pdserve.types import (
    Fingerprint,
    Incarnation,
    ModelFacts,
    RequestId,
    Role,
    Sampling,
    Usage,
    WorkerState,
)
from router.api import Job, Principal
from router.dispatch import RequestDispatcher
from router.registry import Registry

log = logging.getLogger(__name__)

PRINCIPAL = Principal("self-test", b"self-test")
ANSWER_TOKENS = 2  # beside those that prefill workers write
RETRY_S = 2.0
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Proof:
    """What a test has shown."""

    fingerprint: Fingerprint
    moved: bool
    # Incarnations that could decode at that time.
    decoders: frozenset[Incarnation]


class SelfTest:
    """Runs for the router's whole life, as one task. Event loop only."""

    def __init__(self, dispatcher: RequestDispatcher, registry: Registry) -> None:
        self._dispatcher = dispatcher
        self._readiness = dispatcher.readiness
        self._registry = registry
        self._proof: Proof | None = None
        # A request failed by a fault of ours, and no test has passed since.
        self._doubt = False
        self._changed = dispatcher.doubted
        self._unlisten = registry.listen(self._follow)

    async def run(self) -> None:
        try:
            while True:
                self._changed.clear()
                self._doubt |= self._dispatcher.take_doubt()
                settled = not self._wanted() or await self._test()
                try:
                    async with asyncio.timeout(None if settled else RETRY_S):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            self._unlisten()

    def _follow(self) -> None:
        """At once: nobody may be told ready on the word of workers that are no more."""
        proof = self._proof
        if proof is not None and proof.decoders.isdisjoint(self._decoders()):
            self._proof = None
            self._readiness.proved(False, "the workers that were tested are gone")
        if (model := self._registry.model()) is None or not self._pairs(model):
            self._readiness.kv_moved("")
        self._changed.set()

    def _decoders(self) -> frozenset[Incarnation]:
        return frozenset(
            facts.incarnation for facts in self._registry.live() if facts.role is not Role.PREFILL
        )

    def _wanted(self) -> bool:
        """Whether there is something to prove, and somebody to prove it with."""
        model = self._registry.model()
        if model is None or not self._dispatcher.servable()[0]:
            return False
        if any(view.state is WorkerState.STARTING for view in self._registry.snapshot()):
            # It is heard within the bound of silence; until then the test could miss its half.
            return False
        proof = self._proof
        if self._doubt or proof is None or proof.fingerprint != model.fingerprint:
            return True
        return self._pairs(model) and not proof.moved

    def _pairs(self, model: ModelFacts) -> bool:
        """Whether both halves of a hand-off are ready."""
        ready = {
            view.facts.role
            for view in self._registry.snapshot()
            if view.state is WorkerState.READY and view.facts.model.fingerprint == model.fingerprint
        }
        return {Role.PREFILL, Role.DECODE} <= ready

    async def _test(self) -> bool:
        """One request. Whether the verdict is good, so that nothing need be tried again soon."""
        model = self._registry.model()
        assert model is not None
        pairs = self._pairs(model)
        try:
            usage = await self._request(model)
        except PdserveError as error:
            reason = f"the self-test failed: {error.code}: {error}"
            log.error("%s", reason)
            if not isinstance(error, Overloaded):
                self._proof = None
                self._readiness.proved(False, reason)
            return False
        moved = usage.kv_bytes_transferred > 0
        self._doubt = False
        self._proof = Proof(model.fingerprint, moved, self._decoders())
        if pairs and not moved:
            reason = usage.kv_skipped_reason or "unknown"
            log.error("KV does not move between workers: %s", reason)
            self._readiness.kv_moved(reason)
            self._readiness.proved(True, "")
            return False
        self._readiness.kv_moved("")
        self._readiness.proved(True, "")
        log.info(
            "self-test passed: prompt read by %s, %d KV bytes moved%s, answer written by %s",
            usage.prefill_worker or usage.decode_worker,
            usage.kv_bytes_transferred,
            f" by {usage.kv_transport}" if moved else f" ({usage.kv_skipped_reason})",
            usage.decode_worker,
        )
        return True

    async def _request(self, model: ModelFacts) -> Usage:
        """Sends the request and checks that all of its answer came."""
        answer = self._dispatcher.borrowed_tokens + ANSWER_TOKENS
        length = max(1, min(2 * model.block_size + 1, model.max_model_len - answer))
        job = Job(
            request_id=RequestId(f"self-test-{os.urandom(8).hex()}"),
            principal=PRINCIPAL,
            prompt=tuple((7 * place + 1) % model.vocab_size for place in range(length)),
            sampling=Sampling(max_tokens=answer, temperature=0.0),
            deadline=time.monotonic() + TIMEOUT_S,
            salt=os.urandom(16),
        )
        usage: Usage | None = None
        async for delta in self._dispatcher.run(job, force_pair=True):
            usage = delta.usage
        assert usage is not None
        return usage
