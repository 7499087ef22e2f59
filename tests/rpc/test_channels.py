"""Internal calls over real sockets: the token on all four kinds of call, and errors both ways."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import pytest

from pdserve.errors import (
    BY_CODE,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    PdserveError,
    ProtocolError,
    Unauthenticated,
    WorkerLost,
)
from pdserve.rpc import channels
from pdserve.rpc.identity import Caller, mint
from pdserve.rpc.status import INTERNAL_TEXT

TOKEN = "a-token"
UU, US, SU, SS = "/t.T/UnaryUnary", "/t.T/UnaryStream", "/t.T/StreamUnary", "/t.T/StreamStream"


class Service:
    """Echoes; fails with ``error`` after the first answer when one is set."""

    def __init__(self) -> None:
        self.calls = 0
        self.closed = asyncio.Event()
        self.error: Exception | None = None

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def unary_unary(self, request: bytes, context: object) -> bytes:
        self.calls += 1
        self._fail()
        return request

    async def unary_stream(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        self.calls += 1
        try:
            yield request
            self._fail()
            while request == b"forever":
                await asyncio.sleep(0.01)
                yield request
        finally:
            self.closed.set()

    async def stream_unary(self, requests: AsyncIterator[bytes], context: object) -> bytes:
        self.calls += 1
        self._fail()
        return b"".join([part async for part in requests])

    async def stream_stream(
        self, requests: AsyncIterator[bytes], context: object
    ) -> AsyncIterator[bytes]:
        self.calls += 1
        async for part in requests:
            yield part
            self._fail()

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "t.T",
            {
                "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary_unary),
                "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream),
                "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary),
                "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream_stream),
            },
        )


async def parts(*values: bytes) -> AsyncIterator[bytes]:
    for value in values:
        yield value


async def call(channel: grpc.aio.Channel, method: str) -> list[bytes]:
    """One call of the given kind with b"x" (streams: b"x", b"y"); all answers."""
    if method == UU:
        return [await channel.unary_unary(UU)(b"x", timeout=5)]
    if method == US:
        return [part async for part in channel.unary_stream(US)(b"x", timeout=5)]
    if method == SU:
        return [await channel.stream_unary(SU)(parts(b"x", b"y"), timeout=5)]
    return [part async for part in channel.stream_stream(SS)(parts(b"x", b"y"), timeout=5)]


POLICY = {method: frozenset({Caller.ROUTER}) for method in (UU, US, SU, SS)}
POLICY["/t.T/NoSuch"] = frozenset({Caller.ROUTER})
ME = mint(TOKEN, Caller.ROUTER, policy=POLICY)
ANSWERS = {UU: [b"x"], US: [b"x"], SU: [b"xy"], SS: [b"x", b"y"]}


def run(story: Callable[[Service, str], Awaitable[None]], max_message_bytes: int = 1 << 20) -> None:
    async def main() -> None:
        service = Service()
        server = channels.make_server(ME, max_message_bytes=max_message_bytes, policy=POLICY)
        server.add_generic_rpc_handlers((service.handlers(),))
        port = channels.bind(server, "127.0.0.1:0")
        await server.start()
        try:
            await story(service, f"127.0.0.1:{port}")
        finally:
            await server.stop(None)

    asyncio.run(main())


async def error_of(awaitable: Awaitable[object]) -> PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return channels.from_rpc_error(caught.value)


@pytest.mark.parametrize("method", [UU, US, SU, SS])
def test_the_right_token_opens_every_kind_of_call(method: str) -> None:
    async def story(service: Service, address: str) -> None:
        async with channels.make_channel(address, ME) as channel:
            assert await call(channel, method) == ANSWERS[method]

    run(story)


@pytest.mark.parametrize("method", [UU, US, SU, SS, "/t.T/NoSuchMethod"])
@pytest.mark.parametrize(
    "token",
    [
        TOKEN,
        mint("a-tokem", Caller.ROUTER, policy=POLICY).credentials["t.T"],
        ME.digests["t.T"][Caller.ROUTER],
        ME.credentials["t.T"] + "0",
        "",
        None,
    ],
)
def test_any_other_token_is_refused_before_the_handler_runs(method: str, token: str | None) -> None:
    """Nothing is written meanwhile: gRPC's own client puts the failure of a write that meets the
    end of its call over the status that it was given."""

    async def story(service: Service, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            opened = channel.stream_stream(method)(metadata=bearing(token), timeout=5)
            error = await error_of(opened.read())
        assert type(error) is Unauthenticated
        assert service.calls == 0

    run(story)


@pytest.mark.parametrize("method", [UU, US])
@pytest.mark.parametrize("token", [TOKEN, "", None])
def test_any_other_token_is_refused_with_the_request_at_hand(
    method: str, token: str | None
) -> None:
    async def story(service: Service, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            if method == UU:
                answer = channel.unary_unary(UU)(b"x", metadata=bearing(token), timeout=5)
            else:
                answer = channel.unary_stream(US)(b"x", metadata=bearing(token), timeout=5).read()
            error = await error_of(answer)
        assert type(error) is Unauthenticated
        assert service.calls == 0

    run(story)


def bearing(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def test_two_tokens_at_once_are_refused() -> None:
    async def story(service: Service, address: str) -> None:
        async with channels.make_channel(address, ME) as channel:
            wrong = (("authorization", "Bearer other"),)
            error = await error_of(channel.unary_unary(UU)(b"x", metadata=wrong, timeout=5))
        assert type(error) is Unauthenticated

    run(story)


@pytest.mark.parametrize("method", [UU, US, SU, SS])
def test_our_errors_keep_class_text_parameter_and_delay(method: str) -> None:
    async def story(service: Service, address: str) -> None:
        service.error = Overloaded("voll: 3 of 3, café", param="n", retry_after_s=1.25)
        async with channels.make_channel(address, ME) as channel:
            error = await error_of(call(channel, method))
        assert type(error) is Overloaded
        assert str(error) == "voll: 3 of 3, café"
        assert (error.param, error.retry_after_s) == ("n", 1.25)

    run(story)


def test_every_class_of_the_tree_survives_the_wire() -> None:
    async def story(service: Service, address: str) -> None:
        async with channels.make_channel(address, ME) as channel:
            for code, cls in BY_CODE.items():
                service.error = cls(f"text of {code}")
                error = await error_of(call(channel, UU))
                assert type(error) is cls
                assert str(error) == f"text of {code}"

    run(story)


@pytest.mark.parametrize("method", [UU, US, SU, SS])
def test_other_exceptions_tell_the_log_and_not_the_caller(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(service: Service, address: str) -> None:
        service.error = ValueError("a secret")
        async with channels.make_channel(address, ME) as channel:
            error = await error_of(call(channel, method))
        assert type(error) is InternalError
        assert str(error) == INTERNAL_TEXT

    with caplog.at_level(logging.ERROR, logger="pdserve.rpc.status"):
        run(story)
    (record,) = [record for record in caplog.records if record.name == "pdserve.rpc.status"]
    assert method in record.getMessage()
    assert record.exc_info is not None
    assert "a secret" in str(record.exc_info[1])


def test_a_very_long_text_still_arrives_as_the_error() -> None:
    async def story(service: Service, address: str) -> None:
        service.error = InvalidRequest("x" * 100_000)
        async with channels.make_channel(address, ME) as channel:
            error = await error_of(call(channel, UU))
        assert type(error) is InvalidRequest
        assert str(error).startswith("xxx")

    run(story)


def test_a_cancelled_stream_closes_the_handlers_generator() -> None:
    async def story(service: Service, address: str) -> None:
        async with channels.make_channel(address, ME) as channel:
            stream = channel.unary_stream(US)(b"forever")
            async for _ in stream:
                break
            assert not service.closed.is_set()
            stream.cancel()
            await asyncio.wait_for(service.closed.wait(), 5)
            assert service.closed.is_set()

    run(story)


def test_a_stream_that_nobody_reads_is_closed_with_its_channel() -> None:
    """The handler may be waiting to *send*: its generator is closed all the same."""

    async def story(service: Service, address: str) -> None:
        channel = channels.make_channel(address, ME)
        stream = channel.unary_stream(US)(b"forever")
        assert await stream.read() == b"forever"
        await asyncio.sleep(0.3)
        await channel.close(None)
        await asyncio.wait_for(service.closed.wait(), 5)

    run(story)


def test_what_grpc_itself_reports_is_mapped_by_its_status() -> None:
    async def story(service: Service, address: str) -> None:
        async with channels.make_channel(address, ME) as channel:
            missing = await error_of(channel.unary_unary("/t.T/NoSuch")(b"", timeout=5))
            assert type(missing) is ProtocolError
            large = await error_of(channel.unary_unary(UU)(b"x" * 100_000, timeout=5))
            assert type(large) is ProtocolError
            late = await error_of(channel.stream_unary(SU)(never(), timeout=0.1))
            assert type(late) is DeadlineExceeded
            stream = channel.unary_stream(US)(b"forever")
            await stream.read()
            stream.cancel()
            assert await stream.code() is grpc.StatusCode.CANCELLED
        rpc_error = grpc.aio.AioRpcError(
            grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), details="gone"
        )
        assert type(channels.from_rpc_error(rpc_error)) is Cancelled

    run(story, max_message_bytes=50_000)


async def never() -> AsyncIterator[bytes]:
    await asyncio.sleep(60)
    yield b""


def test_a_dead_address_is_a_lost_worker() -> None:
    async def main() -> None:
        server = channels.make_server(ME, policy=POLICY)
        port = channels.bind(server, "127.0.0.1:0")
        await server.stop(None)
        async with channels.make_channel(f"127.0.0.1:{port}", ME) as channel:
            error = await error_of(channel.unary_unary(UU)(b"x", timeout=20))
        assert type(error) is WorkerLost

    asyncio.run(main())


async def slowly(address: str, seconds: float) -> asyncio.Server:
    """In front of ``address``: what is said both ways, after a silence as of a busy machine."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        host, port = address.split(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        ends = (pump(reader, far_writer), pump(far_reader, writer))
        await asyncio.gather(*ends, return_exceptions=True)

    return await asyncio.start_server(meet, "127.0.0.1", 0)


@pytest.mark.parametrize(("connect_s", "reached"), [(0.5, False), (channels.ONE_CALL_S, True)])
def test_a_peer_that_is_slow_to_answer_is_waited_for_by_who_has_no_other(
    connect_s: float, reached: bool
) -> None:
    async def story(service: Service, address: str) -> None:
        async with await slowly(address, 1.5) as busy:
            front = "{}:{}".format(*busy.sockets[0].getsockname())
            async with channels.make_channel(front, ME, connect_s=connect_s) as channel:
                if reached:
                    assert await call(channel, UU) == ANSWERS[UU]
                else:
                    error = await error_of(channel.unary_unary(UU)(b"x", timeout=5))
                    assert type(error) is WorkerLost

    run(story)


def test_a_port_in_use_fails_clearly() -> None:
    async def story(service: Service, address: str) -> None:
        second = channels.make_server(ME, policy=POLICY)
        with pytest.raises(ConfigError, match=address):
            channels.bind(second, address)
        await second.stop(None)

    run(story)
