"""Templates and tokens as transformers makes them, without transformers; and what they refuse."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest
from fronts_world import SERVED, TEMPLATE, World, write_model
from http_talk import post

from pdserve.config import Config
from pdserve.errors import ConfigError, ContextTooLong, InvalidRequest
from router.chat import ChatTemplate
from router.model_files import load_model
from router.tokens import TokenService

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "be <b>brief</b> & kind"},
    {"role": "user", "content": "  spaces around  "},
    {"role": "assistant", "content": "naïve 東京"},
    {"role": "user", "content": "{{ not a template }} {% raw %}"},
]
# What real models' templates are made of: loops and slices, namespaces, macros, filters, trimming.
TEMPLATES = [
    TEMPLATE,
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | trim }}"
    "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}",
    "{%- set ns = namespace(found=false, n=0) -%}\n{%- for m in messages %}\n"
    "    {%- if loop.first and m['role'] == 'system' %}\n        {%- set ns.found = true %}\n"
    "        {{- m['content'] + '\\n\\n' }}\n        {%- continue %}\n    {%- endif %}\n"
    "    {%- set ns.n = ns.n + 1 %}\n    {{- '<' ~ ns.n ~ '>' + m['content'] }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<a>' }}{%- endif %}",
    "{% macro one(m) %}{{ m.role }}={{ m.content | tojson }}{% endmacro %}"
    "{% for m in messages[::-1] %}{{ one(m) }};{% if loop.index == 3 %}{% break %}{% endif %}"
    "{% endfor %}{{ messages | length }}{{ messages[-1].content.strip().split()[0] }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content | e }}{% endif %}{% endfor %}"
    "{{ tools is none }}{{ documents is defined }}{{ (1, 2) | list | tojson(indent=2) }}"
    "{{ {'b': 1, 'a': 'ü'} | dictsort | first | string }}{{ flavour | default('plain') }}",
    "{{ '%s-%03d' % ('x', 7) }}{{ 'ab' * 3 }}{{ range(3) | join(',') }}{{ 2 ** 5 }}"
    "{{ dict(a=1).a }}{{ strftime_now('%Y') }}",
]


def render(source: str, chat=CHAT, *, open_=True, continued=False, **variables) -> str:
    return ChatTemplate(source, SPECIAL).render(
        chat, add_generation_prompt=open_, continue_final_message=continued, variables=variables
    )


@pytest.mark.parametrize("source", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for open_ in (True, False):
        expected, _ = render_jinja_template(
            conversations=[CHAT], chat_template=source, add_generation_prompt=open_, **SPECIAL
        )
        assert render(source, open_=open_) == expected[0]


@pytest.mark.parametrize("final", ["The answer is", "trailing space ", "\n"])
@pytest.mark.parametrize("source", TEMPLATES[:2], ids=range(2))
def test_a_final_message_is_continued_as_transformers_does(source: str, final: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [*CHAT, {"role": "assistant", "content": final}]
    if final.strip():
        expected, _ = render_jinja_template(
            conversations=[chat], chat_template=source, continue_final_message=True, **SPECIAL
        )
        ours = render(source, chat, open_=False, continued=True)
        # A template that trims has lost the space; where ours keeps it, the client's text wins.
        assert ours.rstrip() == expected[0].rstrip()
    assert "\x00" not in render(source, chat, open_=False, continued=True)


def test_variables_reach_the_template() -> None:
    assert render("{{ mode }}", mode="quick") == "quick"
    assert render("{% if thinking %}yes{% endif %}", thinking=True) == "yes"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[99].content }}", "fails on them|refuses"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{{ ''.__class__.mro }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ namespace(__x=1) }}", "refuses"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "long"),
        ("{{ range(10 ** 9) | list }}", "refuses"),
        ("{{ 'x' * 10 ** 9 }}", "too long"),
        ("{{ [0] * 10 ** 9 }}", "too long"),
        ("{{ 9 ** 9999 }}", "too large"),
        ("{{ '%1000000000s' % 'x' }}", "too long"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "too much"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ undefined_name.field }}", "refuses"),
    ],
)
def test_whatever_a_template_does_is_a_typed_error_soon(source: str, says: str) -> None:
    start = time.thread_time()
    with pytest.raises(InvalidRequest, match=says) as caught:
        render(source)
    assert caught.value.param == "messages"
    assert time.thread_time() - start < 2.0


def test_a_template_that_does_not_compile_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_a_failing_template_leaves_the_front_alive(world: World) -> None:
    chat = [{"role": "user", "content": "x"}]
    bad = {"messages": chat, "continue_final_message": True, "add_generation_prompt": True}
    assert post(world.http, "/v1/chat/completions", bad).status == 400
    assert post(world.http, "/v1/chat/completions", {"messages": chat}).status == 200


def test_templates_are_found_where_models_keep_them(tmp_path) -> None:
    folder = write_model(tmp_path / "m")

    def found() -> str | None:
        return load_model(str(folder), SERVED, Config()).chat_template

    assert found() == TEMPLATE
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert found() == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert found() == "J"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert found() is None


def test_hopelessly_long_text_is_refused_without_encoding_it(model_folder) -> None:
    service = TokenService(load_model(str(model_folder), SERVED, Config()), 1)
    service.pieces.encode = None  # would fail if it were called
    with pytest.raises(ContextTooLong, match="at least"):
        asyncio.run(service.encode("prompt", "x" * 8_000_000, add_special_tokens=True, limit=256))
    service.close()


def smollm2() -> Path | None:
    cache = Path(os.environ.get("PDSERVE_MODEL_CACHE", "~/.cache/pdserve/models")).expanduser()
    found = sorted(cache.glob("**/tokenizer.json")) if cache.is_dir() else []
    return next((file.parent for file in found if "smollm2" in str(file).lower()), None)


@pytest.mark.skipif(smollm2() is None, reason="the embedded model was not converted yet")
def test_the_embedded_model_tokenizes_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    folder = smollm2()
    reference = AutoTokenizer.from_pretrained(str(folder))
    service = TokenService(load_model(str(folder), SERVED, Config()), 2)

    async def run() -> None:
        for text in ("Hello", " leading", "Grüße 東京 👍🏽", "<|im_start|>user\n", "\n\n  x"):
            ours = await service.encode("prompt", text, add_special_tokens=True, limit=8192)
            assert list(ours) == reference(text)["input_ids"], text
        rendered = await service.render(
            "messages",
            CHAT,
            add_generation_prompt=True,
            continue_final_message=False,
            variables={},
        )
        ours = await service.encode("messages", rendered, add_special_tokens=False, limit=8192)
        expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True)
        assert list(ours) == list(expected["input_ids"])

    asyncio.run(run())
    assert service.eos_ids
    service.close()


def test_a_long_text_is_refused_after_its_head(model_folder) -> None:
    service = TokenService(load_model(str(model_folder), SERVED, Config()), 1)
    seen: list[int] = []
    encode = service.pieces.encode

    def counting(text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        seen.append(len(text))
        return encode(text, add_special_tokens=add_special_tokens)

    service.pieces.encode = counting
    limit = 256
    with pytest.raises(ContextTooLong, match="at least"):
        asyncio.run(
            service.encode("prompt", "fox dog " * 250, add_special_tokens=True, limit=limit)
        )
    assert max(seen) == 6 * limit
    # Long text of few tokens is encoded to its end.
    few = "the quick brown fox" * 4
    ids = asyncio.run(service.encode("prompt", few, add_special_tokens=True, limit=9))
    assert ids == encode(few, add_special_tokens=True)
    service.close()
