"""Who calls: API keys and TLS of the public fronts.

load_keys(files) once at start -> KeyRing.principal(header) for each request

The ring keeps hashes, never the keys, and compares a presented key with every one of them in
constant time. A principal's name and salt are derived from the hash, so that they are the same
after a restart and on every router, and tell nothing about the key.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from pdserve.config import SecurityConfig
from pdserve.errors import ConfigError, Unauthenticated
from router.api import ANONYMOUS, Principal

MIN_KEY_CHARS = 8
MAX_KEY_CHARS = 512
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    principal: Principal


def _digest(key: str) -> bytes:
    return hashlib.sha256(b"pdserve-api-key\x00" + key.encode(errors="surrogateescape")).digest()


def _principal(digest: bytes) -> Principal:
    name = hashlib.sha256(b"name\x00" + digest).hexdigest()[:12]
    return Principal(f"key-{name}", hashlib.sha256(b"salt\x00" + digest).digest()[:16])


class KeyRing:
    """The keys that let callers in; without any, everybody is let in as ANONYMOUS."""

    def __init__(self, keys: Sequence[str]) -> None:
        digests = dict.fromkeys(_digest(key) for key in keys)
        self._entries = tuple(_Entry(digest, _principal(digest)) for digest in digests)

    def principal(self, header: str | None) -> Principal:
        """``header``: the value of ``authorization``. Raises Unauthenticated."""
        if not self._entries:
            return ANONYMOUS
        if header is None:
            raise Unauthenticated("an API key is needed: Authorization: Bearer KEY")
        if not header[: len(_SCHEME)].lower() == _SCHEME or len(header) > MAX_KEY_CHARS + 16:
            raise Unauthenticated("the authorization header is not of the form Bearer KEY")
        digest = _digest(header[len(_SCHEME) :].strip())
        found: Principal | None = None
        for entry in self._entries:  # all of them: the time tells nothing
            if hmac.compare_digest(entry.digest, digest):
                found = entry.principal
        if found is None:
            raise Unauthenticated("the API key is not known here")
        return found


def load_keys(files: Sequence[str]) -> KeyRing:
    """One key a line; empty lines and lines that start with # are skipped. Raises ConfigError."""
    keys: list[str] = []
    for name in files:
        try:
            lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the API key file {name} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        for at, key in enumerate(found, 1):
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"{name}: key {at} is not printable ASCII without spaces")
            if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
                raise ConfigError(
                    f"{name}: key {at} has {len(key)} characters, allowed are {MIN_KEY_CHARS} to "
                    f"{MAX_KEY_CHARS}"
                )
        if not found:
            raise ConfigError(f"the API key file {name} holds no key")
        keys.extend(found)
    return KeyRing(keys)


@dataclass(frozen=True, slots=True)
class Tls:
    """The fronts' certificate, for either kind of server."""

    http: ssl.SSLContext
    grpc: grpc.ServerCredentials


def load_tls(security: SecurityConfig) -> Tls | None:
    """None where no certificate is configured. Raises ConfigError."""
    if not security.tls_cert and not security.tls_key:
        return None
    if not security.tls_cert or not security.tls_key:
        raise ConfigError("security.tls_cert and security.tls_key: either both or none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    cert, key = Path(security.tls_cert).expanduser(), Path(security.tls_key).expanduser()
    try:
        context.load_cert_chain(cert, key)
        pair = (key.read_bytes(), cert.read_bytes())
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS certificate {cert} and key {key} cannot be used: {error}"
        ) from error
    return Tls(context, grpc.ssl_server_credentials([pair]))
