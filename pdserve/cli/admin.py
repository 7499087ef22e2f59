"""``pdserve admin``: changes to a running cluster, asked of its admin service.

Address and credential come from the admin.json that the cluster's owner wrote; --address and
--token-file, that file or the secret of admin.token_file, reach a cluster elsewhere. Prints what
was done.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from pdserve.cli.admin_parser import ROLES, TIERS
from pdserve.cluster.admin_access import AdminAccess, read_access
from pdserve.cluster.run_dir import ADMIN_FILE, state_dir_of
from pdserve.config_load import load_config
from pdserve.errors import ConfigError
from pdserve.rpc.channels import ONE_CALL_S, from_rpc_error, make_channel
from pdserve.rpc.convert import role_to_proto
from pdserve.rpc.tls import internal_tls
from pdserve.types import Role
from pdserve.v1 import admin_pb2 as pb
from pdserve.v1 import admin_pb2_grpc, worker_pb2

_SIZE_MAX = 2**31 - 1


def run(parsed: argparse.Namespace) -> int:
    """1 when a part of the cluster could not be reached. Raises what the service refuses."""
    answer = asyncio.run(_call(find_access(parsed), _REQUESTS[parsed.action](parsed)))
    if parsed.json:
        print(MessageToJson(answer, preserving_proto_field_name=True, indent=2))
    else:
        print("\n".join(_lines(answer)))
    return 1 if _errors(answer) else 0


def find_access(parsed: argparse.Namespace) -> AdminAccess:
    """ConfigError when no cluster of that name runs here and no file was given."""
    given = {"name": parsed.name} if parsed.name else {}
    config = load_config(parsed.config, parsed.set, given)
    path = Path(parsed.token_file) if parsed.token_file else state_dir_of(config) / ADMIN_FILE
    if not parsed.token_file and not path.exists():
        raise ConfigError(
            f"no cluster {config.name!r} runs on this machine; for one elsewhere give --address "
            f"and --token-file, its {ADMIN_FILE}"
        )
    access = read_access(path)
    if config.security.internal_ca:
        tls = internal_tls(config.security)
        access = replace(access, identity=replace(access.identity, tls=tls))
    if parsed.address:
        access = replace(access, address=parsed.address)
    if not access.address:
        raise ConfigError(f"{path} holds a secret alone: give --address HOST:PORT, too")
    return access


Call = Callable[[Any], Awaitable[Message]]  # of a stub of the service


async def _call(access: AdminAccess, call: Call) -> Message:
    async with make_channel(access.address, access.identity, connect_s=ONE_CALL_S) as channel:
        try:
            return await call(admin_pb2_grpc.AdminStub(channel))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


# ---- what is asked -------------------------------------------------------------------------------


def _resize(parsed: argparse.Namespace) -> Call:
    request = pb.ResizeRequest(drain_s=parsed.drain_s)
    for text in parsed.sizes:
        name, _, number = text.partition("=")
        if name not in ROLES or not number.isdecimal() or int(number) > _SIZE_MAX:
            raise ConfigError(
                f"{text}: expected ROLE=N, ROLE one of {', '.join(ROLES)}; for example decode=3"
            )
        request.pools.add(role=role_to_proto(Role(name)), size=int(number))
    return lambda stub: stub.Resize(request)


def _add(parsed: argparse.Namespace) -> Call:
    if not 1 <= parsed.count <= _SIZE_MAX:
        raise ConfigError(f"add {parsed.role} {parsed.count}: expected a number of at least 1")
    request = pb.AddWorkersRequest(role=role_to_proto(Role(parsed.role)), count=parsed.count)
    return lambda stub: stub.AddWorkers(request)


def _drain(parsed: argparse.Namespace) -> Call:
    request = pb.DrainWorkerRequest(worker=parsed.worker, drain_s=parsed.drain_s)
    return lambda stub: stub.DrainWorker(request)


def _remove(parsed: argparse.Namespace) -> Call:
    request = pb.RemoveWorkerRequest(worker=parsed.worker, drain_s=parsed.drain_s)
    return lambda stub: stub.RemoveWorker(request)


def _flush(parsed: argparse.Namespace) -> Call:
    tiers: Sequence[str] = TIERS if "all" in parsed.tiers else parsed.tiers
    return lambda stub: stub.FlushTiers(pb.FlushTiersRequest(tiers=tiers))


def _log_level(parsed: argparse.Namespace) -> Call:
    request = pb.SetLogLevelRequest(level=parsed.level, target=parsed.worker)
    return lambda stub: stub.SetLogLevel(request)


_REQUESTS: Mapping[str, Callable[[argparse.Namespace], Call]] = {
    "pools": lambda parsed: lambda stub: stub.GetPools(pb.GetPoolsRequest()),
    "drain": _drain,
    "undrain": lambda parsed: (
        lambda stub: stub.UndrainWorker(pb.UndrainWorkerRequest(worker=parsed.worker))
    ),
    "remove": _remove,
    "add": _add,
    "resize": _resize,
    "flush": _flush,
    "log-level": _log_level,
}


# ---- what was done -------------------------------------------------------------------------------


def _lines(answer: Any) -> list[str]:
    match answer:
        case pb.GetPoolsResponse():
            busy = [f"under way: {answer.under_way}"] if answer.under_way else []
            return [*map(_pool, answer.pools), *busy]
        case pb.DrainWorkerResponse():
            return [_drained("is drained", answer.drained)]
        case pb.UndrainWorkerResponse():
            return ["takes work again" if answer.was_drained else "was not drained"]
        case pb.ResizeResponse():
            lines = [f"{worker} was added" for worker in answer.added]
            lines += [_drained("was removed", one) for one in answer.removed]
            return [*(lines or ["nothing to do"]), *map(_pool, answer.pools)]
        case pb.FlushTiersResponse():
            return [_flushed(worker) for worker in answer.workers]
        case _:
            return [f"{one.target}: {one.error or f'was {one.before}'}" for one in answer.targets]


def _pool(pool: pb.PoolState) -> str:
    names = [
        one.id + (" (drained)" if one.drained else "") + ("" if one.present else " (not there)")
        for one in pool.workers
    ]
    role = worker_pb2.WorkerRole.Name(pool.role).removeprefix("WORKER_ROLE_").lower()
    return f"{role}: {pool.size} ({pool.min} to {pool.max})  {', '.join(names)}".rstrip()


def _drained(what: str, one: pb.Drained) -> str:
    return (
        f"{one.worker} {what}: {one.finished} attempts ended there, {one.handed_over} went on "
        f"elsewhere, {one.seconds:.1f} s"
    )


def _flushed(worker: pb.FlushedWorker) -> str:
    counts = ", ".join(f"{flushed.blocks} from {flushed.tier}" for flushed in worker.tiers)
    parts = [part for part in (counts, worker.error) if part]
    return f"{worker.worker}: {'; '.join(parts) or 'has no such tier'}"


def _errors(answer: Any) -> bool:
    if isinstance(answer, pb.FlushTiersResponse):
        return any(worker.error for worker in answer.workers)
    if isinstance(answer, pb.SetLogLevelResponse):
        return any(target.error for target in answer.targets)
    return False
