"""Redis over TLS, as a user who may touch our keys alone and use our commands alone.

Needs a redis-server that is built with TLS; the bundled one is not. Debian's package has it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from real_redis import blank, new_keys, new_spans, open_tier

from cache_tiers.redis_tier import RedisTier
from pdserve.config_load import load_config
from pdserve.errors import ConfigError, TierError
from tests.certificates import Pair, authority, issue, needs_openssl

pytestmark = needs_openssl
DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
PASSWORD = "a-long-password"
LONG = 60.0


def acl_line() -> str:
    """The line that docs/security.md tells operators to use, with a password of ours."""
    (line,) = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("user pdser")]
    assert ">PASSWORD" in line
    return line.replace(">PASSWORD", f">{PASSWORD}")


@dataclass(frozen=True)
class TlsRedis:
    port: int
    ca: Path
    folder: Path
    url: str

    def admin(self) -> redis.Redis:
        return redis.Redis(port=self.port, ssl=True, ssl_ca_certs=str(self.ca), password="admin")

    def tier(self, **changes: object) -> RedisTier:
        (self.folder / "password").write_text(PASSWORD + "\n")
        settings = {
            "username": "pdserve",
            "password_file": str(self.folder / "password"),
            "ca_file": str(self.ca),
        }
        return open_tier(self.url, **(settings | changes))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsRedis]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("SKIPPED REDIS TLS: no redis-server on the PATH (Debian: redis-server)")
    folder = tmp_path_factory.mktemp("redis")
    ca = authority(folder)
    shown = issue(ca, folder, "server", "DNS:localhost,IP:127.0.0.1")
    (folder / "users.acl").write_text(f"user default on >admin ~* &* +@all\n{acl_line()}\n")
    port = _free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(_command(binary, port, ca, shown, folder), stdout=log)
    try:
        made = TlsRedis(port, ca.cert, folder, f"rediss://127.0.0.1:{port}/0")
        _wait(made, process)
        yield made
    finally:
        process.kill()
        process.wait()


def _command(binary: str, port: int, ca: Pair, shown: Pair, folder: Path) -> list[str]:
    settings = {
        "port": 0,
        "tls-port": port,
        "bind": "127.0.0.1",
        "tls-cert-file": shown.cert,
        "tls-key-file": shown.key,
        "tls-ca-cert-file": ca.cert,
        "tls-auth-clients": "no",
        "aclfile": folder / "users.acl",
        "save": "",
        "dir": folder,
    }
    return [binary, *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]


def _wait(server: TlsRedis, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            server.admin().ping()
            return
        except redis.RedisError:
            if process.poll() is not None:
                log = (server.folder / "log").read_text()
                if "tls-port" in log:
                    pytest.skip("SKIPPED REDIS TLS: this redis-server is built without TLS")
                raise AssertionError(log) from None
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_all_that_the_tier_does_works_as_the_documented_user(server: TlsRedis) -> None:
    tier = server.tier()
    tier.ping()
    keys, values, into = new_keys(9), new_spans(9), blank(9)
    tier.put(keys, values)
    assert all(tier.contains(keys))
    assert tier.get(keys, into, LONG) == 9
    assert into == values
    tier.delete(keys[5:])
    assert tier.contains(keys) == [True] * 5 + [False] * 4
    tier.clear()
    assert not any(tier.contains(keys))
    assert tier.health() == ""
    tier.close()
    used = {str(entry["username"]) for entry in server.admin().acl_log()}
    assert "pdserve" not in used, f"a command of the tier was denied: {server.admin().acl_log()}"


def test_that_user_can_do_nothing_else(server: TlsRedis) -> None:
    server.admin().set("somebody:else", "1")
    user = redis.Redis(
        port=server.port,
        ssl=True,
        ssl_ca_certs=str(server.ca),
        username="pdserve",
        password=PASSWORD,
        protocol=2,
    )
    assert user.ping()
    for command in (
        ("GET", "somebody:else"),
        ("SET", "somebody:else", "2"),
        ("UNLINK", "somebody:else"),
        ("FLUSHALL",),
        ("FLUSHDB",),
        ("CONFIG", "GET", "*"),
        ("KEYS", "*"),
        ("EVAL", "return 1", "0"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("SUBSCRIBE", "x"),
        ("RENAME", "pdserve:a", "pdserve:b"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            user.execute_command(*command)
    assert server.admin().get("somebody:else") == b"1"
    server.admin().acl_log_reset()


@pytest.mark.parametrize("wrong", ["password", "user", "authority"])
def test_wrong_access_is_a_tier_that_does_not_answer(
    server: TlsRedis, tmp_path: Path, wrong: str
) -> None:
    (tmp_path / "password").write_text("another-password")
    stranger = authority(tmp_path)
    tier = server.tier(
        **{
            "password": {"password_file": str(tmp_path / "password")},
            "user": {"username": "nobody"},
            "authority": {"ca_file": str(stranger.cert)},
        }[wrong]
    )
    with pytest.raises(TierError) as caught:
        tier.ping()
    assert PASSWORD not in str(caught.value)
    assert tier.health() != ""
    tier.close()
    server.admin().acl_log_reset()


def test_the_keys_are_checked_when_they_are_read(tmp_path: Path) -> None:
    url = "cache.redis.url=rediss://127.0.0.1:1"
    redis_of = load_config(
        None, ["cache.redis.mode=url", url, "cache.redis.ca_file=/x", "cache.redis.username=u"]
    ).cache.redis
    assert (redis_of.ca_file, redis_of.username) == ("/x", "u")
    for texts in (
        ["cache.redis.username=u"],
        ["cache.redis.password_file=/x"],
        ["cache.redis.mode=url", "cache.redis.url=redis://h", "cache.redis.ca_file=/x"],
    ):
        with pytest.raises(ConfigError, match=r"cache\.redis"):
            load_config(None, texts)
    (tmp_path / "empty").write_text("\n")
    for key in ("password_file", "ca_file"):
        for path in (tmp_path / "missing", tmp_path / "empty"):
            with pytest.raises(ConfigError, match=f"cache.redis.{key}"):
                open_tier("rediss://127.0.0.1:1", **{key: str(path)})
