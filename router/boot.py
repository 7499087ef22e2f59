"""What a router process is told when it starts: ``python -m router BOOT.json``.

The file is written by the owner of the cluster with mode 0600, since it holds secrets, and is read
once. The router answers on its standard output with one JSON line ``{"http": "host:port",
"grpc": "host:port", "internal": "host:port"}`` when its fronts listen.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config import Config
from pdserve.rpc.identity import Identity


@dataclass(frozen=True, slots=True)
class RouterBoot:
    config: Config
    model_path: str  # local folder with tokenizer, config and generation_config
    served_name: str
    identity: Identity
    hash_key: bytes  # hex in the file
    run_dir: str
    # host:port for the Membership service (internal); port 0 picks one.
    internal_address: str = "127.0.0.1:0"
