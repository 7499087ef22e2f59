"""Phases: bounded whatever happens, and on the wall's clock without contradicting each other."""

from __future__ import annotations

import time

import pytest

from pdserve.errors import ProtocolError
from pdserve.rpc.convert_timeline import MAX_PHASES, phases_from_proto, phases_to_proto
from pdserve.telemetry.timeline import PHASES_PER_NAME, Phase, PhaseName, Recorder, between, unix_ns
from pdserve.types import Tier, Transport
from pdserve.v1 import kv_pb2


def test_moments_are_the_walls_and_keep_their_distances() -> None:
    now = time.monotonic()
    assert abs(unix_ns(now) - time.time_ns()) < 50_000_000
    phase = between(PhaseName.CHUNK, now, now + 0.25, tokens=3)
    assert (phase.start_ns, phase.tokens) == (unix_ns(now), 3)
    assert abs(phase.duration_ns - 250_000_000) < 1000
    assert between(PhaseName.CHUNK, now, now - 1).duration_ns == 0


def test_a_long_story_is_merged_into_the_last_phase_of_its_name() -> None:
    recorder = Recorder()
    extra = 5000
    for i in range(PHASES_PER_NAME + extra):
        recorder.add(Phase(PhaseName.CHUNK, 10 * i, 8, tokens=2, bytes=1))
    recorder.add(Phase(PhaseName.DECODE, 0, 5))
    taken = recorder.take()
    assert len(taken) == PHASES_PER_NAME + 1
    last = taken[PHASES_PER_NAME - 1]
    assert (last.tokens, last.bytes, last.merged) == (2 * (extra + 1), extra + 1, extra)
    assert last.end_ns == 10 * (PHASES_PER_NAME + extra - 1) + 8
    assert recorder.take() == ()


def test_taking_does_not_lift_the_bound() -> None:
    recorder = Recorder()
    told = 0
    for i in range(10):
        for j in range(1000):
            recorder.add(Phase(PhaseName.TRANSFER, 1000 * i + j, 1))
        told += len(recorder.take())
    assert told == PHASES_PER_NAME + 9


def test_every_phase_survives_the_wire() -> None:
    phases = [
        Phase(
            name,
            2**60 + i,
            i,
            tokens=i,
            bytes=2**40,
            blocks=i,
            tier=list(Tier)[i % 3] if i % 2 else None,
            transport=list(Transport)[i % 4] if i % 3 else None,
            reason="because",
            merged=i,
        )
        for i, name in enumerate(PhaseName)
    ]
    there = [kv_pb2.Phase.FromString(m.SerializeToString()) for m in phases_to_proto(phases, "w1")]
    back = phases_from_proto(there)
    assert {phase.who for phase in back} == {"w1"}
    assert phases_from_proto(phases_to_proto(phases)) == tuple(phases)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([kv_pb2.Phase(name="chunk")] * (MAX_PHASES + 1), "phases:"),
        ([kv_pb2.Phase(name="chunk", worker="w" * 129)], "phases.worker"),
        ([kv_pb2.Phase(name="chunk", reason="r" * 129)], "phases.reason"),
        ([kv_pb2.Phase(name="chunk", start_unix_ns=2**63)], "phases.start_unix_ns"),
        ([kv_pb2.Phase(name="x", duration_ns=2**64 - 1)], "phases.start_unix_ns"),
    ],
)
def test_what_no_worker_would_send_is_refused(messages: list[kv_pb2.Phase], field: str) -> None:
    with pytest.raises(ProtocolError, match=field):
        phases_from_proto(messages)


def test_what_a_later_version_may_send_is_passed_over() -> None:
    later = [
        kv_pb2.Phase(name="teleport"),
        kv_pb2.Phase(name="tier_read", tier="disk"),
        kv_pb2.Phase(name="transfer", transport="pigeon"),
        kv_pb2.Phase(name="chunk", tokens=4),
    ]
    assert [phase.tokens for phase in phases_from_proto(later)] == [4]
