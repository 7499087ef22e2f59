"""The public gRPC front on a real socket: streams, errors, health, reflection, disconnects."""

from __future__ import annotations

import time

import grpc
import pytest
from fronts_world import CONTEXT, SERVED, World, running_world
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http_talk import post

from pdserve.config import RouterConfig
from pdserve.errors import NoWorker, Overloaded
from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc


@pytest.fixture
def channel(world: World):
    with grpc.insecure_channel(world.grpc) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.InferenceStub:
    return pb_grpc.InferenceStub(channel)


def ask(**fields) -> pb.GenerateRequest:
    sampling = fields.pop("sampling", {})
    fields.setdefault("text", "the dog")
    return pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **fields)


def test_streams_tokens_with_offsets_and_closes_with_usage(world: World, stub) -> None:
    chunks = list(stub.Generate(ask(sampling={"logprobs": 2, "prompt_logprobs": 0})))
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == "the quick brown fox"
    assert ids == [*world.ids("the quick brown fox"), world.dispatcher.eos]
    assert [chunk.offset for chunk in chunks] == list(range(len(ids)))
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [0] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    assert not any(chunk.HasField("usage") for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(world.ids("the dog")), len(ids))
    assert (usage.cached_tokens.device, usage.cached_tokens.host) == (2, 1)
    assert (usage.kv_transport, usage.kv_bytes_transferred) == ("shm", 1234)
    assert [len(chunk.logprobs[0].top) for chunk in chunks] == [2] * len(chunks)
    assert len(chunks[0].prompt_logprobs) == usage.prompt_tokens
    assert chunks[0].prompt_logprobs[0].ByteSize() == 0
    assert len({chunk.request_id for chunk in chunks}) == 1
    assert len({chunk.seed for chunk in chunks}) == 1


def test_both_fronts_make_the_same_job_of_the_same_request(world: World, stub) -> None:
    same = {"temperature": 0.5, "top_k": 7, "seed": 9, "min_tokens": 2, "stop_token_ids": [5]}
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="system", content="be brief"),
            pb.ChatMessage(role="user", content="hello"),
        ]
    )
    grpc_text = "".join(
        chunk.text
        for chunk in stub.Generate(
            pb.GenerateRequest(chat=chat, sampling=pb.SamplingParams(**same), cache_salt="s")
        )
    )
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    body = {"messages": messages, "cache_salt": "s", **same}
    reply = post(world.http, "/v1/chat/completions", body).json
    assert reply["choices"][0]["message"]["content"] == grpc_text
    one, two = world.dispatcher.jobs
    assert (one.prompt, one.sampling, one.salt) == (two.prompt, two.sampling, two.salt)
    assert one.salt != b""


def test_a_text_prompt_is_the_same_on_both_fronts(world: World, stub) -> None:
    list(stub.Generate(ask(sampling={"max_tokens": 5, "seed": 1})))
    post(world.http, "/v1/completions", {"prompt": "the dog", "max_tokens": 5, "seed": 1})
    one, two = world.dispatcher.jobs
    assert (one.prompt, one.sampling) == (two.prompt, two.sampling)


def test_defaults_fill_the_context(world: World, stub) -> None:
    list(stub.Generate(ask()))
    job = world.dispatcher.jobs[0]
    assert job.sampling.max_tokens == CONTEXT - len(job.prompt)
    assert job.sampling.temperature == 1.0
    assert job.sampling.stop_token_ids == (world.dispatcher.eos,)


def test_a_stop_string_is_named(world: World, stub) -> None:
    world.says("one two END three")
    chunks = list(stub.Generate(ask(sampling={"stop": ["END"]})))
    assert "".join(chunk.text for chunk in chunks) == "one two "
    assert chunks[-1].stop_string == "END"
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP


def test_a_resume_sends_only_what_is_new(world: World, stub) -> None:
    ids = world.ids("the quick brown fox")
    chunks = list(stub.Generate(ask(generated_token_ids=ids[:3], resume=True, request_id="r1")))
    assert chunks[0].offset == 3
    assert [t for c in chunks for t in c.token_ids] == [*ids[3:], world.dispatcher.eos]
    assert world.tokenizer.decode(ids[:3]) + "".join(c.text for c in chunks) == (
        "the quick brown fox"
    )
    job = world.dispatcher.jobs[0]
    assert (job.resume, job.generated, job.request_id) == (True, tuple(ids[:3]), "r1")


def test_errors_carry_code_and_trailers(world: World, stub) -> None:
    world.dispatcher.fail_after = {1: Overloaded("full", retry_after_s=2.5)}
    stream = stub.Generate(ask())
    assert next(stream).offset == 0
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    trailers = dict(caught.value.trailing_metadata())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers["pdserve-code"] == "overloaded"
    assert trailers["pdserve-retry-after-ms"] == "2500"


def test_a_bug_of_ours_tells_nothing(world: World, stub) -> None:
    world.dispatcher.script = lambda job: 1 // 0
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(ask()))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "division" not in caught.value.details()


def test_the_clients_deadline_is_the_jobs(world: World, stub) -> None:
    world.dispatcher.pause_s = 0.02
    world.says("the dog", end=False)
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(ask(), timeout=0.4))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.2 < world.dispatcher.jobs[0].deadline - start < 0.6
    assert world.idle(2.0)
    list(stub.Generate(ask(sampling={"max_tokens": 2})))
    default = world.dispatcher.jobs[1].deadline - time.monotonic()
    assert 590 < default <= 600


def test_a_client_that_hangs_up_cancels_its_job(world: World, stub) -> None:
    world.dispatcher.pause_s = 0.02
    stream = stub.Generate(ask())
    next(stream)
    stream.cancel()
    assert world.idle(2.0)
    assert world.dispatcher.cancelled == 1


def test_tokenize_and_model(world: World, stub) -> None:
    reply = stub.Tokenize(pb.TokenizeRequest(text="the dog"))
    assert list(reply.token_ids) == world.ids("the dog")
    assert reply.max_model_len == CONTEXT
    model = stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.max_model_len, model.block_size) == (SERVED, CONTEXT, 16)
    assert (model.dtype, model.numerics) == ("float32", "exact")
    assert model.fingerprint == bytes(range(32)).hex()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Tokenize(pb.TokenizeRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_before_any_worker_the_models_files_speak(world: World, stub) -> None:
    world.dispatcher.facts = None
    world.dispatcher.fail_after = {0: NoWorker("none")}
    model = stub.GetModel(pb.GetModelRequest())
    assert (model.max_model_len, model.block_size, model.numerics) == (CONTEXT, 0, "")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(ask(text="the dog " * CONTEXT)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(ask()))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    world.dispatcher.facts = type(world.dispatcher)(None, 400, 0).facts


def test_fields_of_newer_clients_are_ignored(world: World, channel) -> None:
    newer = ask(sampling={"max_tokens": 2}).SerializeToString() + b"\xfa\x3e\x03abc"
    method = channel.unary_stream(
        "/pdserve.v1.Inference/Generate", response_deserializer=pb.GenerateResponse.FromString
    )
    assert len(list(method(newer))) == 2


def test_too_long_a_message_is_refused(model_folder) -> None:
    with (
        running_world(model_folder, router=RouterConfig(max_body_bytes=10_000)) as small,
        grpc.insecure_channel(small.grpc) as channel,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(pb_grpc.InferenceStub(channel).Generate(ask(text="x" * 20_000)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_health_follows_readiness(world: World, channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING

    def status(service: str) -> int:
        return stub.Check(health_pb2.HealthCheckRequest(service=service)).status

    assert status("") == serving
    for ready in (False, True):
        world.dispatcher.is_ready = (ready, "not now")
        end = time.monotonic() + 3
        while (status("pdserve.v1.Inference") == serving) is not ready:
            assert time.monotonic() < end
            time.sleep(0.05)
    with pytest.raises(grpc.RpcError) as caught:
        status("no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_is_enough_to_call_the_service(world: World, channel) -> None:
    """A client without our stubs: finds the service, its messages, and calls it."""
    info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    request = reflection_pb2.ServerReflectionRequest
    listed = next(iter(info(iter([request(list_services="")]))))
    names = {service.name for service in listed.list_services_response.service}
    assert {"pdserve.v1.Inference", "grpc.health.v1.Health"} <= names
    found = next(iter(info(iter([request(file_containing_symbol="pdserve.v1.Inference")]))))
    pool = descriptor_pool.DescriptorPool()
    for raw in found.file_descriptor_response.file_descriptor_proto:
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(raw))
    method = pool.FindServiceByName("pdserve.v1.Inference").methods_by_name["Generate"]
    question = message_factory.GetMessageClass(method.input_type)(text="the dog")
    answer = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_stream(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    assert "".join(chunk.text for chunk in call(question)) == "the quick brown fox"
