"""``pdserve bench``: load on a running cluster, or on any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import ssl
import sys
from pathlib import Path

from rich.console import Console

from pdserve.bench import command
from pdserve.bench.command import Front, Options
from pdserve.cli.options import find_fronts
from pdserve.cluster import router_view
from pdserve.config import SecurityConfig
from pdserve.errors import ConfigError

_FILE_COLUMNS = 110


def run(parsed: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(parsed, name) for name in names})
    path = Path(parsed.out) if parsed.out else None
    if path is not None and not path.parent.is_dir():  # said before the load, not after it
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")
    # A file or a pipe has no width of its own, and rich would take one that wraps every cell.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_COLUMNS)
    answered = asyncio.run(command.run(options, _front(parsed), path, console))
    return 0 if answered else 1


def _front(parsed: argparse.Namespace) -> Front:
    if not parsed.url:
        access = find_fronts(parsed).http
        return Front(access.url, access.api_key, router_view.tls_context(access))
    # A server somewhere: it gets no key of the cluster that runs here.
    key_files = (parsed.api_key_file,) if parsed.api_key_file else ()
    key = router_view.first_api_key(SecurityConfig(api_key_files=key_files))
    return Front(parsed.url, key, _trusting(parsed.ca_file) if parsed.ca_file else None)


def _trusting(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ca-file {ca_file}: {error}") from error
