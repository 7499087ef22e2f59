"""The Redis tier against a real redis-server: hits, damage, and every way a server can fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_redis import FINGERPRINT, SPAN, WRITER, RealRedis, blank, new_keys, new_spans, open_tier

from cache_tiers.codec import HEADER_BYTES, encode_header
from cache_tiers.redis_link import TierUnavailable
from cache_tiers.redis_tier import RedisTier
from pdserve.errors import ConfigError, TierError
from pdserve.types import BlockKey, Fingerprint, Incarnation
from tests.standstill import watched

LONG = 10.0


def name(key: BlockKey) -> str:
    return f"pdserve:{FINGERPRINT[:8].hex()}:{key.hex()}"


def found(tier: RedisTier, keys: list[BlockKey]) -> int:
    return tier.get(keys, blank(len(keys)), LONG)


# ---- it works -----------------------------------------------------------------------------------


def test_what_was_put_comes_back_in_batches(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    keys, values, into = new_keys(23), new_spans(23), blank(23)
    assert tier.contains(keys) == [False] * 23
    tier.put(keys, values)
    assert tier.contains([*keys, *new_keys(1)]) == [True] * 23 + [False]
    assert tier.get(keys, into, LONG) == 23
    assert into == values
    assert tier.stats().hits == 23
    assert tier.stats().stored == 23
    assert tier.health() == ""


def test_a_get_ends_at_the_first_key_that_is_missing(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(9), new_spans(9)
    tier.put(keys, values)
    for missing in (0, 3, 4, 5, 8):  # a batch has four spans
        tier.put(keys, values)
        tier.delete([keys[missing]])
        into = blank(9)
        assert tier.get(keys, into, LONG) == missing
        assert into[:missing] == values[:missing]


def test_names_form_and_expiry_are_what_is_documented(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url, expiry_s=77)
    (key,), (value,) = new_keys(1), new_spans(1)
    tier.put([key], [value])
    client = real_redis.client()
    assert client.keys("*") == [name(key).encode()]
    assert client.get(name(key)) == encode_header(FINGERPRINT, key, WRITER, value) + value
    assert 70 < client.ttl(name(key)) <= 77


def test_two_processes_with_one_fingerprint_share_and_others_do_not(
    real_redis: RealRedis,
) -> None:
    keys, values = new_keys(3), new_spans(3)
    open_tier(real_redis.url).put(keys, values)
    assert found(open_tier(real_redis.url, writer=Incarnation(b"2" * 16)), keys) == 3
    assert found(open_tier(real_redis.url, fingerprint=Fingerprint(b"G" * 32)), keys) == 0


def test_clear_takes_our_values_and_nothing_else(real_redis: RealRedis) -> None:
    tier, other = open_tier(real_redis.url), open_tier(real_redis.url, fingerprint=b"G" * 32)
    keys = new_keys(30)
    tier.put(keys, new_spans(30))
    other.put(keys, new_spans(30))
    real_redis.client().set("somebody:else", "1")
    tier.clear()
    assert found(tier, keys) == 0
    assert found(other, keys) == 30
    assert real_redis.client().get("somebody:else") == b"1"


def test_clear_waits_for_a_busy_server_though_requests_would_not(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url, timeout_s=0.05, breaker_failures=1, breaker_open_s=60.0)
    keys = new_keys(30)
    open_tier(real_redis.url).put(keys, new_spans(30))
    real_redis.pause()
    with pytest.raises(TierError):
        tier.delete(keys[:1])
    assert tier.refuses_writes(), "the breaker did not open: nothing was shown"
    resuming = threading.Timer(0.5, real_redis.resume)
    resuming.start()
    assert tier.clear() in {29, 30}  # the deletion that was given up may have come through
    resuming.join()
    assert real_redis.client().dbsize() == 0


@pytest.mark.parametrize("connected", [True, False])
def test_a_clear_that_waits_ends_when_the_tier_closes(
    real_redis: RealRedis, connected: bool
) -> None:
    tier = open_tier(real_redis.url, timeout_s=0.05)
    if connected:
        with contextlib.suppress(TierError):  # on a machine that stands still
            tier.ping()
    real_redis.pause()
    closing = threading.Timer(0.3, tier.close)
    with watched() as still:
        closing.start()
        began = time.monotonic()
        with pytest.raises(TierError):
            tier.clear()
        real_redis.resume()
        closing.join()
        assert time.monotonic() - began < 3.0 + still.seconds


def test_spans_of_every_size_pass_whole(real_redis: RealRedis) -> None:
    # Around the small buffer of the protocol reader, and far above one socket buffer.
    for span in (1, 7, 3900, 4096 - HEADER_BYTES, 4096, 4097, 8191, 3_000_001):
        tier = open_tier(real_redis.url, span=span, fingerprint=Fingerprint(os.urandom(32)))
        keys, values, into = new_keys(3), new_spans(3, span), blank(3, span)
        tier.put(keys, values)
        assert tier.get(keys, into, LONG) == 3
        assert into == values


# ---- values that must not be used ---------------------------------------------------------------


def sealed(key: BlockKey, payload: bytes, fingerprint: bytes = FINGERPRINT) -> bytes:
    return encode_header(Fingerprint(fingerprint), key, WRITER, payload) + payload


PAYLOAD = os.urandom(SPAN)
OTHER_KEY = BlockKey(b"o" * 16)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


POISON = {
    "flipped payload bit": lambda key: flipped(sealed(key, PAYLOAD), 2000),
    "flipped header bit": lambda key: flipped(sealed(key, PAYLOAD), 65),
    "another key's value": lambda key: sealed(OTHER_KEY, PAYLOAD),
    "another fingerprint's": lambda key: sealed(key, PAYLOAD, b"x" * 32),
    "an old schema": lambda key: sealed(key, PAYLOAD)[:8] + bytes(4) + sealed(key, PAYLOAD)[12:],
    "truncated": lambda key: sealed(key, PAYLOAD)[:-1],
    "only a header": lambda key: sealed(key, PAYLOAD)[:HEADER_BYTES],
    "empty": lambda key: b"",
    "too long": lambda key: sealed(key, PAYLOAD) + b"x",
    "huge": lambda key: bytes(10_000_000),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_value_is_a_miss_and_is_deleted(real_redis: RealRedis, kind: str) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(4), new_spans(4)
    tier.put(keys, values)
    real_redis.client().set(name(keys[2]), POISON[kind](keys[2]))
    into = blank(4)
    assert tier.get(keys, into, LONG) == 2
    assert into[:2] == values[:2]
    assert real_redis.client().exists(name(keys[2])) == 0
    assert real_redis.client().exists(name(keys[1])) == 1
    assert tier.stats().rejected_values == 1
    assert tier.stats().errors == 0
    # The next write-back heals it.
    tier.put([keys[2]], [values[2]])
    assert found(tier, keys) == 4


def test_a_value_of_another_type_is_a_miss_and_is_overwritten(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(1), new_spans(1)
    real_redis.client().rpush(name(keys[0]), "a", "b")
    assert found(tier, keys) == 0
    tier.put(keys, values)
    assert found(tier, keys) == 1


def test_a_revoked_writer_reads_as_a_miss(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    bad = open_tier(real_redis.url, writer=Incarnation(b"B" * 16))
    keys = new_keys(2)
    tier.put(keys[:1], new_spans(1))
    bad.put(keys[1:], new_spans(1))
    assert found(tier, keys) == 2
    tier.revoke(Incarnation(b"B" * 16))
    assert found(tier, keys) == 1
    assert real_redis.client().exists(name(keys[1])) == 0


# ---- servers that fail --------------------------------------------------------------------------


def test_a_restart_in_mid_use_costs_no_error(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(2), new_spans(2)
    tier.put(keys, values)
    real_redis.kill()
    real_redis.start()
    assert found(tier, keys) == 0
    tier.put(keys, values)
    assert found(tier, keys) == 2
    assert tier.health() == ""


def test_a_dead_server_opens_the_breaker_and_a_new_one_closes_it(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(2), new_spans(2)
    tier.put(keys, values)
    real_redis.kill()
    for _ in range(3):
        with pytest.raises(TierError):
            found(tier, keys)
    assert tier.health() == "redis unreachable"
    assert tier.stats().errors == 3
    with pytest.raises(TierUnavailable):
        found(tier, keys)
    assert tier.stats().errors == 3  # nothing was tried
    real_redis.start()
    time.sleep(0.35)
    assert found(tier, keys) == 0  # the probe
    tier.put(keys, values)
    assert found(tier, keys) == 2
    assert tier.health() == ""


def test_a_server_that_is_down_at_the_start_is_no_error_until_it_is_asked(tmp_path: Path) -> None:
    tier = open_tier(f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(TierError):
        tier.ping()
    assert tier.health() == "redis unreachable"


def test_a_url_that_can_never_work_is_refused() -> None:
    for url in ("http://x", "redis://x?no_such_option=1", "nonsense"):
        with pytest.raises(ConfigError):
            open_tier(url)
    with pytest.raises(ConfigError):
        open_tier("redis://x", value_bytes_max=SPAN)


def test_a_full_server_refuses_writes_and_still_reads(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(2), new_spans(2)
    tier.put(keys, values)
    client = real_redis.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    for _ in range(3):
        with pytest.raises(TierError):
            tier.put(new_keys(7), new_spans(7))
    assert tier.health() == "redis refuses writes"
    assert tier.refuses_writes()
    assert found(tier, keys) == 2
    client.config_set("maxmemory", 0)
    time.sleep(0.35)
    tier.put(keys, values)
    assert tier.health() == ""


def test_a_read_only_replica_is_read_even_where_it_cannot_be_cleaned(
    real_redis: RealRedis,
) -> None:
    tier = open_tier(real_redis.url)
    keys, values = new_keys(3), new_spans(3)
    tier.put(keys, values)
    real_redis.client().set(name(keys[2]), b"poison")
    client = real_redis.client()
    client.config_set("replica-serve-stale-data", "yes")
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(TierError):
        tier.put(keys, values)
    assert found(tier, keys) == 2


def test_a_wrong_password_is_a_failing_tier(real_redis: RealRedis) -> None:
    real_redis.kill()
    real_redis.start("--requirepass", "right")
    keys, values = new_keys(1), new_spans(1)
    for url in (real_redis.url, f"{real_redis.url}?password=wrong"):
        tier = open_tier(url)
        with pytest.raises(TierError):
            tier.put(keys, values)
        with pytest.raises(TierError):
            found(tier, keys)
        assert tier.health() == "redis unreachable"
    tier = open_tier(f"{real_redis.url}?password=right&db=3")
    tier.put(keys, values)
    assert found(tier, keys) == 1


def test_a_stopped_server_costs_its_time_out_and_no_more(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url, timeout_s=0.2, bytes_per_second=1 << 30)
    keys, values = new_keys(20), new_spans(20)
    open_tier(real_redis.url).put(keys, values)
    real_redis.pause()
    with watched() as still:
        start = time.monotonic()
        with pytest.raises(TierError):
            found(tier, keys)
        with pytest.raises(TierError):
            tier.put(keys, values)
        took = time.monotonic() - start
    real_redis.resume()
    assert 0.4 <= took < 1.0 + still.seconds
    assert real_redis.client().ping()  # it has worked off what was sent
    # What the server answers to the given-up call must not be taken for the next one's answer.
    into = blank(20)
    assert tier.get(keys, into, LONG) == 20
    assert into == values


def test_the_time_out_grows_with_the_bytes_of_a_batch(real_redis: RealRedis) -> None:
    tier = open_tier(real_redis.url, timeout_s=0.05, bytes_per_second=SPAN * 10)
    keys = new_keys(4)
    tier.put(keys, new_spans(4))
    real_redis.pause()
    with watched() as still:
        start = time.monotonic()
        with pytest.raises(TierError):
            found(tier, keys)
        took = time.monotonic() - start
        # 0.05 s + 4 spans at 10 spans a second
        assert 0.44 <= took < 0.9 + still.seconds
        real_redis.resume()
        # The caller's own limit is shorter.
        real_redis.pause()
        start = time.monotonic()
        with pytest.raises(TierError):
            tier.get(keys, blank(4), 0.1)
        assert time.monotonic() - start < 0.4 + still.seconds
    real_redis.resume()


def test_tcp_works_like_the_unix_socket(real_redis: RealRedis) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    real_redis.kill()
    real_redis.start("--port", str(port), "--bind", "127.0.0.1")
    tier = open_tier(f"redis://127.0.0.1:{port}/1")
    keys, values, into = new_keys(9), new_spans(9), blank(9)
    tier.put(keys, values)
    assert tier.get(keys, into, LONG) == 9
    assert into == values


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_tls_is_verified_and_carries_spans(real_redis: RealRedis, tmp_path: Path) -> None:
    cert, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(secret), "-out", str(cert)]
    subprocess.run(
        ["openssl", "req", "-x509", *curve, "-days", "2", *subject, *files],
        check=True,
        capture_output=True,
    )
    with tls_front(real_redis, cert, secret) as port:
        span = 200_000
        keys, values, into = new_keys(5), new_spans(5, span), blank(5, span)
        tier = open_tier(f"rediss://localhost:{port}?ssl_ca_certs={cert}", span=span)
        tier.put(keys, values)
        assert tier.get(keys, into, LONG) == 5
        assert into == values
        stranger = open_tier(f"rediss://localhost:{port}", span=span)
        with pytest.raises(TierError):
            stranger.ping()


@contextlib.contextmanager
def tls_front(server: RealRedis, cert: Path, secret: Path) -> Iterator[int]:
    """A TLS port before ``server``: the bundled binary is built without TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, secret)

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(server.socket))
        await asyncio.gather(relay(reader, inner_writer), relay(inner_reader, writer))

    loop = asyncio.new_event_loop()
    front = loop.run_until_complete(
        asyncio.start_server(connected, "localhost", 0, ssl=context, family=socket.AF_INET)
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield front.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    front.close()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
