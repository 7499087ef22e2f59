"""How an attempt is made, as it becomes known: who read the prompt, what moved, and when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kv_transfer.base import BlockOffer, ReadReport
from pdserve.rpc import convert
from pdserve.rpc.convert_timeline import phases_to_proto
from pdserve.telemetry.timeline import Phase, PhaseName, Recorder, between
from pdserve.types import CachedTokens, ChunkTiming, Transport, WorkerId
from pdserve.v1 import kv_pb2, worker_pb2


@dataclass(slots=True)
class AttemptRecord:
    """Owned by one attempt, on the event loop."""

    block_size: int
    prefill_worker: str = ""
    skip_reason: str = ""
    transport: str = ""
    bytes_moved: int = 0
    cached: CachedTokens = field(default_factory=CachedTokens)
    preemptions: int = 0
    chunks: tuple[ChunkTiming, ...] = ()
    # This worker's own phases, and the prefill worker's as it told them.
    recorder: Recorder = field(default_factory=Recorder)
    peer_phases: tuple[Phase, ...] = ()
    # Before that the hand-off may still fail, and what moved for it served nothing.
    _settled: bool = False
    _started: float = 0.0  # when the prefill worker had begun
    # block position -> when its bytes moved (first, last); seconds of CLOCK_MONOTONIC
    _moved: dict[int, tuple[float, float]] = field(default_factory=dict)

    def started(self) -> None:
        self._started = time.monotonic()

    def arrived(self) -> None:
        """Every block that was wanted of the peer is here."""
        self.skip_reason = self.skip_reason or "all_blocks_local"
        self._settled = True

    def ended_at_first_token(self) -> None:
        """Nothing more will move."""
        self.skip_reason = "ended_at_first_token"
        self._settled = True

    def granted(self, blocks: int) -> None:
        now = time.monotonic()
        self.recorder.add(between(PhaseName.GRANT, self._started, now, blocks=blocks))

    def read(self, offers: Sequence[BlockOffer], report: ReadReport, transport: Transport) -> None:
        self.bytes_moved += report.bytes_moved
        self.transport = transport.value
        self.recorder.add(
            between(
                PhaseName.TRANSFER,
                report.first_byte,
                report.last_byte,
                bytes=report.bytes_moved,
                blocks=len(offers),
                transport=transport,
            )
        )
        for offer in offers:
            self._moved[offer.index] = (report.first_byte, report.last_byte)

    def take_phases(self, worker: WorkerId) -> list[kv_pb2.Phase]:
        """What ended since the last call; ``worker`` is this one."""
        own = self.recorder.take()
        peers, self.peer_phases = self.peer_phases, ()
        return phases_to_proto(peers) + phases_to_proto(own, worker)

    def to_proto(self) -> worker_pb2.AttemptFacts:
        moved = self.bytes_moved if self._settled else 0
        return worker_pb2.AttemptFacts(
            cached_tokens=convert.cached_tokens_to_proto(self.cached),
            prefill_worker=self.prefill_worker,
            kv_bytes_transferred=moved,
            kv_transport=self.transport if moved else "",
            kv_skipped_reason="" if moved else self.skip_reason,
            preemptions=self.preemptions,
            chunks=[convert.chunk_timing_to_proto(chunk) for chunk in self._timed_chunks()],
        )

    def _timed_chunks(self) -> list[ChunkTiming]:
        """A chunk's bytes are those of the blocks that it completed or began last."""
        timed = []
        for chunk in self.chunks:
            first = chunk.first_token // self.block_size
            end = -(-(chunk.first_token + chunk.tokens) // self.block_size)
            spans = [self._moved[i] for i in range(first, end) if i in self._moved]
            if spans:
                chunk = replace(  # noqa: PLW2901
                    chunk,
                    first_byte=min(begin for begin, _ in spans),
                    last_byte=max(last for _, last in spans),
                )
            timed.append(chunk)
        return timed
