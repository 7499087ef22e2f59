"""A wrong setting is refused in one line that names the key, the value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pdserve.config import Config
from pdserve.config_docs import render
from pdserve.config_load import config_from_dict, config_to_dict, keys, load_config
from pdserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pdserve.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_valid_and_equal_to_an_empty_file(tmp_path: Path) -> None:
    assert load_config() == Config()
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "router:\n")) == Config()


def test_the_last_source_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "router: {http_port: 1000, grpc_port: 2000}\npools: {prefill: 3}\n")
    cli = {"router.http_port": 1001, "router.grpc_port": 2001}
    config = load_config(path, ["router.grpc_port=2002"], cli)
    assert config.router.http_port == 1001
    assert config.router.grpc_port == 2002
    assert config.pools.prefill == 3
    assert config.pools.decode == Config().pools.decode


def test_set_reads_every_type() -> None:
    config = load_config(
        overrides=[
            "router.strict=true",
            "timers.heartbeat_s=2",
            "engine.block_size=32",
            "model.path=some/folder=with=signs",
            "transfer.transports=shm, tcp",
            "security.api_key_files=[]",
        ]
    )
    assert config.router.strict is True
    assert config.timers.heartbeat_s == 2.0
    assert type(config.timers.heartbeat_s) is float
    assert config.engine.block_size == 32
    assert config.model.path == "some/folder=with=signs"
    assert config.transfer.transports == ("shm", "tcp")
    assert config.security.api_key_files == ()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("router.http_prt=1", ["unknown key router.http_prt", "did you mean router.http_port?"]),
        ("http_port=1", ["unknown key http_port", "router.http_port"]),
        ("router=1", ["router", "is a section"]),
        ("=1", ["unknown key (empty)", "--set"]),
        ("Router.Strict=true", ["unknown key Router.Strict", "did you mean router.strict?"]),
        ("cache.mode=off", ["unknown key cache.mode", "did you mean cache.redis.mode?"]),
        ("router.http_port=70000", ["router.http_port = 70000", "from 0 to 65535"]),
        ("router.http_port=abc", ["router.http_port = 'abc'", "a whole number"]),
        ("router.http_port=1.5", ["router.http_port = '1.5'", "a whole number"]),
        ("router.http_port=true", ["router.http_port = 'true'", "a whole number"]),
        ("engine.block_size=0", ["engine.block_size = 0", "from 1 to 1024"]),
        ("timers.heartbeat_s=nan", ["timers.heartbeat_s = nan", "a number"]),
        ("timers.drain_s=inf", ["timers.drain_s = inf"]),
        ("router.strict=yes", ["router.strict = 'yes'", "true or false"]),
        ("model.dtype=bfloat61", ["model.dtype", "did you mean bfloat16?", "float32"]),
        ("transfer.transports=shm,udp", ["transfer.transports", "udp", "one of shm, tcp"]),
        ("cache.redis.bytes_max=1", ["cache.redis.bytes_max = 1", "at least 1048576"]),
        ("router.strict", ["--set router.strict", "key=value"]),
    ],
)
def test_a_wrong_override_names_key_value_and_choices(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("router: 5", "router in"),
        ("- a\n- b\n", "expected keys and values"),
        ("router: {http_port: '80'}", "router.http_port = '80'"),
        ("router: {http_port: yes}", "router.http_port = True"),
        ("router: {http_port: null}", "router.http_port = None"),
        ("name: 5", "name = 5"),
        ("transfer: {transports: shm}", "a list"),
        ("transfer: {transports: [shm, 3]}", "a list"),
        ("router: {a: {b: 1}}", "unknown key router.a"),
        ("1: 2", "unknown key 1"),
        (
            "router: {http_port: 1}\nname: a\nrouter: {grpc_port: 2}",
            "line 3: the key 'router' stands",
        ),
        ("router: {http_port: 1, http_port: 2}", "the key 'http_port' stands there twice"),
        ("router: {http_port: 1}\nrouter.http_port: 2", "router.http_port stands twice"),
        ("ruoter: {http_port: 1}", "unknown key ruoter in"),
        ("ruoter: {http_port: 1}", "did you mean router?"),
        ("cache: {Redis: {mode: url}}", "did you mean cache.redis?"),
        ("a: &x [*x]", "unknown key a"),
        ("router:\n\thttp_port: 1", "line 2"),
        ("a: [", "line"),
        ("a: !!python/object/apply:os.getcwd []", "configuration file"),
        ("router: !!map foo", "line 1: expected a mapping node"),
        ("router: !!map [a, b]", "line 1: expected a mapping node"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert part in str(caught.value)


def test_off_needs_no_quotes_though_yaml_reads_it_as_false(tmp_path: Path) -> None:
    path = write(tmp_path, "cache: {redis: {mode: off}}")
    assert load_config(path).cache.redis.mode == "off"
    with pytest.raises(ConfigError, match=r"model\.dtype = False: expected one of auto"):
        load_config(write(tmp_path, "model: {dtype: off}"))


def test_keys_below_one_another_may_be_merged_and_named_again_elsewhere(tmp_path: Path) -> None:
    text = "pools: &p {prefill: 2}\nengine: {block_size: 32}\nname: prefill"
    config = load_config(write(tmp_path, text))
    assert (config.pools.prefill, config.engine.block_size, config.name) == (2, 32, "prefill")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(binary)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["name=../evil"], "name"),
        (["pools.decode_min=2"], "pools.decode_min = 2 exceeds pools.decode = 1"),
        (["pools.decode=0"], "somebody must write"),
        (["model.numerics=exact", "model.dtype=bfloat16"], "float32 or float64"),
        (["security.tls_cert=a.pem"], "security.tls_key is not"),
        (["cache.redis.mode=url"], "needs cache.redis.url"),
        (["cache.redis.url=redis://h"], "set the mode to url"),
        (["pools.ray_address=10.0.0.1:6379"], "cache.redis.mode"),
        (["pools.ray_address=ray://host:1"], "local, auto or host:port"),
        (["router.http_port=9", "router.grpc_port=9"], "take two ports"),
        (["timers.dead_after_s=0.5"], "must exceed"),
        (["router.strict=true", "pools.prefill=0"], "prefill"),
        (
            ["pools.prefill=3", "pools.prefill_max=2"],
            "pools.prefill = 3 exceeds pools.prefill_max = 2",
        ),
        (["admin.host=0.0.0.0"], "admin.host = '0.0.0.0' .* mutual TLS .* 127.0.0.1"),
        (["admin.port=8000"], "admin.port = 8000 .* take another"),
    ],
)
def test_settings_that_contradict_each_other(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_config(overrides=overrides)


def test_dicts_round_trip_through_json_and_yaml() -> None:
    config = load_config(
        overrides=["transfer.transports=tcp", "cache.redis.mode=off", "pools.prefill=2"]
    )
    data = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(data))) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(data))) == config
    data["router"]["http_port"] = -1
    with pytest.raises(ConfigError):
        config_from_dict(data)


def test_every_key_can_be_set_to_its_own_default() -> None:
    for key in keys().values():
        default = ",".join(map(str, key.default)) if key.is_tuple else str(key.default)
        assert load_config(overrides=[f"{key.path}={default}"]) == Config(), key.path


def test_every_key_says_what_it_is_for() -> None:
    assert [key.path for key in keys().values() if not key.doc.endswith((".", ">"))] == []


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == render(), "run: python -m pdserve.config_docs > docs/configuration.md"
