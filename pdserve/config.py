"""Every setting of a pdserve cluster: name, default, allowed values and meaning, in one place.

The tree below is frozen after validation. What is found out at run time (ports that were picked,
the size of a pool, a model's length) is never written back here; it is a return value of whoever
found it out. Reading YAML, ``--set a.b=c`` and validation are in pdserve/config_load.py, which
walks these classes; docs/configuration.md is generated from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_MODEL = "smollm2-135m-instruct"


def opt(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A documented field. Bounds are inclusive; for a tuple they hold for each element."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


def section(cls: type[Any], doc: str) -> Any:
    return field(default_factory=cls, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    path: str = opt(
        DEFAULT_MODEL,
        "Folder with a Hugging Face model, a hub id, or the name of the embedded model.",
    )
    revision: str = opt("", "Hub revision; empty takes the default branch.")
    served_name: str = opt("", "Name that clients ask for; empty takes the last part of the path.")
    max_model_len: int = opt(
        0, "Tokens of prompt and answer together; 0 takes the model's own.", low=0
    )
    dtype: str = opt(
        "auto",
        "Type of weights and KV; auto is bfloat16 (fast), float32 (exact).",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
    )
    numerics: str = opt(
        "fast",
        "exact: float32 or wider, streams equal to one process; fast: bfloat16.",
        choices=("fast", "exact"),
    )
    quantization: str = opt(
        "none",
        "Linear layers' weights: int8 or int4, in groups of 32; embeddings keep the dtype, the "
        "output layer has 8 bits.",
        choices=("none", "int8", "int4"),
    )
    chat_template: str = opt("", "Jinja file that replaces the model's own chat template.")


@dataclass(frozen=True, slots=True)
class PoolsConfig:
    prefill: int = opt(1, "Prefill workers.", low=0, high=1024)
    decode: int = opt(1, "Decode workers.", low=0, high=1024)
    mixed: int = opt(0, "Workers that do both phases.", low=0, high=1024)
    prefill_max: int = opt(1024, "Most prefill workers.", low=0, high=1024)
    decode_max: int = opt(1024, "Most decode workers.", low=0, high=1024)
    mixed_max: int = opt(1024, "Most mixed workers.", low=0, high=1024)
    gpus_per_worker: int = opt(0, "GPUs of each worker; 0 runs on the CPU.", low=0, high=1)
    threads_per_worker: int = opt(
        0, "Compute threads of a CPU worker; 0 takes the host's cores.", low=0, high=1024
    )
    ray_address: str = opt("local", "Ray cluster to join; local starts one of our own.")
    restart_workers: bool = opt(True, "Ray restarts a worker that died.")
    ray_fault_tolerance: bool = opt(
        True, "With ray_address local: a control plane of Ray that died is started again."
    )
    prefill_min: int = opt(
        0,
        "Prefill workers that serving starts with, more come later; 0 waits for all. "
        "pdserve admin leaves as many.",
        low=0,
    )
    decode_min: int = opt(
        0,
        "Decode workers that serving starts with, more come later; 0 waits for all. "
        "pdserve admin leaves as many.",
        low=0,
    )
    mixed_min: int = opt(
        0,
        "Mixed workers that serving starts with, more come later; 0 waits for all. "
        "pdserve admin leaves as many.",
        low=0,
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    block_size: int = opt(16, "Tokens in a KV block.", low=1, high=1024)
    pool_blocks: int = opt(
        0, "KV blocks of each worker; 0 computes them from the memory at hand.", low=0
    )
    memory_fraction: float = opt(
        0.6, "Share of free memory that all workers of a host take.", low=0.01, high=0.95
    )
    pool_bytes_max: int = opt(2 * 2**30, "Largest computed pool of a CPU worker; bytes.", low=2**20)
    max_running: int = opt(128, "Sequences that one step decodes at most.", low=1, high=4096)
    max_waiting: int = opt(2048, "Sequences that one worker queues at most.", low=1)
    step_tokens: int = opt(
        512, "Tokens that one step computes at most; prompts are chunked to it.", low=1
    )
    prefill_chunk: int = opt(256, "Tokens of one prompt in one step at most.", low=1)
    attention: str = opt(
        "auto",
        "Attention over the pool; auto takes the fastest that this machine can run.",
        choices=("auto", "native", "gather"),
    )
    pin_threads: bool = opt(
        True,
        "A CPU worker that has a thread for each core keeps each to one of them (models whose "
        "layers run fused).",
    )
    share_weights: bool = opt(
        True,
        "CPU workers of a host keep weights that were packed for the native kernels in one file "
        "beside the models (model_cache), map it, and so hold one copy of them together.",
    )
    turn_ms: float = opt(
        100.0,
        "Where several CPU workers each use the same cores: how long one computes on while "
        "another waits, to the end of a layer. 0 leaves it to the system, which has them compute "
        "at once.",
        low=0,
        high=1000,
    )


@dataclass(frozen=True, slots=True)
class TransferConfig:
    transports: tuple[str, ...] = opt(
        ("cuda_ipc", "nccl", "shm", "tcp"),
        "Allowed transports, best first.",
        choices=("shm", "tcp", "cuda_ipc", "nccl"),
    )
    deadline_s: float = opt(10.0, "Longest one read of blocks may take.", low=0.1, high=600)
    lease_s: float = opt(
        15.0, "A prefill worker frees blocks whose peer said nothing for so long.", low=1, high=600
    )
    setup_timeout_s: float = opt(10.0, "Longest set-up of one connection.", low=0.1, high=600)
    max_message_bytes: int = opt(64 * 2**20, "Longest message of a transfer's wire.", low=2**16)


@dataclass(frozen=True, slots=True)
class HostTierConfig:
    bytes_max: int = opt(
        256 * 2**20, "Host memory for cached blocks of each worker; 0 turns it off.", low=0
    )


@dataclass(frozen=True, slots=True)
class RedisTierConfig:
    mode: str = opt(
        "local",
        "local starts a Redis server on a unix socket, url uses yours, off has none.",
        choices=("local", "url", "off"),
    )
    url: str = opt("", "redis://, rediss:// or unix:// address for mode url.")
    username: str = opt("", "ACL user for mode url; empty takes the URL's, or the default user.")
    password_file: str = opt("", "File with the password for mode url; empty takes the URL's.")
    ca_file: str = opt("", "PEM authority of a rediss:// server; empty takes the system's.")
    bytes_max: int = opt(512 * 2**20, "maxmemory of the local server.", low=2**20)
    value_bytes_max: int = opt(64 * 2**20, "Longest value that is stored.", low=2**10)
    expiry_s: int = opt(86400, "Entries expire after so long.", low=1)
    timeout_s: float = opt(0.1, "Base time-out of one batch.", low=0.001, high=60)
    bytes_per_second: int = opt(200 * 2**20, "Rate that a batch's time-out grows by.", low=2**10)
    batch_bytes: int = opt(4 * 2**20, "Longest batch.", low=2**10)
    breaker_failures: int = opt(5, "Failures in 10 s that open the breaker.", low=1)
    breaker_open_s: float = opt(5.0, "How long an open breaker stays open.", low=0.1)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    host: HostTierConfig = section(HostTierConfig, "Host memory tier.")
    redis: RedisTierConfig = section(RedisTierConfig, "Redis tier.")
    kv_events: bool = opt(True, "Workers publish KV events over ZMQ.")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    host: str = opt("127.0.0.1", "Address that the public fronts bind.")
    http_port: int = opt(8000, "Public HTTP port; 0 picks one.", low=0, high=65535)
    grpc_port: int = opt(50051, "Public gRPC port; 0 picks one.", low=0, high=65535)
    policy: str = opt(
        "prefix",
        "How workers are chosen.",
        choices=("round_robin", "least_loaded", "prefix"),
    )
    skip_handoff_tokens: int = opt(
        64,
        "With no more uncached prompt tokens on the decode worker, it reads them itself.",
        low=0,
    )
    prefix_load_weight: float = opt(
        1.0, "Policy prefix: waiting tokens that weigh as much as one cached token.", low=0
    )
    strict: bool = opt(
        False,
        "Refuse (503) what would run without a prefill worker; not ready while KV does not move, "
        "a tier never worked or KV events do not come.",
    )
    request_timeout_s: float = opt(600.0, "Default deadline of a request.", low=1)
    max_requests: int = opt(1024, "Requests in flight; more are refused (429).", low=1)
    max_connections: int = opt(
        4096, "HTTP connections at once; more are closed at once. Streams of one for gRPC.", low=1
    )
    max_body_bytes: int = opt(8 * 2**20, "Longest HTTP body or gRPC message.", low=1024)
    max_n: int = opt(16, "Largest n.", low=1, high=1024)
    max_prompts: int = opt(64, "Prompts in one completion request.", low=1)
    max_logprobs: int = opt(20, "Largest number of alternatives.", low=0, high=1000)
    max_stop_strings: int = opt(16, "Stop strings of one request.", low=0)
    sse_keep_alive_s: float = opt(
        10.0, "A comment is sent when a stream is silent so long.", low=0.1
    )
    attempts_prefill: int = opt(2, "Prefill attempts without progress.", low=1)
    attempts_decode: int = opt(3, "Decode attempts without progress.", low=1)
    recovery_share: float = opt(
        0.2, "Share of the running requests that may recover at once; more wait.", low=0.01, high=1
    )
    tokenizer_threads: int = opt(2, "Threads that tokenize and render templates.", low=1)


@dataclass(frozen=True, slots=True)
class TimersConfig:
    heartbeat_s: float = opt(1.0, "Interval of heartbeats.", low=0.05)
    dead_after_s: float = opt(5.0, "A silent worker is suspect after so long.", low=0.1)
    stuck_after_s: float = opt(30.0, "Work pending without an engine step: suspect.", low=1)
    kill_after_s: float = opt(30.0, "A suspect worker is killed after so long.", low=1)
    drain_s: float = opt(30.0, "Longest drain.", low=0)
    start_timeout_s: float = opt(300.0, "Longest start of a worker.", low=1)


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    api_key_files: tuple[str, ...] = opt(
        (), "Files with one API key a line; none lets everybody in."
    )
    tls_cert: str = opt("", "PEM certificate of the public fronts.")
    tls_key: str = opt("", "PEM key of the public fronts.")
    cluster_token_file: str = opt("", "Internal calls' token; empty mints one at start.")
    internal_ca: str = opt(
        "", "PEM authority of internal calls; with cert and key both ends must show a certificate."
    )
    internal_cert: str = opt("", "PEM certificate that every process shows to the others.")
    internal_key: str = opt("", "PEM key of internal_cert.")
    internal_name: str = opt(
        "pdserve.internal", "DNS name that every internal certificate carries."
    )
    hash_key_file: str = opt("", "Key of the block hashes; empty keeps one in the state folder.")


@dataclass(frozen=True, slots=True)
class AdminConfig:
    host: str = opt(
        "127.0.0.1", "Address that the admin service binds; another one needs mutual TLS."
    )
    port: int = opt(
        0, "Port of the admin service; 0 picks one, which pdserve admin finds.", low=0, high=65535
    )
    token_file: str = opt(
        "", "Secret of the admin service's callers; empty derives one from the cluster's token."
    )


@dataclass(frozen=True, slots=True)
class TestingConfig:
    faults: bool = opt(False, "Workers obey ArmFault (pdserve/faults.py).")
    transfer_relay: str = opt(
        "",
        "host:port that decode workers connect to in place of a transfer server; it is told the "
        "server's address in a first line.",
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: str = opt("info", "Log level.", choices=("debug", "info", "warning", "error"))
    json: bool = opt(False, "One JSON object a line.")


@dataclass(frozen=True, slots=True)
class TracesConfig:
    endpoint: str = opt(
        "", "OTLP collector, gRPC: http://host:4317, https:// for TLS; empty exports nothing."
    )
    ratio: float = opt(
        1.0,
        "Share of the traces that begin here and are exported; others follow their caller's word.",
        low=0,
        high=1,
    )
    queue: int = opt(
        512, "Ended requests that wait for export; more are dropped and counted.", low=1, high=65536
    )
    timeout_s: float = opt(10.0, "Longest export of one batch.", low=0.1, high=600)


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    timelines: int = opt(
        256, "Ended requests whose timeline GET /requests keeps.", low=0, high=65536
    )
    traces: TracesConfig = section(TracesConfig, "Export of traces; needs the extra [otel].")


@dataclass(frozen=True, slots=True)
class Config:
    name: str = opt("default", "The cluster's name on this machine.")
    state_dir: str = opt(
        "", "Folder for sockets, logs and secrets; empty is ~/.cache/pdserve/clusters/<name>."
    )
    model_cache: str = opt("", "Folder for converted models; empty is ~/.cache/pdserve/models.")
    model: ModelConfig = section(ModelConfig, "What is served.")
    pools: PoolsConfig = section(PoolsConfig, "How many workers of which role.")
    engine: EngineConfig = section(EngineConfig, "One worker's engine.")
    transfer: TransferConfig = section(TransferConfig, "The hand-off.")
    cache: CacheConfig = section(CacheConfig, "Tiers below the device pool.")
    router: RouterConfig = section(RouterConfig, "Fronts, limits and placement.")
    timers: TimersConfig = section(TimersConfig, "Liveness.")
    security: SecurityConfig = section(SecurityConfig, "Who may call.")
    admin: AdminConfig = section(AdminConfig, "Changes to a running cluster.")
    log: LogConfig = section(LogConfig, "Logging.")
    telemetry: TelemetryConfig = section(TelemetryConfig, "Timelines and traces.")
    testing: TestingConfig = section(TestingConfig, "For tests of the cluster itself.")
