"""What a worker says of itself: facts, model and load, to and from protobuf.

The same conventions as convert.py, through which these functions are imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pdserve.errors import ProtocolError
from pdserve.types import (
    ID_BYTES,
    Duty,
    Fingerprint,
    Incarnation,
    Load,
    ModelFacts,
    Numerics,
    Reach,
    Role,
    TierBlocks,
    TierReach,
    WorkerFacts,
    WorkerId,
)
from pdserve.v1 import worker_pb2

FINGERPRINT_BYTES = 32

_ROLE_TO: Mapping[Role, worker_pb2.WorkerRole] = {
    Role.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    Role.DECODE: worker_pb2.WORKER_ROLE_DECODE,
    Role.MIXED: worker_pb2.WORKER_ROLE_MIXED,
}
_ROLE_FROM: Mapping[int, Role] = {number: role for role, number in _ROLE_TO.items()}
_REACH_TO: Mapping[Reach, worker_pb2.TierReach] = {
    Reach.OFF: worker_pb2.TIER_REACH_OFF,
    Reach.UNTRIED: worker_pb2.TIER_REACH_UNTRIED,
    Reach.NEVER: worker_pb2.TIER_REACH_NEVER,
    Reach.REACHED: worker_pb2.TIER_REACH_REACHED,
}
_REACH_FROM: Mapping[int, Reach] = {number: reach for reach, number in _REACH_TO.items()}
_NUMERICS: Mapping[str, Numerics] = {numerics.value: numerics for numerics in Numerics}


def model_facts_to_proto(model: ModelFacts) -> worker_pb2.ModelInfo:
    return worker_pb2.ModelInfo(
        path=model.path,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        block_size=model.block_size,
        dtype=model.dtype,
        numerics=model.numerics.value,
        layout_fingerprint=model.fingerprint,
    )


def model_facts_from_proto(message: worker_pb2.ModelInfo) -> ModelFacts:
    for name in ("max_model_len", "vocab_size", "block_size"):
        if getattr(message, name) < 1:
            raise ProtocolError(f"model.{name}: 0 is not positive")
    if message.numerics not in _NUMERICS:
        raise ProtocolError(f"model.numerics: {message.numerics!r} is none of {list(_NUMERICS)}")
    if len(message.layout_fingerprint) != FINGERPRINT_BYTES:
        raise ProtocolError(
            f"model.layout_fingerprint: {len(message.layout_fingerprint)} bytes, "
            f"not {FINGERPRINT_BYTES}"
        )
    return ModelFacts(
        path=message.path,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        block_size=message.block_size,
        dtype=message.dtype,
        numerics=_NUMERICS[message.numerics],
        fingerprint=Fingerprint(message.layout_fingerprint),
    )


def worker_facts_to_proto(facts: WorkerFacts) -> worker_pb2.WorkerInfo:
    return worker_pb2.WorkerInfo(
        id=facts.id,
        incarnation=facts.incarnation,
        role=_ROLE_TO[facts.role],
        pid=facts.pid,
        node=facts.node,
        address=facts.address,
        model=model_facts_to_proto(facts.model),
        blocks_total=facts.blocks_total,
        kv_events_address=facts.kv_events_address,
        kv_replay_address=facts.kv_replay_address,
    )


def worker_facts_from_proto(message: worker_pb2.WorkerInfo) -> WorkerFacts:
    if not message.id:
        raise ProtocolError("worker.id: empty")
    role = role_from_proto(message.role, "worker.role")
    if not message.address:
        raise ProtocolError("worker.address: empty")
    return WorkerFacts(
        id=WorkerId(message.id),
        incarnation=_incarnation(message.incarnation, "worker.incarnation"),
        role=role,
        pid=message.pid,
        node=message.node,
        address=message.address,
        model=model_facts_from_proto(message.model),
        blocks_total=message.blocks_total,
        kv_events_address=message.kv_events_address,
        kv_replay_address=message.kv_replay_address,
    )


_DUTY_TO: Mapping[Duty, worker_pb2.WorkerDuty] = {
    Duty.SERVE: worker_pb2.WORKER_DUTY_SERVE,
    Duty.DRAIN: worker_pb2.WORKER_DUTY_DRAIN,
    Duty.LEAVE: worker_pb2.WORKER_DUTY_LEAVE,
}
_DUTY_FROM: Mapping[int, Duty] = {number: duty for duty, number in _DUTY_TO.items()}


def plan_to_proto(plan: Mapping[WorkerId, Duty]) -> list[worker_pb2.PlannedWorker]:
    return [worker_pb2.PlannedWorker(id=id_, duty=_DUTY_TO[duty]) for id_, duty in plan.items()]


def plan_from_proto(plan: Iterable[worker_pb2.PlannedWorker]) -> dict[WorkerId, Duty]:
    found: dict[WorkerId, Duty] = {}
    for worker in plan:
        if not worker.id or worker.id in found:
            raise ProtocolError(f"plan.id: {worker.id!r} is empty or occurs twice")
        if worker.duty not in _DUTY_FROM:
            raise ProtocolError(f"plan.duty: {worker.duty} is none that we know")
        found[WorkerId(worker.id)] = _DUTY_FROM[worker.duty]
    return found


def role_to_proto(role: Role) -> worker_pb2.WorkerRole:
    return _ROLE_TO[role]


def role_from_proto(number: int, name: str) -> Role:
    role = _ROLE_FROM.get(number)
    if role is None:
        raise ProtocolError(f"{name}: {number} is none that we know")
    return role


def heartbeat_to_proto(incarnation: Incarnation, load: Load) -> worker_pb2.Heartbeat:
    return worker_pb2.Heartbeat(
        incarnation=incarnation,
        engine_steps=load.engine_steps,
        work_pending=load.work_pending,
        running=load.running,
        waiting=load.waiting,
        blocks_used=load.blocks_used,
        blocks_cached=load.blocks_cached,
        blocks_total=load.blocks_total,
        draining=load.draining,
        waiting_tokens=load.waiting_tokens,
        degraded=load.degraded,
        host_blocks=load.tiers.host,
        host_blocks_total=load.tiers.host_total,
        redis_blocks_written=load.tiers.redis_written,
        redis_blocks_unsent=load.tiers.redis_unsent,
        redis_values_rejected=load.tiers.redis_rejected,
        host_reach=_REACH_TO[load.reach.host],
        redis_reach=_REACH_TO[load.reach.redis],
        late_events=load.late_events,
        late_kv_reads=load.late_kv_reads,
        turn_wait_s=load.turn_wait_s,
        turns_forced=load.turns_forced,
    )


def heartbeat_from_proto(message: worker_pb2.Heartbeat) -> tuple[Incarnation, Load]:
    return _incarnation(message.incarnation, "heartbeat.incarnation"), Load(
        running=message.running,
        waiting=message.waiting,
        waiting_tokens=message.waiting_tokens,
        blocks_used=message.blocks_used,
        blocks_cached=message.blocks_cached,
        blocks_total=message.blocks_total,
        engine_steps=message.engine_steps,
        work_pending=message.work_pending,
        draining=message.draining,
        degraded=message.degraded,
        tiers=TierBlocks(
            host=message.host_blocks,
            host_total=message.host_blocks_total,
            redis_written=message.redis_blocks_written,
            redis_unsent=message.redis_blocks_unsent,
            redis_rejected=message.redis_values_rejected,
        ),
        reach=TierReach(
            host=_reach(message.host_reach, "heartbeat.host_reach"),
            redis=_reach(message.redis_reach, "heartbeat.redis_reach"),
        ),
        late_events=message.late_events,
        late_kv_reads=message.late_kv_reads,
        turn_wait_s=message.turn_wait_s,
        turns_forced=message.turns_forced,
    )


def _reach(number: int, name: str) -> Reach:
    reach = _REACH_FROM.get(number)
    if reach is None:
        raise ProtocolError(f"{name}: {number} is none that we know")
    return reach


def _incarnation(raw: bytes, name: str) -> Incarnation:
    if len(raw) != ID_BYTES:
        raise ProtocolError(f"{name}: {len(raw)} bytes, not {ID_BYTES}")
    return Incarnation(raw)
