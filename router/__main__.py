"""``python -m router BOOT.json``: one router process, see router/boot.py for its start file.

Exit status: 0 after a signal, 2 when the configuration or an address is no good.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys

from pdserve.errors import ConfigError
from pdserve.telemetry import setup_logging
from router.boot_file import read_boot
from router.server import Addresses, serve


def _announce(addresses: Addresses) -> None:
    """The one line on standard output; the log goes to standard error."""
    print(json.dumps(dataclasses.asdict(addresses)), flush=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m router BOOT.json", file=sys.stderr)
        return 2
    try:
        boot = read_boot(arguments[0])
        setup_logging(boot.config.log, "router")
        asyncio.run(serve(boot, _announce))
    except ConfigError as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
