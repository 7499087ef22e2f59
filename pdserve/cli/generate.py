"""``pdserve generate``: one prompt over gRPC, its answer printed as it comes."""

from __future__ import annotations

import argparse
import sys

from pdserve.cli.options import find_fronts
from pdserve.cli.self_question import client_for, way
from pdserve.client import Client, ClientOptions, Message
from pdserve.client.types import Prompt


def run(parsed: argparse.Namespace) -> int:
    fronts = find_fronts(parsed)
    if fronts.http.url:
        client = client_for(fronts.http, fronts.grpc)
    else:  # --address: nothing is known but what the options say
        options = ClientOptions(api_key=fronts.http.api_key, ca_file=fronts.http.certificate)
        client = Client(fronts.grpc, options)
    with client:
        _stream(client, parsed)
    return 0


def _stream(client: Client, parsed: argparse.Namespace) -> None:
    usage = None
    options = {"temperature": parsed.temperature, "seed": parsed.seed}
    for chunk in client.stream(_prompt(parsed), max_tokens=parsed.max_tokens, **options):
        print(chunk.text, end="", flush=True)
        usage = chunk.usage
    print()
    if parsed.usage and usage is not None:
        print(way(usage), file=sys.stderr)


def _prompt(parsed: argparse.Namespace) -> Prompt:
    text: str = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    if parsed.text:
        return text
    system = (Message("system", parsed.system),) if parsed.system else ()
    return (*system, Message("user", text))
