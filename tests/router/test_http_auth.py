"""API keys and TLS on both fronts: who gets in, as whom, and what stays open to all."""

from __future__ import annotations

import ssl
import subprocess
import urllib.request

import grpc
import pytest
from fronts_world import running_world
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_talk import call, post

from pdserve.client import Client, ClientOptions
from pdserve.config import SecurityConfig
from pdserve.errors import ConfigError, Unauthenticated
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from router.api import ANONYMOUS
from router.auth import KeyRing, load_keys, load_tls

KEYS = ["first-secret-key", "second-secret-key"]
COMPLETE = "/v1/completions"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(model_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# tenants\n\n" + "\n".join(KEYS) + "\n")
    security = SecurityConfig(api_key_files=(str(file),))
    with running_world(model_folder, security=security) as world:
        world.says("the fox")
        yield world


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-secret-key"),
        bearer(""),
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "x"),
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
        bearer("x" * 2000),
        bearer("k\xe9y-that-is-not-ascii"),
    ],
    ids=lambda headers: str(headers)[:40],
)
def test_http_without_a_known_key_is_401(locked, headers) -> None:
    requests = [
        ("POST", COMPLETE, {"prompt": "x"}),
        ("POST", "/v1/chat/completions", {"messages": []}),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/detokenize", {"tokens": [5]}),
        ("GET", "/v1/models", None),
        ("GET", "/workers", None),
    ]
    for method, path, body in requests:
        reply = call(locked.http, method, path, body, headers)
        assert reply.status == 401, path
        assert reply.json["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEYS[0] not in reply.body.decode()
    assert locked.dispatcher.jobs == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version"])
def test_probes_need_no_key(locked, path: str) -> None:
    assert call(locked.http, "GET", path).status == 200


def test_keys_make_principals_that_never_share(locked) -> None:
    for key in KEYS:
        for salt in ("", "common"):
            body = {"prompt": "x", **({"cache_salt": salt} if salt else {})}
            assert post(locked.http, COMPLETE, body, bearer(key)).status == 200
    with grpc.insecure_channel(locked.grpc) as channel:
        request = pb.GenerateRequest(text="x", cache_salt="common")
        metadata = [("authorization", f"Bearer {KEYS[0]}")]
        list(pb_grpc.InferenceStub(channel).Generate(request, metadata=metadata))
    one, one_common, two, two_common, one_again = locked.dispatcher.jobs
    locked.dispatcher.jobs.clear()
    assert len({job.salt for job in (one, one_common, two, two_common)}) == 4
    assert one_again.salt == one_common.salt, "the same tenant and salt do share"
    assert one.principal == one_again.principal != two.principal
    assert all(key not in one.principal.name for key in KEYS)


def test_grpc_without_a_key_is_unauthenticated_but_health_answers(locked) -> None:
    with grpc.insecure_channel(locked.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for metadata in ([], [("authorization", "Bearer wrong-secret-key")]):
            for method, request in (
                (stub.Tokenize, pb.TokenizeRequest(text="x")),
                (stub.GetModel, pb.GetModelRequest()),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    method(request, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata))
            assert dict(caught.value.trailing_metadata())["pdserve-code"] == "invalid_api_key"
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert check.status == health_pb2.HealthCheckResponse.SERVING
    assert locked.dispatcher.jobs == []


def test_the_client_sends_its_key(locked) -> None:
    with Client(locked.grpc, ClientOptions(api_key=KEYS[1])) as client:
        assert client.generate("x").text == "the fox"
    locked.dispatcher.jobs.clear()
    with Client(locked.grpc) as client, pytest.raises(Unauthenticated):
        client.generate("x")


def test_without_keys_everybody_is_anonymous() -> None:
    ring = KeyRing([])
    assert ring.principal(None) == ring.principal("Bearer whatever") == ANONYMOUS


def test_principals_are_the_same_after_a_restart() -> None:
    header = f"Bearer {KEYS[0]}"
    assert KeyRing(KEYS).principal(header) == KeyRing(KEYS[::-1]).principal(header)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("", "holds no key"),
        ("# only a remark\n", "holds no key"),
        ("short\n", "5 characters"),
        ("with a space in it\n", "printable ASCII"),
        ("nön-ascii-key\n", "printable ASCII"),
    ],
)
def test_a_wrong_key_file_is_one_clear_error(tmp_path, content, says) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_keys([str(file)])


# ---- TLS ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return str(cert), str(key)


def test_both_fronts_speak_tls(model_folder, certificate) -> None:
    cert, key = certificate
    security = SecurityConfig(tls_cert=cert, tls_key=key)
    with running_world(model_folder, security=security) as world:
        world.says("the fox")
        context = ssl.create_default_context(cafile=cert)
        with urllib.request.urlopen(f"https://{world.http}/health", context=context) as reply:
            assert reply.status == 200
        with Client(world.grpc, ClientOptions(ca_file=cert)) as client:
            assert client.generate("x").text == "the fox"


@pytest.mark.parametrize("wrong", ["half", "missing", "swapped"])
def test_a_wrong_certificate_is_one_clear_error(certificate, wrong: str) -> None:
    cert, key = certificate
    security = {
        "half": SecurityConfig(tls_cert=cert),
        "missing": SecurityConfig(tls_cert="/no/such/file", tls_key=key),
        "swapped": SecurityConfig(tls_cert=key, tls_key=cert),
    }[wrong]
    with pytest.raises(ConfigError, match=r"tls_key|cannot be used"):
        load_tls(security)
