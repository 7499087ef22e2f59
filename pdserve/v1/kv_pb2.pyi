from pdserve.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineSampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens", "stop_token_ids", "logprobs", "prompt_logprobs", "seed")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    prompt_logprobs: int
    seed: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class AttemptTokens(_message.Message):
    __slots__ = ("token_ids", "prompt_len", "key_root", "block_keys", "bypass_cache")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    KEY_ROOT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    BYPASS_CACHE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_len: int
    key_root: bytes
    block_keys: bytes
    bypass_cache: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., prompt_len: _Optional[int] = ..., key_root: _Optional[bytes] = ..., block_keys: _Optional[bytes] = ..., bypass_cache: _Optional[bool] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("attempt_id", "request_id", "tokens", "sampling", "remaining_ms", "expected_incarnation", "decode_incarnation", "layout_fingerprint", "priority", "protocol_version")
    ATTEMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    attempt_id: bytes
    request_id: str
    tokens: AttemptTokens
    sampling: EngineSampling
    remaining_ms: int
    expected_incarnation: bytes
    decode_incarnation: bytes
    layout_fingerprint: bytes
    priority: int
    protocol_version: int
    def __init__(self, attempt_id: _Optional[bytes] = ..., request_id: _Optional[str] = ..., tokens: _Optional[_Union[AttemptTokens, _Mapping]] = ..., sampling: _Optional[_Union[EngineSampling, _Mapping]] = ..., remaining_ms: _Optional[int] = ..., expected_incarnation: _Optional[bytes] = ..., decode_incarnation: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., priority: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("block_indices",)
    BLOCK_INDICES_FIELD_NUMBER: _ClassVar[int]
    block_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelPrefill(_message.Message):
    __slots__ = ("reason", "suspect_blocks")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    suspect_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reason: _Optional[str] = ..., suspect_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class KeepAlive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeToPrefill(_message.Message):
    __slots__ = ("start", "grant", "done", "cancel", "keep_alive")
    START_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    start: StartPrefill
    grant: Grant
    done: Done
    cancel: CancelPrefill
    keep_alive: KeepAlive
    def __init__(self, start: _Optional[_Union[StartPrefill, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., cancel: _Optional[_Union[CancelPrefill, _Mapping]] = ..., keep_alive: _Optional[_Union[KeepAlive, _Mapping]] = ...) -> None: ...

class KvEndpoint(_message.Message):
    __slots__ = ("incarnation", "layout_fingerprint", "num_blocks", "span_bytes", "host_id", "pid", "shm_fd", "tcp_address", "device_uuid", "cuda_ipc_handle", "cuda_ipc_offset", "transports")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SPAN_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SHM_FD_FIELD_NUMBER: _ClassVar[int]
    TCP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_HANDLE_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    layout_fingerprint: bytes
    num_blocks: int
    span_bytes: int
    host_id: str
    pid: int
    shm_fd: int
    tcp_address: str
    device_uuid: str
    cuda_ipc_handle: bytes
    cuda_ipc_offset: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, incarnation: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., span_bytes: _Optional[int] = ..., host_id: _Optional[str] = ..., pid: _Optional[int] = ..., shm_fd: _Optional[int] = ..., tcp_address: _Optional[str] = ..., device_uuid: _Optional[str] = ..., cuda_ipc_handle: _Optional[bytes] = ..., cuda_ipc_offset: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("endpoint", "queue_length")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    endpoint: KvEndpoint
    queue_length: int
    def __init__(self, endpoint: _Optional[_Union[KvEndpoint, _Mapping]] = ..., queue_length: _Optional[int] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockOffer(_message.Message):
    __slots__ = ("index", "block", "generation", "checksum")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    index: int
    block: int
    generation: int
    checksum: int
    def __init__(self, index: _Optional[int] = ..., block: _Optional[int] = ..., generation: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockOffer]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockOffer, _Mapping]]] = ...) -> None: ...

class Phase(_message.Message):
    __slots__ = ("name", "worker", "start_unix_ns", "duration_ns", "tokens", "bytes", "blocks", "tier", "transport", "reason", "merged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    worker: str
    start_unix_ns: int
    duration_ns: int
    tokens: int
    bytes: int
    blocks: int
    tier: str
    transport: str
    reason: str
    merged: int
    def __init__(self, name: _Optional[str] = ..., worker: _Optional[str] = ..., start_unix_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., tier: _Optional[str] = ..., transport: _Optional[str] = ..., reason: _Optional[str] = ..., merged: _Optional[int] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("first_token", "finish_reason", "cached_tokens", "chunks", "prompt_logprobs", "preemptions", "phases")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    first_token: TokenOut
    finish_reason: _inference_pb2.FinishReason
    cached_tokens: _inference_pb2.CachedTokens
    chunks: _containers.RepeatedCompositeFieldContainer[_inference_pb2.ChunkTiming]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprob]
    preemptions: int
    phases: _containers.RepeatedCompositeFieldContainer[Phase]
    def __init__(self, first_token: _Optional[_Union[TokenOut, _Mapping]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[_Union[_inference_pb2.CachedTokens, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[_inference_pb2.ChunkTiming, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprob, _Mapping]]] = ..., preemptions: _Optional[int] = ..., phases: _Optional[_Iterable[_Union[Phase, _Mapping]]] = ...) -> None: ...

class TokenOut(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: _inference_pb2.TokenLogprob
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[_Union[_inference_pb2.TokenLogprob, _Mapping]] = ...) -> None: ...

class PrefillToDecode(_message.Message):
    __slots__ = ("accepted", "started", "offer", "finished")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    started: Started
    offer: Offer
    finished: PrefillFinished
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., finished: _Optional[_Union[PrefillFinished, _Mapping]] = ...) -> None: ...
