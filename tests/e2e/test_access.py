"""Mutual TLS inside, API keys outside: all works, strangers stay out, two keys share no block."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from pdserve.cli import main as cli
from pdserve.cluster.admin_access import read_access
from pdserve.cluster.run_dir import ADMIN_FILE
from pdserve.cluster.supervisor import Cluster, start_cluster
from pdserve.config_load import load_config
from pdserve.rpc.identity import Caller, mint
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from tests.certificates import authority, issue, needs_openssl
from tests.e2e.clusters import BLOCK, Clusters, Running, Variant, settings
from tests.models import CONTEXT

pytestmark = [pytest.mark.cluster, needs_openssl]

NAME = "pdserve.internal"
TOKEN = secrets.token_hex(32)
KEYS = ("first-tenants-key", "second-tenants-key")
METADATA = {key: (("authorization", f"Bearer {key}"),) for key in KEYS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("access")
    (folder / "keys").write_text("\n".join(KEYS))
    (folder / "token").write_text(TOKEN)
    (folder / "admin-token").write_text(secrets.token_hex(32))
    for name, pair in (("ca", "node"), ("other-ca", "other")):
        issue(authority(folder, name), folder, pair, f"DNS:{NAME}")
    return folder


@pytest.fixture(scope="module")
def locked(clusters: Clusters, folder: Path) -> Iterator[Cluster]:
    clusters.stop()
    variant = Variant("llama", "shm", "roomy")
    config = load_config(
        None,
        [
            *settings(variant, CONTEXT, clusters.model("llama")),
            f"security.cluster_token_file={folder / 'token'}",
            f"security.api_key_files={folder / 'keys'}",
            f"security.internal_ca={folder / 'ca.pem'}",
            f"security.internal_cert={folder / 'node.pem'}",
            f"security.internal_key={folder / 'node.key'}",
            # An address that is not the owner's own: refused without mutual TLS.
            "admin.host=127.0.0.2",
            f"admin.token_file={folder / 'admin-token'}",
        ],
        {"name": "locked", "state_dir": str(folder / "state")},
    )
    running = Running(start_cluster(config, ray=clusters.ray), CONTEXT, api_key=KEYS[0])
    try:
        # A decode worker that is ready first would answer alone.
        running.wait_ready()
        yield running.cluster
    finally:
        running.stop()


def ask(cluster: Cluster, key: str, prompt: tuple[int, ...]) -> pb.Usage:
    """The usage of a short answer."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(max_tokens=2, temperature=0)
    )
    with grpc.insecure_channel(cluster.addresses.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        chunks = list(stub.Generate(request, timeout=60, metadata=METADATA[key]))
    return chunks[-1].usage


def test_with_mutual_tls_everywhere_a_request_goes_the_whole_way(locked: Cluster) -> None:
    # Not whole blocks alone: those may be in Redis before the decode worker looks there.
    usage = ask(locked, KEYS[0], tuple(range(10, 10 + 3 * BLOCK + 1)))
    assert usage.prefill_worker
    assert usage.decode_worker
    assert usage.kv_bytes_transferred > 0


def test_two_keys_share_no_block_and_one_key_does(locked: Cluster) -> None:
    prompt = tuple(range(100, 100 + 4 * BLOCK + 1))

    def cached(key: str) -> int:
        tokens = ask(locked, key, prompt).cached_tokens
        return int(tokens.device + tokens.host + tokens.redis)

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[0]) >= 4 * BLOCK
    assert cached(KEYS[1]) == 0, "the second key found what the first one left"
    assert cached(KEYS[1]) >= 4 * BLOCK


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer a-third-tenants-key"),)])
def test_without_a_key_there_is_no_answer(
    locked: Cluster, metadata: tuple[tuple[str, str], ...]
) -> None:
    with grpc.insecure_channel(locked.addresses.grpc) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(text="hi"), timeout=20, metadata=metadata
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def check_idle(address: str, folder: Path | None, caller: Caller) -> grpc.StatusCode:
    """What a worker answers to a caller, with or without a certificate."""
    method = "/pdserve.v1.Worker/CheckIdle"
    metadata = (("authorization", mint(TOKEN, caller).header(method)),)
    if folder is None:
        channel = grpc.insecure_channel(address)
    else:
        files = [(folder / name).read_bytes() for name in ("ca.pem", "node.key", "node.pem")]
        options = (("grpc.ssl_target_name_override", NAME),)
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
    with channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        try:
            stub.CheckIdle(worker_pb2.CheckIdleRequest(), timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_every_worker_asks_for_certificate_and_role(locked: Cluster, folder: Path) -> None:
    for facts in locked.workers():
        assert check_idle(facts.address, folder, Caller.OPERATOR) is grpc.StatusCode.OK
        for caller in (Caller.PREFILL, Caller.DECODE, Caller.ROUTER):
            code = check_idle(facts.address, folder, caller)
            assert code is grpc.StatusCode.PERMISSION_DENIED
        assert check_idle(facts.address, None, Caller.OPERATOR) is grpc.StatusCode.UNAVAILABLE


def test_no_process_but_the_owner_of_the_cluster_is_given_its_token(locked: Cluster) -> None:
    boot = (locked.run.boot_dir / "router.json").read_text()
    assert KEYS[0] not in boot
    assert TOKEN not in boot


# ---- the admin service, from elsewhere -----------------------------------------------------------


def admin(cluster: Cluster, folder: Path, token: str, pair: str, *words: str) -> int:
    """``pdserve admin`` of somebody who has these files and the address, and no other."""
    address = read_access(cluster.run.state_dir / ADMIN_FILE).address
    assert address.startswith("127.0.0.2:")
    arguments = ["admin", *words, "--address", address, "--token-file", str(folder / token)]
    if pair:
        arguments += ["--set", f"security.internal_ca={folder / 'ca.pem'}"]
        arguments += ["--set", f"security.internal_cert={folder / pair}.pem"]
        arguments += ["--set", f"security.internal_key={folder / pair}.key"]
    return cli.main(arguments)


def test_an_operator_elsewhere_needs_an_address_the_admins_secret_and_a_certificate(
    locked: Cluster, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert admin(locked, folder, "admin-token", "node", "pools") == 0
    assert "decode: 1 (0 to 1024)  decode-0" in capsys.readouterr().out
    assert admin(locked, folder, "admin-token", "node", "flush", "device", "host") == 0
    assert "decode-0: " in capsys.readouterr().out
    assert admin(locked, folder, "admin-token", "node", "drain", "decode-0") == 1
    assert "no other decode or mixed worker takes work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("token", "pair", "why"),
    [
        ("admin-token", "", "failed to connect"),
        ("admin-token", "other", "failed to connect"),
        ("token", "node", "needs a credential"),
    ],
    ids=["no certificate", "of another authority", "the cluster's token"],
)
def test_who_lacks_one_of_them_changes_nothing(
    locked: Cluster,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    token: str,
    pair: str,
    why: str,
) -> None:
    assert admin(locked, folder, token, pair, "flush", "device") == 1
    assert why in capsys.readouterr().err


def test_the_admins_secret_opens_nothing_else(locked: Cluster, folder: Path) -> None:
    access = read_access(folder / "admin-token")
    assert set(access.identity.credentials) == {"pdserve.v1.Admin"}
    assert access.address == ""
    arguments = ["admin", "pools", "--token-file", str(folder / "admin-token")]
    assert cli.main(arguments) == 2, "a secret has no address"
