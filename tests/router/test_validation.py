"""Bad input, field by field, on both fronts: a typed error that names the field, quickly.

Each case is one field with one wrong value. Where protobuf cannot even carry the value, the case is
HTTP's alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fronts_world import CONTEXT, SERVED, World
from http_talk import Reply, post

from pdserve.v1 import inference_pb2 as pb
from pdserve.v1 import inference_pb2_grpc as pb_grpc
from router.openai_fields import NEUTRAL, READ, Kind

NAN, INF = float("nan"), float("inf")
VOCAB = 400
# field, value, may gRPC carry it
SAMPLING: list[tuple[str, Any, bool]] = [
    *[("temperature", v, True) for v in (-0.1, NAN, INF, -INF, 1e9)],
    *[("temperature", v, False) for v in ("hot", True, [1], {})],
    *[("top_p", v, True) for v in (0, -1, 1.5, NAN)],
    *[("top_p", v, False) for v in ("0.5", False)],
    *[("top_k", v, True) for v in (-2, -(2**31))],
    *[("top_k", v, False) for v in (1.5, "5", 2**40, True)],
    *[("min_p", v, True) for v in (-0.1, 1.1, NAN)],
    *[("presence_penalty", v, True) for v in (-2.1, 2.1, NAN)],
    *[("frequency_penalty", v, True) for v in (-3, 3, INF)],
    *[("repetition_penalty", v, True) for v in (0, -1, NAN, 1e6)],
    *[("max_tokens", v, True) for v in (0, CONTEXT + 1, 2**31)],
    *[("max_tokens", v, False) for v in (-1, 1.5, "5", True, 10**30, 1e400)],
    *[("min_tokens", v, True) for v in (CONTEXT + 1, 2**31)],
    *[("min_tokens", v, False) for v in (-1, "x")],
    *[("stop", v, True) for v in ([""], ["x"] * 17, ["y" * 1025])],
    *[("stop", v, False) for v in (5, [5], {}, [["a"]], "", ["\ud800"])],
    *[("stop_token_ids", v, True) for v in ([VOCAB], [2**32 - 1], [1] * 257)],
    *[("stop_token_ids", v, False) for v in ([-1], ["1"], 5, [True], [1.5])],
    *[("logit_bias", v, True) for v in ({5: NAN}, {5: 101}, {5: -INF}, {VOCAB: 1})],
    *[("logit_bias", v, False) for v in ({"x": 1}, {"-1": 1}, {"5": "1"}, [], {"5": 1, "05": 2})],
    ("logit_bias", dict.fromkeys(range(VOCAB), 1) | {2**31: 1}, True),
    *[("prompt_logprobs", v, True) for v in (21, 2**31)],
    *[("prompt_logprobs", v, False) for v in (-1, "1", True)],
    *[("seed", v, False) for v in (-1, 2**64, 1.5, "7", True)],
    *[("ignore_eos", v, False) for v in (1, "yes")],
    *[("include_stop_str_in_output", v, False) for v in (1, "yes")],
    *[("skip_special_tokens", v, False) for v in (0, "no")],
]
REQUEST: list[tuple[str, Any, bool]] = [
    *[("model", v, True) for v in ("gpt-4", "x" * 10_000)],
    *[("model", v, False) for v in (5, [])],
    *[("request_id", v, True) for v in ("a b", "\n", "é", "x" * 129)],
    *[("request_id", v, False) for v in (5, True)],
    *[("cache_salt", v, True) for v in ("s" * 513,)],
    *[("cache_salt", v, False) for v in (5, "\udfff")],
    *[("priority", v, True) for v in (-(2**31),)],
    *[("priority", v, False) for v in (2**31, "high", 1.5)],
    *[("generated_token_ids", v, True) for v in ([VOCAB], [5] * (CONTEXT + 1))],
    *[("generated_token_ids", v, False) for v in ([-1], "abc", [1.5])],
    *[("resume", v, False) for v in (1, "yes")],
]
BOTH = [(f, v) for f, v, both in SAMPLING + REQUEST if both]
ALL = [(f, v) for f, v, _ in SAMPLING + REQUEST]


def name(value: object) -> str:
    return ascii(value)[:24]


def complete(world: World, body: dict[str, Any]) -> Reply:
    # json.dumps writes NaN and Infinity as clients in Python do, and 10**30 in full.
    return post(world.http, "/v1/completions", json.dumps(body).encode())


def soon(limit_s: float, ask: Callable[[], Reply]) -> Reply:
    """The answer, which on an idle machine comes within the limit; a busy one gets more tries."""
    took = []
    for _ in range(8):
        start = time.monotonic()
        reply = ask()
        took.append(time.monotonic() - start)
        if took[-1] < limit_s:
            return reply
    raise AssertionError(f"each of these took more than {limit_s} s: {took}")


def generate(world: World, **fields: Any) -> grpc.RpcError | None:
    """The error that the request ends with."""
    sampling = {f: v for f, v in fields.items() if f in pb.SamplingParams.DESCRIPTOR.fields_by_name}
    rest = {f: v for f, v in fields.items() if f not in sampling}
    if not {"text", "token_ids", "chat"} & rest.keys():
        rest["text"] = "the dog"
    request = pb.GenerateRequest(sampling=pb.SamplingParams(**sampling), **rest)
    with grpc.insecure_channel(world.grpc) as channel:
        try:
            list(pb_grpc.InferenceStub(channel).Generate(request, timeout=10))
        except grpc.RpcError as error:
            return error
    return None


def trailer(error: grpc.RpcError, key: str) -> str | None:
    return dict(error.trailing_metadata()).get(key)


@pytest.mark.parametrize(("field", "value"), ALL, ids=name)
def test_http_names_the_field(world: World, field: str, value: Any) -> None:
    reply = soon(0.1, lambda: complete(world, {"prompt": "the dog", field: value}))
    error = reply.json["error"]
    assert reply.status == (404 if error["code"] == "model_not_found" else 400), error
    assert error["param"].startswith(field), error
    assert error["message"].startswith(field), error
    assert len(error["message"]) < 300
    assert world.dispatcher.jobs == []


@pytest.mark.parametrize(("field", "value"), BOTH, ids=name)
def test_grpc_names_the_field(world: World, field: str, value: Any) -> None:
    error = generate(world, **{field: value})
    assert error is not None, "accepted"
    code = trailer(error, "pdserve-code")
    expected = (
        grpc.StatusCode.NOT_FOUND if code == "model_not_found" else grpc.StatusCode.INVALID_ARGUMENT
    )
    assert error.code() is expected
    assert error.details().startswith(field)
    assert trailer(error, "pdserve-param").startswith(field)
    assert world.dispatcher.jobs == []
    # The other front says the same in the same words (floats are narrower in protobuf).
    json_value = {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
    http = complete(world, {"prompt": "the dog", field: json_value}).json["error"]
    assert http["code"] == code
    assert http["message"].split(":")[0] == error.details().split(":")[0]


PROMPTS: list[Any] = [
    None,
    "",
    [],
    [[]],
    [""],
    5,
    True,
    {},
    ["a", 5],
    [5, "a"],
    [[5], "a"],
    ["a", [5]],
    [5, -1],
    [VOCAB],
    [5, True],
    [[5, 1.5]],
    [None],
    "\ud800",
    ["ok", "\udc00 bad"],
    ["x"] * 65,
    [5] * CONTEXT,
    [5] * 100_000,
    "the dog " * CONTEXT,
    "x" * 1_000_000,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=name)
def test_http_refuses_bad_prompts(world: World, prompt: Any) -> None:
    reply = soon(0.2, lambda: complete(world, {"prompt": prompt}))
    assert reply.status == 400, reply.body[:200]
    assert reply.json["error"]["param"].startswith("prompt")
    assert world.dispatcher.jobs == []


def test_a_prompt_without_room_for_an_answer_names_the_figures(world: World) -> None:
    error = complete(world, {"prompt": [5] * CONTEXT}).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].count(str(CONTEXT)) == 2
    error = complete(world, {"prompt": [5] * 200, "max_tokens": 100}).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "max_tokens"
    for figure in ("200", "100", "300", str(CONTEXT), "56"):
        assert figure in error["message"]


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": ""},
        {"token_ids": pb.TokenIds()},
        {"token_ids": pb.TokenIds(ids=[VOCAB])},
        {"token_ids": pb.TokenIds(ids=[5] * CONTEXT)},
        {"text": "the dog " * CONTEXT},
        {"chat": pb.Chat()},
        {"chat": pb.Chat(messages=[pb.ChatMessage(role="king", content="x")])},
        {"chat": pb.Chat(messages=[pb.ChatMessage(role="", content="x")])},
        {"chat": pb.Chat(messages=[pb.ChatMessage(role="tool", content="x")])},
    ],
    ids=name,
)
def test_grpc_refuses_bad_prompts(world: World, prompt: dict[str, Any]) -> None:
    error = generate(world, **prompt)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailer(error, "pdserve-param").startswith(next(iter(prompt)))
    assert world.dispatcher.jobs == []


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        {},
        "hello",
        [5],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "king", "content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x", "colour": "red"}],
        [{"role": "user", "content": "x", "name": 5}],
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "the dog " * CONTEXT}],
    ],
    ids=name,
)
def test_http_refuses_malformed_chats(world: World, messages: Any) -> None:
    reply = post(world.http, "/v1/chat/completions", {"messages": messages})
    assert reply.status == 400, reply.body
    assert reply.json["error"]["param"].startswith("messages")
    assert world.dispatcher.jobs == []


CHAT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**9}, "n"),
    ({"n": "2"}, "n"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": "3"}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": CONTEXT}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 5}, "stream_options"),
    ({"stream_options": {"usage": True}}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"stream_options": {"continuous_usage_stats": "yes"}}, "stream_options"),
    ({"add_generation_prompt": "no"}, "add_generation_prompt"),
    ({"continue_final_message": 1}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
    ({"best_of": 2}, "best_of"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {}}, "guided_json"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"kv_transfer_params": {"host": "x"}}, "kv_transfer_params"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"generated_token_ids": [5], "n": 2}, "generated_token_ids"),
    ({"resume": True, "n": 2}, "resume"),
    ({"temprature": 1}, "temprature"),
    ({"quux": 1}, "quux"),
    ({"quux": None}, "quux"),
    ({"\ud800": 1}, "\ufffd"),
    ({"echo": True}, "echo"),
    ({"prompt": "x"}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_FIELDS, ids=name)
def test_chat_refuses_what_it_cannot_honour(world: World, fields: dict, param: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    reply = post(world.http, "/v1/chat/completions", body)
    assert reply.status == 400, reply.body
    if param.isascii():
        assert reply.json["error"]["param"].startswith(param), reply.json
    assert world.dispatcher.jobs == []


def test_an_unknown_field_names_the_nearest_one(world: World) -> None:
    error = complete(world, {"prompt": "x", "temprature": 1}).json["error"]
    assert "did you mean temperature?" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"parallel_tool_calls": True, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"tools": None, "tool_choice": "none", "functions": [], "response_format": None},
        {"response_format": {"type": "text"}, "modalities": ["text"], "guided_json": None},
        {"temperature": None, "max_tokens": None, "stop": None, "seed": None, "n": None},
        {"max_tokens": 5.0, "n": 1, "best_of": 1, "top_k": -1, "stop": []},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": None, "continuous_usage_stats": True}},
        {"logit_bias": {"5": 100, "6": -100}, "min_tokens": 3, "stop_token_ids": [7]},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"seed": 2**64 - 1, "priority": -5, "cache_salt": "x"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"model": SERVED},
        {"model": ""},
    ],
    ids=name,
)
def test_harmless_and_neutral_fields_are_accepted(world: World, fields: dict) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    reply = post(world.http, "/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    assert len(world.dispatcher.jobs) == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "x", "model": "y"}, "model"),
        ("/tokenize", {"prompt": "x", "texture": 1}, "texture"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ],
    ids=name,
)
def test_tokens_refuse_bad_input(world: World, path: str, body: dict, param: str) -> None:
    reply = post(world.http, path, body)
    assert reply.status in (400, 404)
    assert reply.json["error"]["param"].startswith(param)


def test_text_that_is_not_utf8_is_the_clients_error_on_grpc(world: World) -> None:
    """Field 2 (text) with bytes that are no UTF-8, and a message cut short."""
    for data in (b"\x12\x02\xff\xfe", b"\x12\x7fx", b"\xff\xff\xff"):
        with grpc.insecure_channel(world.grpc) as channel:
            method = channel.unary_stream("/pdserve.v1.Inference/Generate")
            with pytest.raises(grpc.RpcError) as caught:
                list(method(data, timeout=5))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert trailer(caught.value, "pdserve-code") == "invalid_request"


def test_bad_requests_change_nothing_for_others(world: World) -> None:
    body = {"prompt": "the dog", "max_tokens": 6, "seed": 3}
    before = complete(world, body).json["choices"]
    for field, value in ALL[::5]:
        complete(world, {**body, field: value})
    assert complete(world, body).json["choices"] == before
    assert len(world.dispatcher.jobs) == 2


STRANGE: list[Any] = [
    *(True, 0, -1, 1.5, 1e308, 10**25, NAN, "", "x", "\ud800", [], [[]], [None], {}, {"a": {}}),
]


@pytest.mark.parametrize("kind", list(Kind))
def test_no_value_of_any_field_is_a_fault_of_the_server(world: World, kind: Kind) -> None:
    """Every field there is with every kind of strange value, alone."""
    path = {Kind.CHAT: "/v1/chat/completions", Kind.COMPLETION: "/v1/completions"}[kind]
    base = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 2}
    base.pop("prompt" if kind is Kind.CHAT else "messages")
    names = sorted(READ[kind] | NEUTRAL.keys())
    assert len(names) > 50
    for field in names:
        for value in STRANGE:
            body = json.dumps({**base, field: value}).encode()
            reply = post(world.http, path, body)
            assert reply.status in (200, 400, 404), (field, value, reply.body)
            if reply.status != 200:
                assert reply.json["error"]["message"], (field, value)
