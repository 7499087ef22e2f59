from pdserve.v1 import inference_pb2 as _inference_pb2
from pdserve.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_MIXED: _ClassVar[WorkerRole]

class TierReach(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_REACH_OFF: _ClassVar[TierReach]
    TIER_REACH_UNTRIED: _ClassVar[TierReach]
    TIER_REACH_NEVER: _ClassVar[TierReach]
    TIER_REACH_REACHED: _ClassVar[TierReach]

class WorkerDuty(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_DUTY_UNSPECIFIED: _ClassVar[WorkerDuty]
    WORKER_DUTY_SERVE: _ClassVar[WorkerDuty]
    WORKER_DUTY_DRAIN: _ClassVar[WorkerDuty]
    WORKER_DUTY_LEAVE: _ClassVar[WorkerDuty]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_MIXED: WorkerRole
TIER_REACH_OFF: TierReach
TIER_REACH_UNTRIED: TierReach
TIER_REACH_NEVER: TierReach
TIER_REACH_REACHED: TierReach
WORKER_DUTY_UNSPECIFIED: WorkerDuty
WORKER_DUTY_SERVE: WorkerDuty
WORKER_DUTY_DRAIN: WorkerDuty
WORKER_DUTY_LEAVE: WorkerDuty

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("path", "max_model_len", "vocab_size", "block_size", "dtype", "numerics", "layout_fingerprint")
    PATH_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    path: str
    max_model_len: int
    vocab_size: int
    block_size: int
    dtype: str
    numerics: str
    layout_fingerprint: bytes
    def __init__(self, path: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., numerics: _Optional[str] = ..., layout_fingerprint: _Optional[bytes] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("id", "incarnation", "role", "pid", "node", "address", "model", "blocks_total", "kv_events_address", "kv_replay_address")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_REPLAY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: bytes
    role: WorkerRole
    pid: int
    node: str
    address: str
    model: ModelInfo
    blocks_total: int
    kv_events_address: str
    kv_replay_address: str
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., address: _Optional[str] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., blocks_total: _Optional[int] = ..., kv_events_address: _Optional[str] = ..., kv_replay_address: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("incarnation", "engine_steps", "work_pending", "running", "waiting", "blocks_used", "blocks_cached", "blocks_total", "draining", "waiting_tokens", "degraded", "host_blocks", "host_blocks_total", "redis_blocks_written", "host_reach", "redis_reach", "late_events", "late_kv_reads", "turn_wait_s", "turns_forced", "redis_blocks_unsent", "redis_values_rejected")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_STEPS_FIELD_NUMBER: _ClassVar[int]
    WORK_PENDING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REDIS_BLOCKS_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    HOST_REACH_FIELD_NUMBER: _ClassVar[int]
    REDIS_REACH_FIELD_NUMBER: _ClassVar[int]
    LATE_EVENTS_FIELD_NUMBER: _ClassVar[int]
    LATE_KV_READS_FIELD_NUMBER: _ClassVar[int]
    TURN_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TURNS_FORCED_FIELD_NUMBER: _ClassVar[int]
    REDIS_BLOCKS_UNSENT_FIELD_NUMBER: _ClassVar[int]
    REDIS_VALUES_REJECTED_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    engine_steps: int
    work_pending: bool
    running: int
    waiting: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
    draining: bool
    waiting_tokens: int
    degraded: str
    host_blocks: int
    host_blocks_total: int
    redis_blocks_written: int
    host_reach: TierReach
    redis_reach: TierReach
    late_events: int
    late_kv_reads: int
    turn_wait_s: float
    turns_forced: int
    redis_blocks_unsent: int
    redis_values_rejected: int
    def __init__(self, incarnation: _Optional[bytes] = ..., engine_steps: _Optional[int] = ..., work_pending: _Optional[bool] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., blocks_used: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_total: _Optional[int] = ..., draining: _Optional[bool] = ..., waiting_tokens: _Optional[int] = ..., degraded: _Optional[str] = ..., host_blocks: _Optional[int] = ..., host_blocks_total: _Optional[int] = ..., redis_blocks_written: _Optional[int] = ..., host_reach: _Optional[_Union[TierReach, str]] = ..., redis_reach: _Optional[_Union[TierReach, str]] = ..., late_events: _Optional[int] = ..., late_kv_reads: _Optional[int] = ..., turn_wait_s: _Optional[float] = ..., turns_forced: _Optional[int] = ..., redis_blocks_unsent: _Optional[int] = ..., redis_values_rejected: _Optional[int] = ...) -> None: ...

class CheckIdleRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckIdleResponse(_message.Message):
    __slots__ = ("idle", "violations", "blocks_free", "blocks_cached", "blocks_total")
    IDLE_FIELD_NUMBER: _ClassVar[int]
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    idle: bool
    violations: _containers.RepeatedScalarFieldContainer[str]
    blocks_free: int
    blocks_cached: int
    blocks_total: int
    def __init__(self, idle: _Optional[bool] = ..., violations: _Optional[_Iterable[str]] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_total: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("undo",)
    UNDO_FIELD_NUMBER: _ClassVar[int]
    undo: bool
    def __init__(self, undo: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class FlushedTier(_message.Message):
    __slots__ = ("tier", "blocks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    blocks: int
    def __init__(self, tier: _Optional[str] = ..., blocks: _Optional[int] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedCompositeFieldContainer[FlushedTier]
    def __init__(self, tiers: _Optional[_Iterable[_Union[FlushedTier, _Mapping]]] = ...) -> None: ...

class ArmFaultRequest(_message.Message):
    __slots__ = ("step", "action", "nth", "seconds")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    NTH_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    step: str
    action: str
    nth: int
    seconds: float
    def __init__(self, step: _Optional[str] = ..., action: _Optional[str] = ..., nth: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class ArmFaultResponse(_message.Message):
    __slots__ = ("fired",)
    FIRED_FIELD_NUMBER: _ClassVar[int]
    fired: int
    def __init__(self, fired: _Optional[int] = ...) -> None: ...

class StartAttempt(_message.Message):
    __slots__ = ("attempt_id", "request_id", "tokens", "sampling", "remaining_ms", "expected_incarnation", "priority", "prefill", "skip_reason")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    SKIP_REASON_FIELD_NUMBER: _ClassVar[int]
    attempt_id: bytes
    request_id: str
    tokens: _kv_pb2.AttemptTokens
    sampling: _kv_pb2.EngineSampling
    remaining_ms: int
    expected_incarnation: bytes
    priority: int
    prefill: PrefillPeer
    skip_reason: str
    def __init__(self, attempt_id: _Optional[bytes] = ..., request_id: _Optional[str] = ..., tokens: _Optional[_Union[_kv_pb2.AttemptTokens, _Mapping]] = ..., sampling: _Optional[_Union[_kv_pb2.EngineSampling, _Mapping]] = ..., remaining_ms: _Optional[int] = ..., expected_incarnation: _Optional[bytes] = ..., priority: _Optional[int] = ..., prefill: _Optional[_Union[PrefillPeer, _Mapping]] = ..., skip_reason: _Optional[str] = ...) -> None: ...

class PrefillPeer(_message.Message):
    __slots__ = ("worker_id", "address", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    incarnation: bytes
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class CancelAttempt(_message.Message):
    __slots__ = ("attempt_id",)
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    attempt_id: bytes
    def __init__(self, attempt_id: _Optional[bytes] = ...) -> None: ...

class PeerGone(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    def __init__(self, incarnation: _Optional[bytes] = ...) -> None: ...

class RouterToDecode(_message.Message):
    __slots__ = ("start", "cancel", "keep_alive", "peer_gone")
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    PEER_GONE_FIELD_NUMBER: _ClassVar[int]
    start: StartAttempt
    cancel: CancelAttempt
    keep_alive: _kv_pb2.KeepAlive
    peer_gone: PeerGone
    def __init__(self, start: _Optional[_Union[StartAttempt, _Mapping]] = ..., cancel: _Optional[_Union[CancelAttempt, _Mapping]] = ..., keep_alive: _Optional[_Union[_kv_pb2.KeepAlive, _Mapping]] = ..., peer_gone: _Optional[_Union[PeerGone, _Mapping]] = ...) -> None: ...

class AttemptFailure(_message.Message):
    __slots__ = ("code", "message", "retryable", "retry_after_ms", "suspect_worker")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_WORKER_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retryable: bool
    retry_after_ms: int
    suspect_worker: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ..., retry_after_ms: _Optional[int] = ..., suspect_worker: _Optional[str] = ...) -> None: ...

class AttemptFacts(_message.Message):
    __slots__ = ("cached_tokens", "prefill_worker", "kv_bytes_transferred", "kv_transport", "kv_skipped_reason", "preemptions", "chunks")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_TRANSFERRED_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    KV_SKIPPED_REASON_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: _inference_pb2.CachedTokens
    prefill_worker: str
    kv_bytes_transferred: int
    kv_transport: str
    kv_skipped_reason: str
    preemptions: int
    chunks: _containers.RepeatedCompositeFieldContainer[_inference_pb2.ChunkTiming]
    def __init__(self, cached_tokens: _Optional[_Union[_inference_pb2.CachedTokens, _Mapping]] = ..., prefill_worker: _Optional[str] = ..., kv_bytes_transferred: _Optional[int] = ..., kv_transport: _Optional[str] = ..., kv_skipped_reason: _Optional[str] = ..., preemptions: _Optional[int] = ..., chunks: _Optional[_Iterable[_Union[_inference_pb2.ChunkTiming, _Mapping]]] = ...) -> None: ...

class AttemptEvent(_message.Message):
    __slots__ = ("attempt_id", "offset", "tokens", "prompt_logprobs", "facts", "finish_reason", "failure", "phases")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    attempt_id: bytes
    offset: int
    tokens: _containers.RepeatedCompositeFieldContainer[_kv_pb2.TokenOut]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
    facts: AttemptFacts
    finish_reason: _inference_pb2.FinishReason
    failure: AttemptFailure
    phases: _containers.RepeatedCompositeFieldContainer[_kv_pb2.Phase]
    def __init__(self, attempt_id: _Optional[bytes] = ..., offset: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_kv_pb2.TokenOut, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ..., facts: _Optional[_Union[AttemptFacts, _Mapping]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., failure: _Optional[_Union[AttemptFailure, _Mapping]] = ..., phases: _Optional[_Iterable[_Union[_kv_pb2.Phase, _Mapping]]] = ...) -> None: ...

class DecodeToRouter(_message.Message):
    __slots__ = ("incarnation", "events")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    events: _containers.RepeatedCompositeFieldContainer[AttemptEvent]
    def __init__(self, incarnation: _Optional[bytes] = ..., events: _Optional[_Iterable[_Union[AttemptEvent, _Mapping]]] = ...) -> None: ...

class PlannedWorker(_message.Message):
    __slots__ = ("id", "duty")
    ID_FIELD_NUMBER: _ClassVar[int]
    DUTY_FIELD_NUMBER: _ClassVar[int]
    id: str
    duty: WorkerDuty
    def __init__(self, id: _Optional[str] = ..., duty: _Optional[_Union[WorkerDuty, str]] = ...) -> None: ...

class SetWorkersRequest(_message.Message):
    __slots__ = ("workers", "plan", "control_plane_away")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CONTROL_PLANE_AWAY_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    plan: _containers.RepeatedCompositeFieldContainer[PlannedWorker]
    control_plane_away: bool
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ..., plan: _Optional[_Iterable[_Union[PlannedWorker, _Mapping]]] = ..., control_plane_away: _Optional[bool] = ...) -> None: ...

class SetWorkersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InFlightRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerAttempts(_message.Message):
    __slots__ = ("id", "attempts")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    attempts: int
    def __init__(self, id: _Optional[str] = ..., attempts: _Optional[int] = ...) -> None: ...

class InFlightResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerAttempts]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerAttempts, _Mapping]]] = ...) -> None: ...
