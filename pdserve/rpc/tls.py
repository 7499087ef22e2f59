"""Mutual TLS of internal calls: both ends show a certificate of the cluster's own authority.

Files are read when a channel or server is made, so a certificate that was replaced is used by the
next process that starts. Certificates all carry one name, since workers are reached by addresses
that nobody knows before they start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from pdserve.config import SecurityConfig
from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class InternalTls:
    """Paths of PEM files, and the DNS name that every certificate of the cluster carries."""

    ca: str
    cert: str
    key: str
    name: str

    def channel_credentials(self) -> grpc.ChannelCredentials:
        ca, cert, key = self._read()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Refuses, in the handshake, whoever shows no certificate of the authority."""
        ca, cert, key = self._read()
        return grpc.ssl_server_credentials(((key, cert),), ca, require_client_auth=True)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        return (
            _read_pem(self.ca, "security.internal_ca"),
            _read_pem(self.cert, "security.internal_cert"),
            _read_pem(self.key, "security.internal_key"),
        )


def internal_tls(config: SecurityConfig) -> InternalTls | None:
    """None where it is not configured."""
    if not config.internal_ca:
        return None
    return InternalTls(
        config.internal_ca, config.internal_cert, config.internal_key, config.internal_name
    )


def _read_pem(path: str, key: str) -> bytes:
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{key} = {path!r}: {error.strerror}", param=key) from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{key} = {path!r}: the file is not PEM", param=key)
    return data
