"""Enough workers, trouble and neither are three outcomes, however they follow each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.cluster.first_workers import Start, Trouble, await_first, judge
from pdserve.errors import ConfigError, DeadlineExceeded, WorkerLost
from pdserve.types import Role

MINIMUM = {Role.PREFILL: 1, Role.DECODE: 1}
REFUSAL = SimpleNamespace(code=ConfigError.code, message="the model does not fit")


def one(role: str = "", deaths: int = 0, failure: Any = None) -> Any:
    """``role``: it is present."""
    facts = SimpleNamespace(role=Role(role)) if role else None
    return SimpleNamespace(facts=facts, deaths=deaths, failure=failure)


def look(**workers: Any) -> Mapping[Any, Any]:
    return {name.replace("_", "-"): seen for name, seen in workers.items()}


def test_starting_serving_and_trouble_are_told_apart() -> None:
    assert judge(look(prefill_0=one(), decode_0=one()), MINIMUM) is Start.STARTING
    assert judge(look(prefill_0=one("prefill"), decode_0=one()), MINIMUM) is Start.STARTING
    both = look(prefill_0=one("prefill"), decode_0=one("decode"), decode_1=one())
    assert judge(both, MINIMUM) is Start.SERVING
    dead = judge(look(prefill_0=one("prefill"), decode_0=one(deaths=1)), MINIMUM)
    assert isinstance(dead, Trouble)
    assert (dead.worker, str(dead.error("said"))) == (
        "decode-0",
        "decode-0 died while it started: said",
    )
    refusing = judge(look(prefill_0=one(failure=REFUSAL), decode_0=one(deaths=1)), MINIMUM)
    assert isinstance(refusing, Trouble)
    assert isinstance(refusing.error(), ConfigError)
    assert str(refusing.error()) == "prefill-0: the model does not fit"


def test_one_that_died_and_is_there_again_does_not_make_the_others_present() -> None:
    assert judge(look(prefill_0=one("prefill", deaths=1), decode_0=one()), MINIMUM) is (
        Start.STARTING
    )


def test_an_extra_worker_in_trouble_does_not_keep_enough_from_serving() -> None:
    extra = look(prefill_0=one("prefill"), decode_0=one("decode"), decode_1=one(failure=REFUSAL))
    assert judge(extra, MINIMUM) is Start.SERVING


class Scripted:
    """What is seen, look by look; the last one stays. ``pushed``: the router was told."""

    def __init__(self, *looks: Mapping[Any, Any], pushed: bool = True) -> None:
        self._looks = list(looks)
        self._pushed = pushed

    @property
    def seen(self) -> Mapping[Any, Any]:
        return self._looks[0]

    def wait(self, done: Callable[[Mapping[Any, Any]], bool], timeout_s: float) -> bool:
        while len(self._looks) > 1 and not done(self.seen):
            self._looks.pop(0)
        held = done(self.seen) and self._pushed
        if len(self._looks) > 1:
            self._looks.pop(0)  # it goes on before anybody looks again
        return held


def start(tmp_path: Path, *looks: Mapping[Any, Any], pushed: bool = True) -> None:
    membership: Any = Scripted(*looks, pushed=pushed)
    await_first(membership, MINIMUM, 0.05, tmp_path)


STARTING = look(prefill_0=one("prefill"), decode_0=one())
SERVING = look(prefill_0=one("prefill"), decode_0=one("decode"))
DEAD = look(prefill_0=one("prefill"), decode_0=one(deaths=1))


def test_the_start_ends_by_what_is_so_when_it_is_looked_at(tmp_path: Path) -> None:
    start(tmp_path, STARTING, SERVING)
    start(tmp_path, STARTING, DEAD, STARTING, SERVING)
    with pytest.raises(DeadlineExceeded, match="decode-0 did not start within"):
        start(tmp_path, STARTING)
    with pytest.raises(DeadlineExceeded, match="the router did not take its workers"):
        start(tmp_path, SERVING, pushed=False)
    (tmp_path / "decode-0.log").write_text("out of luck\n")
    with pytest.raises(WorkerLost, match="decode-0 died while it started: out of luck"):
        start(tmp_path, STARTING, DEAD)
