"""Phases of a request's timeline, to and from protobuf. The same conventions as convert.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pdserve.errors import ProtocolError
from pdserve.telemetry.timeline import Phase, PhaseName
from pdserve.types import Tier, Transport
from pdserve.v1 import kv_pb2

# Of one message: twice what two workers with a full recorder each may tell.
MAX_PHASES = 1024
MAX_TEXT_CHARS = 128

_NAMES: Mapping[str, PhaseName] = {name.value: name for name in PhaseName}
_TIERS: Mapping[str, Tier] = {tier.value: tier for tier in Tier}
_TRANSPORTS: Mapping[str, Transport] = {transport.value: transport for transport in Transport}


def phases_to_proto(phases: Iterable[Phase], worker: str = "") -> list[kv_pb2.Phase]:
    """``worker``: of those that name none."""
    return [
        kv_pb2.Phase(
            name=phase.name.value,
            worker=phase.who or worker,
            start_unix_ns=phase.start_ns,
            duration_ns=phase.duration_ns,
            tokens=phase.tokens,
            bytes=phase.bytes,
            blocks=phase.blocks,
            tier="" if phase.tier is None else phase.tier.value,
            transport="" if phase.transport is None else phase.transport.value,
            reason=phase.reason,
            merged=phase.merged,
        )
        for phase in phases
    ]


def phases_from_proto(messages: Sequence[kv_pb2.Phase]) -> tuple[Phase, ...]:
    """Without those whose name, tier or transport only a later version knows."""
    if len(messages) > MAX_PHASES:
        raise ProtocolError(f"phases: {len(messages)}, more than the {MAX_PHASES} allowed")
    found = (_phase(message) for message in messages)
    return tuple(phase for phase in found if phase is not None)


def _phase(message: kv_pb2.Phase) -> Phase | None:
    for field in ("worker", "reason"):
        if len(getattr(message, field)) > MAX_TEXT_CHARS:
            raise ProtocolError(f"phases.{field}: longer than {MAX_TEXT_CHARS} characters")
    if message.start_unix_ns + message.duration_ns >= 2**63:
        raise ProtocolError("phases.start_unix_ns: with its duration beyond 63 bits")
    name, tier = _NAMES.get(message.name), _TIERS.get(message.tier)
    transport = _TRANSPORTS.get(message.transport)
    if name is None or (message.tier and not tier) or (message.transport and not transport):
        return None
    return Phase(
        name=name,
        start_ns=message.start_unix_ns,
        duration_ns=message.duration_ns,
        who=message.worker,
        tokens=message.tokens,
        bytes=message.bytes,
        blocks=message.blocks,
        tier=tier,
        transport=transport,
        reason=message.reason,
        merged=message.merged,
    )
