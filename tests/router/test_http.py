"""The OpenAI HTTP front on a real socket, with plain HTTP and with OpenAI's own client."""

from __future__ import annotations

import json
import socket
import time

import openai
import pytest
from fronts_world import CONTEXT, SERVED, World, running_world
from http_talk import call, chunks, events, post

from pdserve.config import RouterConfig
from pdserve.errors import NoWorker, Overloaded

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(module_world: World):
    with openai.OpenAI(
        base_url=f"{module_world.url}/v1", api_key="any", max_retries=0, timeout=20
    ) as made:
        yield made


# ---- OpenAI's client ----------------------------------------------------------------------------


def test_openai_client_chats(world: World, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=SERVED, messages=HELLO, temperature=0)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    made = answer.usage.pdserve
    assert made["cached_tokens"] == {"device": 2, "host": 1, "redis": 0}
    assert (made["prefill_worker"], made["decode_worker"]) == ("prefill-0", "decode-0")
    assert (made["kv_bytes_transferred"], made["kv_transport"]) == (1234, "shm")
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert list(world.dispatcher.jobs[0].prompt) == world.ids(rendered)


def test_openai_client_streams_a_chat_with_usage(world: World, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=SERVED, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    seen = list(stream)
    assert seen[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in seen if c.choices)
    assert text == "the quick brown fox"
    assert [c.choices[0].finish_reason for c in seen if c.choices][-1] == "stop"
    assert seen[-1].choices == []
    assert seen[-1].usage.completion_tokens == len(world.ids(text)) + 1
    assert all(c.usage is None for c in seen[:-1])
    assert len({c.id for c in seen}) == 1


def test_usage_comes_with_every_chunk_where_it_is_asked_for(
    world: World, client: openai.OpenAI
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model=SERVED, prompt="the dog", n=2, seed=1, max_tokens=4, stream=True,
        stream_options=options,
    )  # fmt: skip
    seen = list(stream)
    counts: dict[int, list[int]] = {0: [], 1: []}
    for chunk in seen[:-1]:
        assert chunk.usage.prompt_tokens == len(world.ids("the dog"))
        assert chunk.usage.total_tokens == (
            chunk.usage.prompt_tokens + chunk.usage.completion_tokens
        )
        counts[chunk.choices[0].index].append(chunk.usage.completion_tokens)
    for found in counts.values():
        assert found == sorted(found)
        assert found[0] >= 1
        assert found[-1] == 4
    assert seen[-1].usage.completion_tokens == 8


def test_without_the_usage_of_the_end_none_comes_with_chunks(
    world: World, client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model=SERVED, prompt="the dog", max_tokens=4, stream=True,
        stream_options={"continuous_usage_stats": True},
    )  # fmt: skip
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_openai_client_completes_lists_of_prompts_n_times(
    world: World, client: openai.OpenAI
) -> None:
    answer = client.completions.create(
        model=SERVED, prompt=["the dog", "a fox"], n=2, max_tokens=5, seed=7
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompts = [job.prompt for job in sorted(world.dispatcher.jobs, key=lambda j: j.request_id)]
    assert [list(prompt) for prompt in prompts] == [
        world.ids("the dog"),
        world.ids("the dog"),
        world.ids("a fox"),
        world.ids("a fox"),
    ]
    lengths = len(world.ids("the dog")) + len(world.ids("a fox"))
    assert answer.usage.prompt_tokens == lengths
    assert len(answer.usage.pdserve["choices"]) == 4


def test_openai_client_streams_several_choices(world: World, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=SERVED, prompt="the", n=3, max_tokens=4, seed=1, stream=True
    )
    texts: dict[int, str] = {}
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert set(texts.values()) == {"the quick brown fox"[: len(texts[0])]}
    assert set(texts) == {0, 1, 2}


def test_openai_client_reads_log_probabilities(world: World, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=SERVED, messages=HELLO, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert "".join(bytes(entry.bytes).decode() for entry in content[:-1]) == "the quick brown fox"
    assert content[0].logprob == -0.25
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
    text = client.completions.create(
        model=SERVED, prompt="the dog", logprobs=1, echo=True, max_tokens=3
    )
    listed = text.choices[0].logprobs
    assert listed.token_logprobs[0] is None
    count = len(world.ids("the dog")) + 3
    assert len(listed.tokens) == len(listed.token_logprobs) == len(listed.top_logprobs) == count
    assert "".join(listed.tokens) == text.choices[0].text
    assert listed.text_offset == [len("".join(listed.tokens[:at])) for at in range(count)]
    assert min(value for value in listed.token_logprobs[1:]) == -9999.0


def test_openai_client_gets_typed_errors(world: World, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=SERVED, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    world.dispatcher.fail_after = {0: Overloaded("full", retry_after_s=3)}
    with pytest.raises(openai.RateLimitError) as limited:
        client.chat.completions.create(model=SERVED, messages=HELLO)
    assert limited.value.response.headers["retry-after"] == "3"


def test_openai_client_sees_an_error_within_a_stream(world: World, client: openai.OpenAI) -> None:
    world.dispatcher.fail_after = {2: NoWorker("the last worker died")}
    stream = client.chat.completions.create(model=SERVED, messages=HELLO, stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="the last worker died"):
        read_into(seen, stream)
    assert "".join(seen) == world.tokenizer.decode(world.ids("the quick brown fox")[:2])


def read_into(texts: list[str], stream) -> None:
    for chunk in stream:
        texts.append(chunk.choices[0].delta.content or "")


def test_openai_client_lists_models(world: World, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [SERVED]
    assert client.models.retrieve(SERVED).max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# ---- streams on the wire ------------------------------------------------------------------------


def test_a_failed_stream_ends_with_an_error_and_no_done(world: World) -> None:
    world.dispatcher.fail_after = {1: NoWorker("gone")}
    reply = post(world.http, COMPLETE, {"prompt": "the", "stream": True})
    data = events(reply)
    assert json.loads(data[-1]) == {
        "error": {
            "message": "gone",
            "type": "service_unavailable",
            "param": None,
            "code": "no_worker",
        }
    }
    assert "[DONE]" not in data


def test_what_fails_before_the_first_token_has_its_own_status(world: World) -> None:
    world.dispatcher.fail_after = {0: NoWorker("none lives")}
    reply = post(world.http, COMPLETE, {"prompt": "the", "stream": True})
    assert reply.status == 503
    assert reply.json["error"]["code"] == "no_worker"


def test_a_silent_stream_is_kept_alive(world: World, model_folder) -> None:
    config = RouterConfig(sse_keep_alive_s=0.1)
    with running_world(model_folder, router=config) as slow:
        slow.says("the")
        slow.dispatcher.pause_s = 0.35
        reply = post(slow.http, COMPLETE, {"prompt": "the", "stream": True, "max_tokens": 2})
    assert reply.status == 200
    assert reply.body.startswith(b": keep-alive\n\n")
    assert reply.body.count(b": keep-alive") >= 4
    assert "".join(c["choices"][0]["text"] for c in chunks(reply)) == "the"


def test_stop_strings_end_the_job_and_the_text(world: World) -> None:
    world.says("one two three END of the list", end=False)
    world.dispatcher.pause_s = 0.002
    body = {"prompt": "x", "max_tokens": 100, "stop": ["END", "never"], "stream": True}
    streamed = chunks(post(world.http, COMPLETE, body))
    assert "".join(c["choices"][0]["text"] for c in streamed) == "one two three "
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
    assert streamed[-1]["choices"][0]["stop_reason"] == "END"
    assert world.idle()
    assert world.dispatcher.cancelled == 1, "the job ran on after its stop string"
    whole = post(
        world.http, COMPLETE, {**body, "stream": False, "include_stop_str_in_output": True}
    )
    assert whole.json["choices"][0]["text"] == "one two three END"
    assert whole.json["usage"]["completion_tokens"] < 20


def test_a_client_that_leaves_cancels_its_job(world: World) -> None:
    world.says("the dog " * 4, end=False)
    world.dispatcher.pause_s = 0.05
    host, port = world.http.split(":")
    for stream in (True, False):
        body = json.dumps({"prompt": "x", "max_tokens": 200, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
                + str(len(body)).encode()
                + b"\r\n\r\n"
                + body
            )
            time.sleep(0.3)
            assert world.dispatcher.open == 1
        assert world.idle(2.0)
    assert world.dispatcher.cancelled == 2


def test_a_resume_goes_on_with_the_next_character(world: World) -> None:
    text = "Grüße 東京 👍🏽 END"
    world.says(text)
    ids = world.ids(text)
    base = {"prompt": "x", "max_tokens": len(ids), "seed": 3, "return_token_ids": True}
    whole = post(world.http, COMPLETE, base).json["choices"][0]
    assert whole["text"] == text
    assert whole["token_ids"] == ids
    for cut in range(1, len(ids)):
        body = {**base, "max_tokens": len(ids), "stream": True}
        first = chunks(post(world.http, COMPLETE, {**body, "max_tokens": cut}))
        # A stream that was cut off after this token has shown no more than this:
        shown = post_prefix(world, body, cut)
        rest = post(world.http, COMPLETE, {**base, "generated_token_ids": ids[:cut]}).json
        assert shown + rest["choices"][0]["text"] == text, cut
        assert rest["choices"][0]["token_ids"] == ids[cut:]
        assert rest["usage"]["completion_tokens"] == len(ids)
        assert first[-1]["choices"][0]["finish_reason"] == "length"


def post_prefix(world: World, body: dict, cut: int) -> str:
    """The text of a stream whose workers die after ``cut`` tokens."""
    world.dispatcher.fail_after = {cut: NoWorker("gone")}
    data = events(post(world.http, COMPLETE, body))[:-1]
    return "".join(json.loads(item)["choices"][0]["text"] for item in data)


def test_a_resume_after_a_stop_string_ends_at_once(world: World) -> None:
    ids = world.ids("one END two")
    body = {"prompt": "x", "stop": "END", "generated_token_ids": ids, "max_tokens": 50}
    reply = post(world.http, COMPLETE, body).json
    assert reply["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": "END",
    }
    assert world.dispatcher.jobs == []


# ---- the rest of the front ----------------------------------------------------------------------


def test_tokens_and_back(world: World) -> None:
    reply = post(
        world.http, "/tokenize", {"prompt": "the 東京 dog", "return_token_strs": True}
    ).json
    assert reply["tokens"] == world.ids("the 東京 dog")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == CONTEXT
    back = post(world.http, "/detokenize", {"tokens": reply["tokens"]}).json
    assert back == {"prompt": "the 東京 dog"}
    chat = post(world.http, "/tokenize", {"messages": HELLO}).json
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat["tokens"] == world.ids(rendered)


def test_state_endpoints(world: World) -> None:
    assert call(world.http, "GET", "/health").status == 200
    assert call(world.http, "GET", "/version").json["version"]
    assert call(world.http, "GET", "/ready").status == 200
    world.dispatcher.is_ready = (False, "no worker has joined")
    reply = call(world.http, "GET", "/ready")
    assert reply.status == 503
    assert "no worker has joined" in reply.json["error"]["message"]
    assert call(world.http, "GET", "/workers").json == {
        "workers": [
            {
                "id": "decode-0",
                "incarnation": bytes(range(16)).hex(),
                "role": "decode",
                "pid": 4711,
                "node": "here",
                "address": "127.0.0.1:4000",
                "state": "ready",
                "blocks": {"used": 5, "cached": 7, "total": 64},
                "running": 2,
                "waiting": 1,
                "degraded": "",
                "late_events": 3,
                "late_kv_reads": 1,
                "turn_wait_s": 0.5,
                "turns_forced": 2,
                "redis_unsent": 4,
                "redis_rejected": 6,
            }
        ]
    }


def test_request_ids_are_taken_and_given_back(world: World) -> None:
    reply = post(world.http, COMPLETE, {"prompt": "x"}, {"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    assert reply.json["id"] == "cmpl-abc-1"
    assert world.dispatcher.jobs[0].request_id == "abc-1"
    streamed = post(world.http, COMPLETE, {"prompt": "x", "stream": True}, {"x-request-id": "b"})
    assert streamed.headers["x-request-id"] == "b"
    failed = post(world.http, COMPLETE, {"prompt": ""}, {"x-request-id": "c"})
    assert (failed.status, failed.headers["x-request-id"]) == (400, "c")
    assert len(post(world.http, COMPLETE, {"prompt": "x"}).headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", None, 404, "not_found"),
        ("GET", CHAT, None, 405, "method_not_allowed"),
        ("POST", "/health", b"", 405, "method_not_allowed"),
        ("POST", CHAT, b"{", 400, "invalid_request"),
        ("POST", CHAT, b"", 400, "invalid_request"),
        ("POST", CHAT, b"[]", 400, "invalid_request"),
        ("POST", CHAT, b"null", 400, "invalid_request"),
        ("POST", CHAT, b'{"messages": "\xff\xfe"}', 400, "invalid_request"),
        ("POST", CHAT, b"[" * 100_000, 400, "invalid_request"),
        ("POST", CHAT, b'{"n": ' + b"9" * 5000 + b"}", 400, "invalid_request"),
        ("POST", CHAT, b" " * (2**23 + 1), 413, "request_too_large"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_every_refusal_has_openais_body(world, method, path, body, status, code) -> None:
    reply = call(world.http, method, path, body)
    assert (reply.status, reply.json["error"]["code"]) == (status, code)
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"]
    assert world.dispatcher.jobs == []


def test_a_bug_of_ours_is_a_500_that_tells_nothing(world: World) -> None:
    world.dispatcher.script = lambda job: 1 // 0
    reply = post(world.http, COMPLETE, {"prompt": "x"})
    assert (reply.status, reply.json["error"]["code"]) == (500, "internal")
    assert "division" not in reply.body.decode()


def test_metrics_count_what_happened(world: World) -> None:
    def value(name: str) -> float:
        lines = call(world.http, "GET", "/metrics").body.decode().splitlines()
        found = [line for line in lines if line.startswith(name)]
        assert found, name
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    names = {
        "stop": 'pdserve:request_success_total{engine="0",finished_reason="stop"',
        "abort": 'pdserve:request_success_total{engine="0",finished_reason="abort"',
        "rejected": "pdserve:requests_rejected_total",
        "tokens": "pdserve:generation_tokens_total",
    }
    post(world.http, COMPLETE, {"prompt": ""})
    before = {key: value(name) for key, name in names.items()}
    post(world.http, COMPLETE, {"prompt": "x", "max_tokens": 100})
    post(world.http, COMPLETE, {"prompt": "x", "temperature": -1})
    after = {key: value(name) for key, name in names.items()}
    made = len(world.ids("the quick brown fox")) + 1
    assert {key: after[key] - before[key] for key in names} == {
        "stop": 1,
        "abort": 0,
        "rejected": 1,
        "tokens": made,
    }
    assert value("pdserve:requests_in_flight") == 0
    assert value("pdserve:num_requests_running") == 2
