"""The public gRPC front: Inference, and the standard health and reflection services.

bytes -> authenticate -> parse -> prepare -> stream of responses

Handlers raise PdserveError; the interceptor makes status, text and trailers of it. A job ends in
its call's own task, so a client that hangs up cancels its job at once. One that reads nothing holds
up its own call alone, and until the deadline only: then the job is over, and the status waits for
its reader.

A call above the limit of its connection is refused here, with a status that says so and when to
come back: gRPC's own limit makes a client wait without a word, so it lies well above.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.errors import ConfigError, DeadlineExceeded
from pdserve.rpc.channels import bind
from pdserve.rpc.status import ErrorsToStatus
from pdserve.telemetry.trace_context import TRACEPARENT, TRACESTATE, TraceContext, read_context
from pdserve.v1 import inference_pb2
from router import grpc_requests
from router.api import Principal
from router.auth import KeyRing, Tls
from router.service import Service
from router.stream_limit import StreamLimit

SERVICE = "pdserve.v1.Inference"
# A client may ask for a longer deadline than the default, but not for none at all.
MAX_DEADLINE_S = 7 * 86400.0
# The job itself ends at the deadline; a client that reads has got the reason by then.
GRACE_S = 0.5
MAX_METADATA_BYTES = 16 * 1024
# Streams of one connection that gRPC admits beyond our limit, for us to refuse; health and
# reflection have theirs among them.
SPARE_STREAMS = 4096


def _serialize(message: inference_pb2.GenerateResponse) -> bytes:
    return message.SerializeToString()


class InferenceHandlers:
    """The service's methods, from the bytes of a request on."""

    def __init__(self, service: Service, keys: KeyRing) -> None:
        self._service = service
        self._keys = keys
        self._streams = StreamLimit(service.config.max_connections)

    async def generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        with self._place(context):
            await self._generate(data, context)

    async def _generate(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """Writes the responses itself, so that a write that nobody reads ends as well."""
        deadline = time.monotonic() + self._remaining_s(context)
        with self._service.accepting():
            principal = self._principal(context)
            message = grpc_requests.parse(inference_pb2.GenerateRequest, data)
            raw = grpc_requests.raw_request(message)
            prepared = await self._service.prepare(raw, principal, deadline, _trace(context))
        job = prepared.jobs[0]
        try:
            async with asyncio.timeout(deadline - time.monotonic() + GRACE_S) as scope:
                async with contextlib.aclosing(self._service.stream(job, prepared.text)) as deltas:
                    async for delta in deltas:
                        await context.write(
                            grpc_requests.response(job.request_id, job.sampling.seed, delta)
                        )
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded("the deadline passed and the client did not read") from None

    async def tokenize(
        self, data: bytes, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        with self._place(context):
            self._principal(context)
            message = grpc_requests.parse(inference_pb2.TokenizeRequest, data)
            validator = self._service.validator
            ids = await validator.encode(grpc_requests.tokenize_prompt(message))
        return inference_pb2.TokenizeResponse(
            token_ids=ids, max_model_len=validator.limits().max_model_len
        )

    async def get_model(
        self, data: bytes, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetModelResponse:
        self._principal(context)
        grpc_requests.parse(inference_pb2.GetModelRequest, data)
        limits = self._service.validator.limits()
        return grpc_requests.model_response(
            self._service.tokens.model.name,
            limits.max_model_len,
            limits.vocab_size,
            self._service.dispatcher.model(),
        )

    @contextlib.contextmanager
    def _place(self, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """One of the places of the caller's connection, for as long as the call runs."""
        connection = context.peer()
        with self._service.accepting():
            self._streams.take(connection)
        try:
            yield
        finally:
            self._streams.give_back(connection)

    def _principal(self, context: grpc.aio.ServicerContext) -> Principal:
        for name, value in context.invocation_metadata() or ():
            if name == "authorization" and isinstance(value, str):
                return self._keys.principal(value)
        return self._keys.principal(None)

    def _remaining_s(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        if remaining is None:
            return self._service.config.request_timeout_s
        return min(float(remaining), MAX_DEADLINE_S)

    def generic(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate, response_serializer=_serialize
                ),
                "Tokenize": grpc.unary_unary_rpc_method_handler(
                    self.tokenize, response_serializer=_serialize
                ),
                "GetModel": grpc.unary_unary_rpc_method_handler(
                    self.get_model, response_serializer=_serialize
                ),
            },
        )


def _trace(context: grpc.aio.ServicerContext) -> TraceContext:
    metadata = context.invocation_metadata() or ()
    values = {
        name: [value for key, value in metadata if key == name and isinstance(value, str)]
        for name in (TRACEPARENT, TRACESTATE)
    }
    return read_context(values[TRACEPARENT], values[TRACESTATE])


class GrpcFront:
    """A listening server; ``address`` is host:port as it was bound."""

    def __init__(
        self, server: grpc.aio.Server, servicer: health.aio.HealthServicer, address: str
    ) -> None:
        self._server = server
        self._health = servicer
        self.address = address

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers for the Inference service."""
        states = health_pb2.HealthCheckResponse
        await self._health.set(SERVICE, states.SERVING if serving else states.NOT_SERVING)

    async def close(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_grpc(service: Service, keys: KeyRing, tls: Tls | None) -> GrpcFront:
    """Raises ConfigError if the address cannot be bound."""
    config = service.config
    server = grpc.aio.server(
        interceptors=(ErrorsToStatus(),),
        options=[
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", config.max_connections + SPARE_STREAMS),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
            # Clients may ping idle connections; proxies between us drop silent ones.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ],
    )
    server.add_generic_rpc_handlers((InferenceHandlers(service, keys).generic(),))
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    address = f"{config.host}:{config.grpc_port}"
    port = bind(server, address) if tls is None else _bind_secure(server, address, tls)
    await server.start()
    return GrpcFront(server, servicer, f"{config.host}:{port}")


def _bind_secure(server: grpc.aio.Server, address: str, tls: Tls) -> int:
    try:
        port = int(server.add_secure_port(address, tls.grpc))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: in use, or not ours to bind") from error
    if port == 0:
        raise ConfigError(f"cannot listen on {address}: in use, or not ours to bind")
    return port
