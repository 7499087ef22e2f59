"""``python -m pdserve.engine.fetch --config FILE``: puts the model where workers read it.

For hosts that start before the owner of the cluster does: every worker is told one path, so the
same configuration must have put the model there on its own host too. Prints the path.

Exit status: 0 it is there, 2 it cannot be had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pdserve.config_load import load_config
from pdserve.engine.progress import Progress
from pdserve.engine.resolve import cache_folder, prepare_model
from pdserve.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdserve.engine.fetch")
    parser.add_argument("--config", metavar="FILE", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.set)
        prepared = prepare_model(config.model, cache_folder(config), _say)
    except ConfigError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 2
    print(prepared.path)
    return 0


def _say(step: Progress) -> None:
    print(step.text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
