"""How an attempt is made, as it becomes known: who read the prompt, what moved, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kv_transfer.base import BlockOffer, ReadReport
from pdserve.rpc import convert
from pdserve.types import CachedTokens, ChunkTiming
from pdserve.v1 import worker_pb2


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
    # block position -> when its bytes moved (first, last); seconds of CLOCK_MONOTONIC
    _moved: dict[int, tuple[float, float]] = field(default_factory=dict)

    def read(self, offers: Sequence[BlockOffer], report: ReadReport, transport: str) -> None:
        self.bytes_moved += report.bytes_moved
        self.transport = transport
        for offer in offers:
            self._moved[offer.index] = (report.first_byte, report.last_byte)

    def to_proto(self) -> worker_pb2.AttemptFacts:
        return worker_pb2.AttemptFacts(
            cached_tokens=convert.cached_tokens_to_proto(self.cached),
            prefill_worker=self.prefill_worker,
            kv_bytes_transferred=self.bytes_moved,
            kv_transport=self.transport,
            kv_skipped_reason="" if self.bytes_moved else self.skip_reason,
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
