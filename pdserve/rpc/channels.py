"""Channels and servers of internal calls: who calls, TLS, keep-alive, limits, errors.

channel = make_channel(address, identity)     stub = DecodeStub(channel)
server = make_server(identity)                add_DecodeServicer_to_server(..., server)
port = bind(server, address, identity.tls)    await server.start()

Both ends ping a connection, so a peer that was unplugged or stopped is noticed within
PING_EVERY_MS + PING_TIMEOUT_MS even without traffic. Leases and heartbeats are shorter: they, not
the pings, bound the life of what a peer holds.
"""

from __future__ import annotations

import grpc
import grpc.aio

from pdserve.errors import ConfigError
from pdserve.rpc.auth import RoleInterceptor, TokenChannel
from pdserve.rpc.identity import POLICY, Identity, Policy
from pdserve.rpc.status import ErrorsToStatus, abort_with, from_rpc_error
from pdserve.rpc.tls import InternalTls

__all__ = [
    "ONE_CALL_S",
    "ErrorsToStatus",
    "abort_with",
    "bind",
    "from_rpc_error",
    "make_channel",
    "make_server",
]

MAX_MESSAGE_BYTES = 64 << 20
PING_EVERY_MS = 10_000
PING_TIMEOUT_MS = 5_000
CONNECT_S = 1.0
# A machine at its limit may take seconds to answer, and one call does not find another.
ONE_CALL_S = 5.0

# A caller holds a handful of streams, however many attempts they carry; a prefill worker has one
# per attempt.
MAX_STREAMS = 8192
MAX_METADATA_BYTES = 16 << 10

Options = list[tuple[str, int | str]]


def _shared_options(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ]


def make_channel(
    address: str,
    identity: Identity,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    connect_s: float = CONNECT_S,
) -> grpc.aio.Channel:
    """A channel to ``host:port``. Connects lazily; call from the loop that will use it.

    ``connect_s`` bounds one try to connect, the peer's first words included: short where another
    worker can be tried instead, as long as the call itself (ONE_CALL_S) where there is no other.
    """
    options: Options = [
        *_shared_options(max_message_bytes),
        # A restarted worker is found again quickly; the default back-off grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        # By its name a pause, in gRPC's core the least time that a try to connect is given, too.
        ("grpc.min_reconnect_backoff_ms", int(1000 * connect_s)),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Peers are in the same cluster: a proxy of the environment never applies to them.
        ("grpc.enable_http_proxy", 0),
        # The router decides what is tried again, and where.
        ("grpc.enable_retries", 0),
        # Two channels to one address share neither a connection nor its back-off.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if identity.tls is None:
        return TokenChannel(grpc.aio.insecure_channel(address, options=options), identity)
    credentials = identity.tls.channel_credentials()
    options.append(("grpc.ssl_target_name_override", identity.tls.name))
    return TokenChannel(grpc.aio.secure_channel(address, credentials, options=options), identity)


def make_server(
    identity: Identity,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    policy: Policy = POLICY,
) -> grpc.aio.Server:
    """A server that admits the policy's roles and lets handlers raise PdserveError; not bound."""
    options: Options = [
        *_shared_options(max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_EVERY_MS // 2),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_EVERY_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        # Two servers on one port would each get some of the calls.
        ("grpc.so_reuseport", 0),
    ]
    return grpc.aio.server(
        interceptors=(RoleInterceptor(identity, policy), ErrorsToStatus()), options=options
    )


def bind(server: grpc.aio.Server, address: str, tls: InternalTls | None = None) -> int:
    """Binds ``host:port`` (port 0 picks one) and returns the port. ConfigError if it is taken."""
    try:
        if tls is None:
            port = int(server.add_insecure_port(address))
        else:
            port = int(server.add_secure_port(address, tls.server_credentials()))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: in use, or not ours to bind") from error
    if port == 0:
        raise ConfigError(f"cannot listen on {address}: in use, or not ours to bind")
    return port
