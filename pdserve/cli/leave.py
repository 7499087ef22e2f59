"""``pdserve leave``: takes this host out of a Ray cluster, once its workers have moved.

find this host among Ray's -> tell Ray that it leaves
  -> the cluster's owner drains its workers and starts them elsewhere (pdserve/cluster/leaving.py)
  -> nothing uses Ray's processes here any more: they end | time is up: they go on, exit status 1

For a host's own service manager, before it stops ``ray start``, and for a pod's preStop.
"""

from __future__ import annotations

import argparse
import math

from pdserve.cluster.host_leave import leave
from pdserve.errors import ConfigError


def run(parsed: argparse.Namespace) -> int:
    head, _, port = parsed.address.rpartition(":")
    if not head or not port.isdecimal():
        raise ConfigError(f"--address: {parsed.address!r}; expected host:port of Ray's head")
    if not math.isfinite(parsed.within) or parsed.within <= 0:
        raise ConfigError(f"--within: {parsed.within:g}; expected more than 0 seconds")
    leave(parsed.address, parsed.host, parsed.within, lambda text: print(text, flush=True))
    return 0
