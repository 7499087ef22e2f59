"""How a client connects, and how it wants its tokens sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import grpc

from pdserve.errors import ConfigError, InvalidRequest
from pdserve.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """None takes the model's default. The server checks every value."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None  # None: the client draws one
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool | None = None

    def to_proto(self, seed: int) -> inference_pb2.SamplingParams:
        """Raises InvalidRequest for a value that protobuf cannot carry."""
        values = {name.name: getattr(self, name.name) for name in fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        try:
            return inference_pb2.SamplingParams(**{**given, "seed": seed})
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"sampling options: {error}") from error


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """``ca_file`` or ``tls`` speaks TLS, with that authority or the system's."""

    api_key: str = ""
    tls: bool = False
    ca_file: str = ""
    server_name: str = ""  # the certificate's name, where it is not the address's
    timeout_s: float = 600.0  # of one request, resumes included
    # How long the first answer of a request may be waited for while nobody can be reached.
    connect_timeout_s: float = 10.0
    max_message_bytes: int = 64 << 20

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: no TLS. Raises ConfigError for a file that cannot be read."""
        if not self.tls and not self.ca_file:
            return None
        try:
            root = Path(self.ca_file).read_bytes() if self.ca_file else None
        except OSError as error:
            raise ConfigError(f"ca_file {self.ca_file} cannot be read: {error}") from error
        return grpc.ssl_channel_credentials(root_certificates=root)

    def channel_options(self) -> list[tuple[str, int | str]]:
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # A router that restarts is found again quickly.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # What is tried again, and after which token, is decided here.
            ("grpc.enable_retries", 0),
        ]
        if self.server_name:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return options

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
