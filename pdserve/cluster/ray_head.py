"""The process that owns a Ray of our own: ``python -m pdserve.cluster.ray_head ARGUMENTS.json``.

ray.init -> one JSON line ``{"address": "host:port"}`` -> SIGTERM -> ray.shutdown

It has a session of its own, so that what the terminal sends to ``pdserve up`` and its group (and
``kill`` or ``timeout`` likewise) does not end Ray before the workers were stopped in order.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from pathlib import Path


def main(path: str) -> int:
    arguments = json.loads(Path(path).read_text(encoding="utf-8"))
    import ray  # noqa: PLC0415  (reads the environment, which the owner has set)

    done = threading.Event()
    ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: done.set())
    print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
    done.wait()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
