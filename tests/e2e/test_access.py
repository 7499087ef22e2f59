"""Mutual TLS inside, API keys outside: all works, strangers stay out, two keys share no block."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from pdserve.cluster.supervisor import Cluster, start_cluster
from pdserve.config_load import load_config
from pdserve.rpc.identity import Caller, mint
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from pdserve.v1 import worker_pb2, worker_pb2_grpc
from tests.certificates import authority, issue, needs_openssl
from tests.e2e.clusters import BLOCK, Clusters, Variant, settings
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
    issue(authority(folder, "ca"), folder, "node", f"DNS:{NAME}")
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
        ],
        {"name": "locked", "state_dir": str(folder / "state")},
    )
    cluster = start_cluster(config, ray=clusters.ray)
    yield cluster
    cluster.stop(drain_s=0.5)


def ask(cluster: Cluster, key: str, prompt: tuple[int, ...]) -> pb.Usage:
    """The usage of a short answer; waits until the cluster is ready."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.SamplingParams(max_tokens=2, temperature=0)
    )
    with grpc.insecure_channel(cluster.addresses.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        chunks = list(stub.Generate(request, timeout=60, metadata=METADATA[key]))
    return chunks[-1].usage


def test_with_mutual_tls_everywhere_a_request_goes_the_whole_way(locked: Cluster) -> None:
    usage = ask(locked, KEYS[0], tuple(range(10, 10 + 3 * BLOCK)))
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
