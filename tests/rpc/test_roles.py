"""Who may call which internal method: every method of the protocol with every role."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FileDescriptor

from pdserve.errors import ConfigError, PdserveError, PermissionDenied, Unauthenticated
from pdserve.rpc import channels
from pdserve.rpc.identity import (
    POLICY,
    Caller,
    Identity,
    identity_from_dict,
    identity_to_dict,
    mint,
    service_of,
)
from pdserve.rpc.tls import InternalTls
from pdserve.v1 import admin_pb2, inference_pb2, kv_pb2, worker_pb2

TOKEN = "the-cluster's-token"
SERVER = mint(TOKEN, Caller.DECODE)


def methods_of(file: FileDescriptor) -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for service in file.services_by_name.values()
        for method in service.methods
    ]


INTERNAL = [
    method for file in (kv_pb2, worker_pb2, admin_pb2) for method in methods_of(file.DESCRIPTOR)
]


def test_the_table_names_every_internal_method_and_no_other() -> None:
    assert sorted(POLICY) == sorted(INTERNAL)
    assert not set(POLICY) & set(methods_of(inference_pb2.DESCRIPTOR))
    assert all(POLICY.values())


async def try_call(address: str, method: str, header: str) -> PdserveError | None:
    """Opens the call as the header's owner; None when a handler was reached."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(method)(metadata=(("authorization", header),), timeout=5)
        await call.done_writing()
        try:
            async for _ in call:
                return None
        except grpc.aio.AioRpcError as error:
            return channels.from_rpc_error(error)
        return None


def with_server(story: Callable[[str], Awaitable[None]]) -> None:
    """A server that answers every method there is with one message."""

    async def answer(requests: object, context: object) -> object:
        yield b"reached"  # type: ignore[misc]

    class Everything(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.stream_stream_rpc_method_handler(answer)

    async def main() -> None:
        server = channels.make_server(SERVER)
        server.add_generic_rpc_handlers((Everything(),))
        port = channels.bind(server, "127.0.0.1:0")
        await server.start()
        try:
            await story(f"127.0.0.1:{port}")
        finally:
            await server.stop(None)

    asyncio.run(main())


def test_each_method_admits_its_roles_and_refuses_all_others() -> None:
    async def story(address: str) -> None:
        for method in INTERNAL:
            for caller in Caller:
                error = await try_call(address, method, mint(TOKEN, caller).header(method))
                if caller in POLICY[method]:
                    assert error is None, (method, caller)
                else:
                    assert type(error) is PermissionDenied, (method, caller)

    with_server(story)


def test_who_may_do_what_matters_is_written_out() -> None:
    """The table itself, said once more for the methods that would hurt."""
    for method, admitted in {
        "/pdserve.v1.Membership/SetWorkers": {Caller.SUPERVISOR},
        "/pdserve.v1.Decode/Session": {Caller.ROUTER},
        "/pdserve.v1.Prefill/Run": {Caller.DECODE},
        "/pdserve.v1.Worker/Flush": {Caller.SUPERVISOR, Caller.OPERATOR},
        "/pdserve.v1.Admin/RemoveWorker": {Caller.ADMIN},
        "/pdserve.v1.Logging/SetLevel": {Caller.SUPERVISOR, Caller.OPERATOR},
        "/pdserve.v1.Worker/ArmFault": {Caller.OPERATOR},
    }.items():
        assert POLICY[method] == admitted


def test_a_prefill_worker_cannot_say_who_the_workers_are() -> None:
    async def story(address: str) -> None:
        async with channels.make_channel(address, mint(TOKEN, Caller.PREFILL)) as channel:
            call = channel.unary_unary("/pdserve.v1.Membership/SetWorkers")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", timeout=5)
        assert type(channels.from_rpc_error(caught.value)) is PermissionDenied

    with_server(story)


def test_a_stranger_is_refused_on_every_method() -> None:
    strangers = {
        "nothing": "",
        "another cluster": mint("another token", Caller.OPERATOR).header(INTERNAL[0]),
        "the token itself": f"Bearer {TOKEN}",
        "a digest that every worker knows": "Bearer "
        + SERVER.digests["pdserve.v1.Worker"][Caller.OPERATOR],
        "the transfers' token": f"Bearer {SERVER.transfer_token}",
    }

    async def story(address: str) -> None:
        for method in [*INTERNAL, "/pdserve.v1.Worker/New", "/other.Service/Method"]:
            for name, header in strangers.items():
                error = await try_call(address, method, header)
                assert type(error) is Unauthenticated, (method, name)

    with_server(story)


def test_what_a_service_was_shown_opens_no_other_service() -> None:
    """A prefill worker hears the router's credential; it is of no use to it elsewhere."""

    async def story(address: str) -> None:
        heard = mint(TOKEN, Caller.ROUTER).header("/pdserve.v1.Worker/Watch")
        assert await try_call(address, "/pdserve.v1.Worker/Watch", heard) is None
        error = await try_call(address, "/pdserve.v1.Decode/Session", heard)
        assert type(error) is Unauthenticated

    with_server(story)


def test_a_method_that_the_table_lacks_is_refused_to_all() -> None:
    async def story(address: str) -> None:
        for caller in Caller:
            method = "/pdserve.v1.Worker/New"
            error = await try_call(address, method, mint(TOKEN, caller).header(method))
            assert type(error) is PermissionDenied

    with_server(story)


@pytest.mark.parametrize("caller", list(Caller))
def test_an_identity_holds_neither_the_token_nor_what_is_others(caller: Caller) -> None:
    mine = mint(TOKEN, caller)
    text = json.dumps(identity_to_dict(mine))
    assert TOKEN not in text
    for other in Caller:
        theirs = mint(TOKEN, other)
        for service, credential in theirs.credentials.items():
            assert (credential in text) == (other is caller), (other, service)
    shown = repr(mine)
    assert not any(secret in shown for secret in mine.credentials.values())
    assert not mine.transfer_token or mine.transfer_token not in shown


def test_only_those_who_move_blocks_can_take_part_in_transfers() -> None:
    tokens = {caller: mint(TOKEN, caller).transfer_token for caller in Caller}
    assert tokens[Caller.PREFILL] == tokens[Caller.DECODE] != ""
    assert {tokens[c] for c in (Caller.ROUTER, Caller.SUPERVISOR, Caller.OPERATOR)} == {""}


@pytest.mark.parametrize("tls", [None, InternalTls("ca", "cert", "key", "name")])
def test_an_identity_comes_back_from_json_whole(tls: InternalTls | None) -> None:
    mine = mint(TOKEN, Caller.ROUTER, tls=tls)
    again = identity_from_dict(json.loads(json.dumps(identity_to_dict(mine))))
    assert again == mine


def damaged() -> list[object]:
    good = identity_to_dict(mint(TOKEN, Caller.ROUTER))
    return [
        None,
        [],
        {},
        {**good, "caller": "king"},
        {**good, "credentials": {"s": 7}},
        {**good, "digests": {"s": {"king": "00"}}},
        {**good, "digests": {"s": 7}},
        {**good, "transfer_token": None},
        {**good, "tls": ["one"]},
        {**good, "tls": [1, 2, 3, 4]},
    ]


@pytest.mark.parametrize("data", damaged())
def test_a_damaged_identity_is_one_clear_error(data: object) -> None:
    with pytest.raises(ConfigError):
        identity_from_dict(data)


def test_an_empty_token_mints_nothing() -> None:
    with pytest.raises(ConfigError):
        mint("", Caller.ROUTER)


def test_every_credential_is_judged_against_its_own_service_only() -> None:
    mixed = dataclasses.replace(mint(TOKEN, Caller.ROUTER))
    assert isinstance(mixed, Identity)
    for method in INTERNAL:
        service = service_of(method)
        for other, credential in mixed.credentials.items():
            if other != service:
                with pytest.raises(Unauthenticated):
                    SERVER.judge(f"Bearer {credential}", method)
