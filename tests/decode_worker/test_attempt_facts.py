"""What moved is told once the hand-off holds: of one that failed, nothing served."""

from __future__ import annotations

from decode_worker.facts import AttemptRecord
from kv_transfer.base import BlockOffer, ReadReport
from pdserve.types import Transport


def record() -> AttemptRecord:
    made = AttemptRecord(block_size=4, prefill_worker="p0")
    made.started()
    made.granted(2)
    made.read([BlockOffer(0, 0, 0, 0)], ReadReport(64, 1.0, 2.0), Transport.SHM)
    return made


def test_bytes_count_from_the_moment_that_all_are_here() -> None:
    made = record()
    early = made.to_proto()
    assert (early.kv_bytes_transferred, early.kv_transport, early.kv_skipped_reason) == (0, "", "")
    assert early.prefill_worker == "p0"
    made.read([BlockOffer(1, 1, 0, 0)], ReadReport(64, 2.0, 3.0), Transport.SHM)
    made.arrived()
    late = made.to_proto()
    assert (late.kv_bytes_transferred, late.kv_transport, late.kv_skipped_reason) == (
        128,
        "shm",
        "",
    )


def test_what_moved_before_an_end_at_the_first_token_is_told() -> None:
    made = record()
    made.ended_at_first_token()
    assert made.to_proto().kv_bytes_transferred == 64


def test_without_any_byte_the_reason_is_told() -> None:
    made = AttemptRecord(block_size=4, prefill_worker="p0")
    made.arrived()
    assert made.to_proto().kv_skipped_reason == "all_blocks_local"
