"""What this machine has and lacks; each check looks at the real thing and answers in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

from pdserve.cli.checks import (
    clock,
    devices,
    disk,
    hand_off,
    memory,
    model,
    redis_tier,
    running,
    software,
)
from pdserve.cli.checks.check import Check
from pdserve.config import Config
from pdserve.errors import PdserveError

_CHECKS: tuple[tuple[str, Callable[[Config], Check]], ...] = (
    ("python", software.python),
    ("packages", software.packages),
    ("stubs", software.stubs),
    ("compiler", software.compiler),
    ("traces", software.traces),
    ("memory", memory.memory),
    ("shared memory", memory.shared_memory),
    ("object store", memory.object_store),
    ("gpus", devices.gpus),
    ("disk", disk.disk),
    ("model", model.model),
    ("redis", redis_tier.redis_server),
    ("clock", clock.clock),
    ("cluster", running.cluster),
    ("ports", running.ports),
)


def all_checks(config: Config) -> Iterator[Check]:
    """Each as it is done."""
    yield from machine_checks(config)
    yield from hand_off.hand_offs(config)


def machine_checks(config: Config) -> Iterator[Check]:
    """All but the hand-offs. One that cannot even look is BAD and hides none of the others."""
    for name, look in _CHECKS:
        yield _guarded(name, look, config)


def _guarded(name: str, look: Callable[[Config], Check], config: Config) -> Check:
    try:
        return look(config)
    except (PdserveError, OSError, subprocess.SubprocessError) as error:
        return Check(name, False, str(error))
