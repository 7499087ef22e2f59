"""What the router tells over its public HTTP front, as the owner of a cluster asks for it."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pdserve.config import SecurityConfig
from pdserve.errors import ConfigError, WorkerLost
from pdserve.types import WorkerId

_ANSWER_BYTES_MAX = 16 * 2**20
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Access:
    """How to call a front that this machine serves."""

    url: str  # scheme://host:port
    api_key: str = ""  # empty: none
    certificate: str = ""  # the front's own, PEM file; empty: plain HTTP


def local_address(listening: str) -> str:
    """``host:port`` to reach a server on this machine that listens there."""
    host, _, port = listening.rpartition(":")
    return f"{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}"


def first_api_key(security: SecurityConfig) -> str:
    """The key that the cluster's owner calls with; empty where none is needed."""
    for name in security.api_key_files:
        try:
            lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key file {name} cannot be read: {error}") from error
        for line in lines:
            if line.strip() and not line.startswith("#"):
                return line.strip()
    return ""


def access_to(http_address: str, security: SecurityConfig) -> Access:
    scheme = "https" if security.tls_cert else "http"
    url = f"{scheme}://{local_address(http_address)}"
    return Access(url, first_api_key(security), security.tls_cert)


def get(access: Access, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a GET. WorkerLost when the router cannot be reached."""
    request = urllib.request.Request(access.url + path)  # noqa: S310  (our own http or https)
    if access.api_key:
        request.add_header("authorization", f"Bearer {access.api_key}")
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls_context(access))
    )
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return int(answer.status), answer.read(_ANSWER_BYTES_MAX)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(_ANSWER_BYTES_MAX)
    except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
        raise WorkerLost(f"the router at {access.url} does not answer: {error}") from error


def certificate_name(access: Access) -> str:
    """A name that the front's certificate is made out to; empty without TLS.

    gRPC compares names even where the certificate itself is what is trusted.
    """
    context = tls_context(access)
    if context is None:
        return ""
    parts = urlsplit(access.url)
    address = (parts.hostname or "", parts.port or 443)
    try:
        with (
            socket.create_connection(address, _CONNECT_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            certificate: dict[str, Any] = dict(secure.getpeercert() or {})
    except OSError as error:
        raise WorkerLost(f"the router at {access.url} does not answer: {error}") from error
    names = [str(value) for _, value in certificate.get("subjectAltName", ())]
    subject = [value for part in certificate.get("subject", ()) for _, value in part]
    return (names or subject or [""])[0].removeprefix("*.")


def tls_context(access: Access) -> ssl.SSLContext | None:
    """Trusts the one certificate that we serve with, under whatever name it has."""
    if not access.certificate:
        return None
    try:
        context = ssl.create_default_context(cafile=access.certificate)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS certificate {access.certificate}: {error}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def states(access: Access) -> dict[WorkerId, str]:
    """What each worker's state is to the router. WorkerLost as ``workers``."""
    return {WorkerId(str(one.get("id"))): str(one.get("state")) for one in workers(access)}


def workers(access: Access) -> list[dict[str, Any]]:
    """The router's view of the workers. WorkerLost when it does not answer as it should."""
    data = _member(access, "/workers", "workers", "list of workers")
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise WorkerLost(f"GET {access.url}/workers answered without a list of workers")
    return data


def live(access: Access) -> dict[str, Any]:
    """What the live page shows of this moment. WorkerLost as ``workers``."""
    data = _member(access, "/live.json", "now", "snapshot")
    if not isinstance(data, dict):
        raise WorkerLost(f"GET {access.url}/live.json answered without a snapshot")
    return data


def _member(access: Access, path: str, name: str, what: str) -> object:
    status, body = get(access, path)
    try:
        found: object = json.loads(body)[name] if status == 200 else None
    except (ValueError, KeyError, TypeError):
        found = None
    if found is None:
        raise WorkerLost(f"GET {access.url}{path} answered {status} without a {what}")
    return found
