"""The nouns that every part of pdserve shares.

Ids are NewTypes so that a worker's id cannot be passed where a request's is meant. Everything here
is immutable and free of torch, ray and grpc: the router imports it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
# 16 random bytes each; compared by equality alone, never by order.
AttemptId = NewType("AttemptId", bytes)
Incarnation = NewType("Incarnation", bytes)
# 16 bytes: a keyed hash chained over the parent's key and the block's token ids.
BlockKey = NewType("BlockKey", bytes)
# 32 bytes: everything that must be equal for KV to be exchanged.
Fingerprint = NewType("Fingerprint", bytes)
TokenId = NewType("TokenId", int)

ID_BYTES = 16
PROTOCOL_VERSION = 1


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class WorkerState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SUSPECT = "suspect"
    DEAD = "dead"


class Duty(enum.Enum):
    """What the owner of a cluster wants of a worker; outlives its incarnations."""

    SERVE = "serve"
    DRAIN = "drain"  # no new work
    LEAVE = "leave"  # what still runs there goes on elsewhere


class Numerics(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


class Tier(enum.Enum):
    """Where a cached block was found, fastest first."""

    DEVICE = "device"
    HOST = "host"
    REDIS = "redis"


class Transport(enum.Enum):
    SHM = "shm"
    TCP = "tcp"
    CUDA_IPC = "cuda_ipc"
    NCCL = "nccl"


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Prompt tokens that were not computed, by the tier that held them."""

    device: int = 0
    host: int = 0
    redis: int = 0

    @property
    def total(self) -> int:
        return self.device + self.host + self.redis


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling of one sequence with every value resolved (see router/validation).

    ``stop_token_ids`` holds end-of-sequence ids as well, unless the client ignores them.
    ``logprobs`` / ``prompt_logprobs``: None is off, n reports n alternatives beside the token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int = 0  # 0 <= seed < 2**64


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOut:
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class ChunkTiming:
    """When one prefill chunk was computed and moved; seconds of the host's CLOCK_MONOTONIC."""

    first_token: int
    tokens: int
    compute_start: float
    compute_end: float
    first_byte: float = 0.0
    last_byte: float = 0.0


@dataclass(frozen=True, slots=True)
class AttemptTokens:
    """The tokens of one attempt and the keys of their full blocks."""

    token_ids: tuple[int, ...]  # prompt, then what was generated before this attempt
    prompt_len: int
    key_root: BlockKey
    block_keys: tuple[BlockKey, ...]  # one per full block of token_ids
    bypass_cache: bool = False

    @property
    def generated(self) -> int:
        """How many tokens were generated before this attempt."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a worker found out about the model that it loaded."""

    path: str
    max_model_len: int
    vocab_size: int
    block_size: int
    dtype: str
    numerics: Numerics
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker as the cluster knows it; equal incarnations are the same process and memory."""

    id: WorkerId
    incarnation: Incarnation
    role: Role
    pid: int
    node: str
    address: str
    model: ModelFacts
    blocks_total: int
    kv_events_address: str = ""
    kv_replay_address: str = ""


class Reach(enum.Enum):
    """Whether a worker's tier ever worked, since that worker started."""

    OFF = "off"  # not asked for
    UNTRIED = "untried"
    NEVER = "never"  # tried, or refused at start
    REACHED = "reached"  # a value was stored, or could have been, or was read


@dataclass(frozen=True, slots=True)
class TierReach:
    host: Reach = Reach.OFF
    redis: Reach = Reach.OFF


@dataclass(frozen=True, slots=True)
class TierBlocks:
    """What a worker's tiers below its device pool hold, and what they failed to, in blocks."""

    host: int = 0
    host_total: int = 0
    # Since the worker started.
    redis_written: int = 0  # what Redis dropped later is not known
    redis_unsent: int = 0  # that it was to get and, by a failure or for want of room, did not
    redis_rejected: int = 0  # values found there that were not what was asked for


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's own count of its work, from its last heartbeat."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    engine_steps: int = 0
    work_pending: bool = False
    draining: bool = False
    degraded: str = ""
    tiers: TierBlocks = TierBlocks()
    reach: TierReach = TierReach()
    late_events: int = 0  # of the engine, for attempts that were over: dropped
    # Returned to attempts that were over, or asked for after their blocks had gone to others.
    late_kv_reads: int = 0
    # Among engines on the same cores (engine.turn_ms): what its steps waited for others, and how
    # often nobody let it in and it computed all the same.
    turn_wait_s: float = 0.0
    turns_forced: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """How an answer was made."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: CachedTokens = field(default_factory=CachedTokens)
    prefill_worker: str = ""
    decode_worker: str = ""
    kv_bytes_transferred: int = 0
    kv_transport: str = ""
    kv_skipped_reason: str = ""
    preemptions: int = 0
    resumes: int = 0
    chunks: tuple[ChunkTiming, ...] = ()
