"""Starting and closing the fronts: addresses, ports in use, model folders of every shape."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import subprocess
import sys

import pytest
from fronts_world import (
    CONTEXT,
    SERVED,
    ScriptedDispatcher,
    default_script,
    running_world,
    write_model,
)
from http_talk import call, post
from tokenizers import Tokenizer

from pdserve.config import Config, ModelConfig, RouterConfig
from pdserve.errors import ConfigError, ModelRefused
from pdserve.rpc.identity import Caller, mint
from router.boot import RouterBoot
from router.fronts import start_fronts
from router.model_files import load_model


@pytest.mark.parametrize("front", ["http", "grpc"])
def test_a_port_in_use_is_one_clear_error(model_folder, front: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"http_port": 0, "grpc_port": 0, f"{front}_port": port}
        config = Config(router=dataclasses.replace(RouterConfig(), **ports))
        me = mint("t", Caller.ROUTER)
        boot = RouterBoot(config, str(model_folder), SERVED, me, b"k" * 32, "")
        dispatcher = ScriptedDispatcher(default_script, 400, 2)
        with pytest.raises(ConfigError) as caught:
            asyncio.run(start_fronts(boot, dispatcher))
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_closed_fronts_free_their_ports(model_folder) -> None:
    with running_world(model_folder) as world:
        host, port = world.http.split(":")
        assert call(world.http, "GET", "/health").status == 200
    with socket.create_server((host, int(port))):
        pass
    with running_world(model_folder, grpc_port=int(world.grpc.split(":")[1])) as again:
        assert again.grpc == world.grpc


def test_generation_config_gives_the_defaults(tmp_path) -> None:
    folder = write_model(
        tmp_path / "m", temperature=0.3, top_k=11, top_p=0.9, repetition_penalty=1.1
    )
    with running_world(folder) as world:
        post(world.http, "/v1/completions", {"prompt": "x"})
        post(world.http, "/v1/completions", {"prompt": "x", "temperature": 0, "top_k": 0})
        first, second = (job.sampling for job in world.dispatcher.jobs)
    assert (first.temperature, first.top_k, first.top_p) == (0.3, 11, 0.9)
    assert first.repetition_penalty == 1.1
    assert (second.temperature, second.top_k) == (0.0, 0)
    assert first.max_tokens == 16, "OpenAI's default of this endpoint"


def test_stop_ids_come_from_the_first_file_that_names_them(tmp_path) -> None:
    folder = write_model(tmp_path / "m")
    load = lambda: load_model(str(folder), SERVED, Config()).eos_ids  # noqa: E731
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert load() == (5, 7)
    (folder / "generation_config.json").unlink()
    assert load() == (2,)
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": 400, "max_position_embeddings": CONTEXT})
    )
    assert load() == ()
    with running_world(folder) as world:  # the tokenizer's own end is the last resort
        post(world.http, "/v1/completions", {"prompt": "x"})
        post(world.http, "/v1/completions", {"prompt": "x", "ignore_eos": True})
        assert [job.sampling.stop_token_ids for job in world.dispatcher.jobs] == [(2,), ()]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", "{}", "vocab_size"),
        ("config.json", '{"vocab_size": 5}', "max_position_embeddings"),
        ("generation_config.json", '{"top_p": 7}', "top_p"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature"),
    ],
)
def test_a_broken_model_folder_is_refused(tmp_path, file, content, says) -> None:
    folder = write_model(tmp_path / "m")
    (folder / file).write_text(content)
    with pytest.raises(ModelRefused, match=says):
        load_model(str(folder), SERVED, Config())


def test_a_model_without_tokenizer_serves_token_ids(tmp_path) -> None:
    folder = write_model(tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    with running_world(folder, tokenizer=tokenizer) as world:
        body = {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True, "logprobs": 1}
        choice = post(world.http, "/v1/completions", body).json["choices"][0]
        assert len(choice["token_ids"]) == len(choice["logprobs"]["tokens"]) == 3
        assert choice["text"] == ""
        for path, wrong in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [5], "stop": "x"}),
            ("/v1/completions", {"prompt": [5], "echo": True}),
            ("/detokenize", {"tokens": [5]}),
        ):
            assert post(world.http, path, wrong).status == 400, wrong


def test_max_model_len_and_template_can_be_configured(tmp_path, model_folder) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    config = ModelConfig(max_model_len=100, chat_template=str(template))
    loaded = load_model(str(model_folder), SERVED, Config(model=config))
    assert loaded.max_model_len == 100
    with running_world(model_folder, model=config) as world:
        messages = [{"role": "user", "content": "the dog"}]
        post(world.http, "/v1/chat/completions", {"messages": messages})
        assert list(world.dispatcher.jobs[0].prompt) == world.ids("the dog ")


def test_the_fronts_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, router.fronts, pdserve.client\n"
        "heavy = {'torch', 'transformers', 'ray', 'kv_transfer', 'pdserve.engine'}\n"
        "sys.exit(' '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
