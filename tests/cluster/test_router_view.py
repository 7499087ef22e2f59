"""The owner's calls to its router's front: keys, a certificate under any name, and plain errors."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdserve.cluster import router_view
from pdserve.cluster.router_view import Access
from pdserve.config import SecurityConfig
from pdserve.errors import ConfigError, WorkerLost
from tests.certificates import authority, issue, needs_openssl

KEY = "a-key-of-ours"


class Front(http.server.BaseHTTPRequestHandler):
    body = b'{"workers": [{"id": "a"}]}'

    def do_GET(self) -> None:
        allowed = self.headers.get("authorization") == f"Bearer {KEY}"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(self.body if allowed else b"{}")

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(body: bytes = Front.body, tls: tuple[Path, Path] | None = None) -> str:
        handler = type("Handler", (Front,), {"body": body})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_first_key_of_the_files_is_sent(serve: Callable[..., str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# a comment\n\n{KEY}\nanother-key\n")
    access = router_view.access_to(serve(), SecurityConfig(api_key_files=(str(keys),)))
    assert access.api_key == KEY
    assert router_view.workers(access) == [{"id": "a"}]
    with pytest.raises(WorkerLost, match="answered 401"):
        router_view.workers(Access(access.url))
    with pytest.raises(ConfigError, match="cannot be read"):
        router_view.first_api_key(SecurityConfig(api_key_files=("/no/such",)))


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"workers": 3}', b'{"workers": [1]}'])
def test_an_answer_of_another_kind_is_an_error(serve: Callable[..., str], body: bytes) -> None:
    with pytest.raises(WorkerLost, match="without a list of workers"):
        router_view.workers(Access(f"http://{serve(body)}", KEY))


@needs_openssl
def test_a_certificate_is_trusted_under_its_own_name_alone(
    serve: Callable[..., str], tmp_path: Path
) -> None:
    issuer = authority(tmp_path)
    ours = issue(issuer, tmp_path, "ours", "DNS:model.example,IP:10.1.2.3")
    other = issue(issuer, tmp_path, "other", "DNS:model.example")
    address = serve(tls=(ours.cert, ours.key))
    security = SecurityConfig(tls_cert=str(ours.cert), tls_key=str(ours.key))
    access = router_view.access_to(address, security)
    assert access.url.startswith("https://")
    # Neither the address nor the issuer matters: this very certificate is what is trusted.
    assert router_view.workers(Access(access.url, KEY, access.certificate)) == [{"id": "a"}]
    assert router_view.certificate_name(access) == "model.example"
    assert router_view.certificate_name(Access(f"http://{address}")) == ""
    with pytest.raises(WorkerLost, match="does not answer"):
        router_view.workers(Access(access.url, KEY, str(other.cert)))
    with pytest.raises(ConfigError, match="TLS certificate"):
        router_view.workers(Access(access.url, KEY, "/no/such.pem"))


def test_a_front_on_all_addresses_is_reached_on_loopback() -> None:
    assert router_view.local_address("0.0.0.0:8") == "127.0.0.1:8"
    assert router_view.local_address("[::]:8") == "[::1]:8"
    assert router_view.local_address("10.0.0.1:8") == "10.0.0.1:8"


def test_a_proxy_of_the_environment_is_not_asked(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert router_view.workers(Access(f"http://{serve()}", KEY)) == [{"id": "a"}]


def test_the_answer_is_json_of_the_route(serve: Callable[..., str]) -> None:
    status, body = router_view.get(Access(f"http://{serve()}", KEY), "/workers")
    assert (status, json.loads(body)) == (200, {"workers": [{"id": "a"}]})
