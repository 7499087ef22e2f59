"""The process that owns a Ray of our own: ``python -m pdserve.cluster.ray_head ARGUMENTS.json``.

ray.init -> one JSON line ``{"address": "host:port"}`` -> SIGTERM -> ray.shutdown
            control plane ended -> started again, on its port and its tables -> ...

It has a session of its own, so that what the terminal sends to ``pdserve up`` and its group (and
``kill`` or ``timeout`` likewise) does not end Ray before the workers were stopped in order.

With fault tolerance the control plane (GCS) keeps its tables in a folder; Ray's own processes and
the workers wait for it as long as it takes. Without, its end is for good: streams run on, but no
worker is started again.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
_BACKOFF_MAX_S = 5.0
# One that ran for so long is no sign of trouble with the next.
_SETTLED_S = 10.0
_NEVER_STARTED = -1


class ControlPlane:
    """Ray's GCS, as the process that started it sees it; Ray itself has no public call for it."""

    def __init__(self) -> None:
        from ray._private import ray_constants, worker  # noqa: PLC0415

        self._node: Any = worker.global_worker.node
        self._kind = ray_constants.PROCESS_TYPE_GCS_SERVER

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        started = self._node.all_processes.get(self._kind)
        if not started:
            return _NEVER_STARTED
        code: int | None = started[0].process.poll()
        return code

    def restart(self) -> None:
        """On the port that it had, which everybody knows; it reads its tables before it serves."""
        if self._node.all_processes.get(self._kind):
            self._node.kill_gcs_server(check_alive=False)
        self._node.start_gcs_server()


def keep(plane: ControlPlane, done: threading.Event) -> None:
    """Starts the control plane again whenever it ended, until ``done``."""
    pause, restarted = _LOOK_S, -math.inf
    while not done.wait(pause):
        code = plane.ended()
        if code is None:
            if time.monotonic() - restarted > _SETTLED_S:
                pause = _LOOK_S
            continue
        restarted = time.monotonic()
        logger.warning("Ray's control plane ended with code %d; starting it again", code)
        try:
            plane.restart()
        except OSError as error:
            # A full disk, for one. Workers and streams need this process: it tries again.
            logger.warning("Ray's control plane could not be started: %s", error)
        pause = min(_BACKOFF_MAX_S, pause * 2)


def main(path: str) -> int:
    logging.basicConfig(format="%(asctime)s %(message)s")
    arguments = json.loads(Path(path).read_text(encoding="utf-8"))
    import ray  # noqa: PLC0415  (reads the environment, which the owner has set)

    done = threading.Event()
    ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **arguments["init"])
    signal.signal(signal.SIGTERM, lambda number, frame: done.set())
    print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
    if arguments["fault_tolerance"]:
        keep(ControlPlane(), done)
    done.wait()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
