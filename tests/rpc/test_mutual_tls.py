"""Mutual TLS between processes of a cluster: who has no certificate of its authority stays out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from pdserve.config import SecurityConfig
from pdserve.config_load import load_config
from pdserve.errors import ConfigError, PermissionDenied, Unauthenticated, WorkerLost
from pdserve.rpc import channels
from pdserve.rpc.identity import Caller, mint
from pdserve.rpc.tls import InternalTls, internal_tls
from tests.certificates import Pair, authority, issue, needs_openssl

pytestmark = needs_openssl
TOKEN = "the-cluster's-token"
NAME = "pdserve.internal"
METHOD = "/pdserve.v1.Worker/Describe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Pair:
    return authority(folder)


@pytest.fixture(scope="module")
def tls(folder: Path, ca: Pair) -> InternalTls:
    mine = issue(ca, folder, "mine", f"DNS:{NAME}")
    return InternalTls(str(ca.cert), str(mine.cert), str(mine.key), NAME)


def serving(tls: InternalTls, story: Callable[[str], Awaitable[None]]) -> None:
    async def echo(request: bytes, context: object) -> bytes:
        return request

    async def main() -> None:
        server = channels.make_server(mint(TOKEN, Caller.DECODE, tls=tls))
        handler = grpc.unary_unary_rpc_method_handler(echo)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("pdserve.v1.Worker", {"Describe": handler}),)
        )
        port = channels.bind(server, "127.0.0.1:0", tls)
        await server.start()
        try:
            await story(f"127.0.0.1:{port}")
        finally:
            await server.stop(None)

    asyncio.run(main())


async def describe(
    address: str, tls: InternalTls | None, caller: Caller = Caller.ROUTER, token: str = TOKEN
) -> bytes:
    async with channels.make_channel(address, mint(token, caller, tls=tls)) as channel:
        try:
            answer: bytes = await channel.unary_unary(METHOD)(b"x", timeout=5)
        except grpc.aio.AioRpcError as error:
            raise channels.from_rpc_error(error) from error
        return answer


def test_a_certificate_and_a_credential_together_open_the_call(tls: InternalTls) -> None:
    async def story(address: str) -> None:
        assert await describe(address, tls) == b"x"
        # The certificate alone says that one belongs here, not as what.
        with pytest.raises(PermissionDenied):
            await describe(address, tls, Caller.PREFILL)
        with pytest.raises(Unauthenticated):
            await describe(address, tls, token="another")

    serving(tls, story)


def test_without_a_certificate_of_the_authority_nobody_gets_to_the_credential(
    tls: InternalTls, folder: Path
) -> None:
    other = authority(folder, "other")
    theirs = issue(other, folder, "theirs", f"DNS:{NAME}")
    trusted = Path(tls.ca).read_bytes()

    async def story(address: str) -> None:
        with pytest.raises(WorkerLost):
            await describe(address, None)
        foreign = replace(tls, cert=str(theirs.cert), key=str(theirs.key))
        with pytest.raises(WorkerLost):
            await describe(address, foreign)
        # It trusts the authority and shows nothing of its own.
        credentials = grpc.ssl_channel_credentials(trusted)
        options = [("grpc.ssl_target_name_override", NAME)]
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            metadata = (("authorization", mint(TOKEN, Caller.ROUTER).header(METHOD)),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(METHOD)(b"x", metadata=metadata, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    serving(tls, story)


def test_a_client_gives_its_credential_to_no_server_of_another_authority_or_name(
    tls: InternalTls, ca: Pair, folder: Path
) -> None:
    impostor_ca = authority(folder, "impostor-authority")
    impostor = issue(impostor_ca, folder, "impostor", f"DNS:{NAME}")
    renamed = issue(ca, folder, "renamed", "DNS:www.example.org")

    async def story(address: str) -> None:
        with pytest.raises(WorkerLost):
            await describe(address, tls)

    serving(InternalTls(str(ca.cert), str(impostor.cert), str(impostor.key), NAME), story)
    serving(InternalTls(str(ca.cert), str(renamed.cert), str(renamed.key), NAME), story)


def test_the_configuration_takes_all_three_files_or_none(tls: InternalTls) -> None:
    assert internal_tls(SecurityConfig()) is None
    files = {"internal_ca": tls.ca, "internal_cert": tls.cert, "internal_key": tls.key}
    texts = [f"security.{key}={value}" for key, value in files.items()]
    assert internal_tls(load_config(None, texts).security) == tls
    for count in (1, 2):
        with pytest.raises(ConfigError, match="internal_"):
            load_config(None, texts[:count])
    with pytest.raises(ConfigError, match="internal_name"):
        load_config(None, [*texts, "security.internal_name="])


@pytest.mark.parametrize("broken", ["ca", "cert", "key"])
def test_a_file_that_is_missing_or_no_pem_is_named(
    tls: InternalTls, broken: str, tmp_path: Path
) -> None:
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for path in (junk, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"security.internal_{broken}"):
            replace(tls, **{broken: str(path)}).server_credentials()
