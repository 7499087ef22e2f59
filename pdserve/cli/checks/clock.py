"""Timers need a monotonic clock; logs and certificates of several hosts need one time of day."""

from __future__ import annotations

import time

import redis

from pdserve.cli.checks.check import Check
from pdserve.cli.checks.redis_tier import connected
from pdserve.config import Config
from pdserve.errors import ConfigError

_SLEEP_S = 0.1
# Above the first, the lines of two hosts' logs cannot be put in order; above the second,
# certificates are not valid yet, or no longer.
_APART_S = 1.0
_FAR_APART_S = 60.0
_ADVICE = "let an NTP client (chrony, systemd-timesyncd) keep the clock of every host"


def clock(config: Config) -> Check:
    begin = time.monotonic()
    time.sleep(_SLEEP_S)
    took = time.monotonic() - begin
    if not 0.9 * _SLEEP_S < took < 10 * _SLEEP_S:
        text = f"{_SLEEP_S:g} s of sleep took {took:.3f} s by the monotonic clock"
        return Check("clock", False, text, remedy="the host is overloaded or its clock is broken")
    text = f"{_SLEEP_S:g} s of sleep took {took:.3f} s"
    ahead = _ahead_of_redis(config)
    if ahead is None:
        return Check("clock", True, f"{text}; no other host to compare the time of day with")
    text = f"{text}; {abs(ahead):.2f} s {'ahead of' if ahead > 0 else 'behind'} Redis' host"
    return Check(
        "clock", abs(ahead) < _APART_S, text, fatal=abs(ahead) >= _FAR_APART_S, remedy=_ADVICE
    )


def _ahead_of_redis(config: Config) -> float | None:
    """Our time of day less that of Redis' host, in seconds; None where it cannot be asked."""
    if config.cache.redis.mode != "url":
        return None
    try:
        with connected(config.cache.redis) as client:
            begin = time.time()
            seconds, micros = client.time()
            return (begin + time.time()) / 2 - (int(seconds) + int(micros) / 1e6)
    except (redis.RedisError, ConfigError):
        return None  # what is wrong with it is another check's line; TIME may not be allowed
