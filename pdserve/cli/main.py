"""``pdserve``: reads the command line, runs one command, turns errors into one line each.

Exit status: 0 done, 1 it failed, 2 the command line or the configuration is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence

from pdserve.cli.admin_parser import add_admin

_COMMANDS = {
    "up": "start a cluster on this machine and serve until Ctrl-C",
    "status": "show a running cluster: live on a terminal, else once",
    "admin": "change a running cluster: drain, add, remove, resize, flush, log level",
    "leave": "take this host out of a Ray cluster, once its workers have moved",
    "generate": "send one prompt and print the answer as it comes",
    "bench": "offer load to a server and measure how it is answered",
    "doctor": "check whether this machine can run a cluster",
}


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file, see docs/configuration.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any key of the configuration; may be repeated",
    )
    parser.add_argument("--name", help="the cluster's name on this machine")


def _add_up(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    pools = parser.add_argument_group("workers")
    pools.add_argument("--prefill", type=int, metavar="N", help="workers that read prompts")
    pools.add_argument("--decode", type=int, metavar="N", help="workers that write answers")
    pools.add_argument(
        "--mixed",
        type=int,
        metavar="N",
        help="workers that do both; alone, they replace the others",
    )
    pools.add_argument("--gpus", type=int, metavar="N", help="GPUs of each worker: 0 or 1")
    pools.add_argument(
        "--address", dest="ray_address", metavar="HOST:PORT", help="Ray cluster to join, or auto"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="PATH_OR_HUB_ID", help="what is served")
    model.add_argument("--served-model-name", metavar="NAME", help="what clients call it")
    model.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and answer")
    model.add_argument("--dtype", help="auto, bfloat16, float16, float32 or float64")
    model.add_argument("--numerics", help="fast or exact")
    fronts = parser.add_argument_group("fronts")
    fronts.add_argument("--host", help="address to listen on")
    fronts.add_argument("--port", type=int, metavar="PORT", help="HTTP; 0 picks one")
    fronts.add_argument("--grpc-port", type=int, metavar="PORT", help="gRPC; 0 picks one")
    fronts.add_argument("--api-key-file", action="append", metavar="FILE", help="one key a line")
    fronts.add_argument("--tls-cert", metavar="FILE", help="PEM certificate")
    fronts.add_argument("--tls-key", metavar="FILE", help="PEM key")
    fronts.add_argument(
        "--strict",
        action="store_true",
        default=None,
        help="refuse requests that no prefill worker can read",
    )


def _add_reach(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--api-key-file", metavar="FILE", help="first key of this file")
    parser.add_argument("--ca-file", metavar="FILE", help="PEM certificate to trust")


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_reach(parser)
    parser.add_argument("--url", help="base URL of the HTTP front; default: the named cluster's")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="the answer of GET /workers")
    how.add_argument("--once", action="store_true", help="one table, also on a terminal")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")


def _add_leave(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", required=True, metavar="HOST:PORT", help="of the Ray cluster's head"
    )
    parser.add_argument("--host", default="", help="this host's address in it; default: found out")
    parser.add_argument(
        "--within", type=float, default=60.0, metavar="S", help="seconds to wait; default: 60"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_reach(parser)
    parser.add_argument("prompt", help="what to ask; - reads it from standard input")
    parser.add_argument("--address", help="host:port of gRPC; default: the named cluster's")
    parser.add_argument("--text", action="store_true", help="continue the text as it is, no chat")
    parser.add_argument("--system", default="", help="system message of the chat")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--usage", action="store_true", help="say how the answer was made")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_reach(parser)
    parser.add_argument("--url", help="of any OpenAI-compatible server; default: the cluster's")
    parser.add_argument("--model", metavar="NAME", help="default: the first that is served")
    parser.add_argument("--plain", action="store_true", help="send only OpenAI's own fields")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON; default: a dated name")
    work = parser.add_argument_group("what is asked")
    work.add_argument("--rate", type=float, metavar="PER_S", help="Poisson arrivals; inf: at once")
    work.add_argument(
        "--trace",
        metavar="FILE",
        help="Mooncake JSONL or Azure CSV; sample:mooncake and sample:azure are at hand",
    )
    work.add_argument("--scale", type=float, default=1.0, help="of the trace's lengths, up to 1")
    work.add_argument("--speed", type=float, default=1.0, help="of the trace's clock")
    work.add_argument("--requests", type=int, metavar="N", help="default: 64, or the whole trace")
    work.add_argument("--input-tokens", type=int, default=256, metavar="N")
    work.add_argument("--output-tokens", type=int, default=64, metavar="N")
    work.add_argument("--prompt-ids", default="1000:30000", metavar="LOW:HIGH", help="token ids")
    work.add_argument("--seed", type=int, default=0)
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--concurrency", type=int, metavar="N", help="most requests in flight")
    how.add_argument("--repeats", type=int, default=1, metavar="N", help="runs; intervals need 2")
    how.add_argument("--warmup", type=int, default=1, metavar="N", help="requests not measured")
    how.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="for goodput: first token")
    how.add_argument(
        "--slo-itl-ms", type=float, metavar="MS", help="for goodput: an answer's mean per token"
    )
    how.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", dest="timeout_s", help="of a request"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdserve", description="Serves a language model from prefill and decode workers."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    adders = {
        "up": _add_up,
        "status": _add_status,
        "admin": lambda parser: add_admin(parser, _add_config),
        "leave": _add_leave,
        "generate": _add_generate,
        "bench": _add_bench,
        "doctor": _add_doctor,
    }
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        adders.get(name, _add_config)(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.version:
        metadata = importlib.import_module("importlib.metadata")
        print(f"pdserve {metadata.version('pdserve')}")
        return 0
    if parsed.command is None:
        parser.print_help()
        return 2
    return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    importlib.import_module("pdserve.cluster")  # has a word with gRPC before it comes in
    from pdserve.errors import ConfigError, PdserveError  # noqa: PLC0415

    try:
        command = importlib.import_module(f"pdserve.cli.{parsed.command}")
        return int(command.run(parsed))
    except ConfigError as error:
        _complain(parsed.command, error)
        return 2
    except PdserveError as error:
        _complain(parsed.command, error)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _complain(parsed.command, f"disk full: cannot write {error.filename or 'a file'}")
        return 2
    except KeyboardInterrupt:
        return 130


def _complain(command: str, error: object) -> None:
    print(f"pdserve {command}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
