"""The admin service's server: a port and a thread of its own in the process that owns the cluster.

start (listens, writes admin.json) -> ... -> stop (ends changes under way, removes admin.json)

On a joined Ray the same thread looks after hosts that leave: both change the pools, one at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster import router_view
from pdserve.cluster.admin_access import AdminAccess, access_text
from pdserve.cluster.admin_service import AdminService
from pdserve.cluster.fleet import Fleet
from pdserve.cluster.leaving import Leaving
from pdserve.cluster.membership import Membership
from pdserve.cluster.owner_calls import OwnerCalls
from pdserve.cluster.pools import Pools, plan_worker
from pdserve.cluster.ray_node import RayNode
from pdserve.cluster.router_process import RouterProcess
from pdserve.cluster.run_dir import ADMIN_FILE, read_token, write_private
from pdserve.config import AdminConfig, Config
from pdserve.errors import InternalError
from pdserve.rpc.channels import bind, make_server
from pdserve.rpc.identity import Caller, Identity, admin_caller, mint, taking_admin
from pdserve.rpc.tls import internal_tls
from pdserve.v1 import admin_pb2_grpc

_START_S = 10.0
_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Served:
    """What runs in the server's loop."""

    service: AdminService
    leaving: Leaving | None  # None: on a Ray of our own no host leaves


class AdminServer:
    """``identity`` is the owner's; ``caller`` is what admin.json lets its reader be."""

    def __init__(
        self,
        config: AdminConfig,
        identity: Identity,
        caller: Identity,
        make_served: Callable[[], Served],
        state_dir: Path,
    ) -> None:
        self._config = config
        self._identity = identity
        self._caller = caller
        self._make_served = make_served
        self._path = state_dir / ADMIN_FILE
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._listening = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)

    def start(self) -> None:
        """Returns when it listens. ConfigError when the address is taken."""
        self._thread.start()
        if not self._listening.wait(_START_S):
            raise InternalError(f"the admin service did not start within {_START_S:g} s")
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_STOP_S)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # handed to whoever started this
            self._error = error
        finally:
            self._listening.set()
            self._loop.close()

    async def _serve(self) -> None:
        served = self._make_served()
        server = make_server(self._identity)
        admin_pb2_grpc.add_AdminServicer_to_server(served.service, server)
        host = self._config.host
        port = bind(server, f"{_bracketed(host)}:{self._config.port}", self._identity.tls)
        await server.start()
        self.address = f"{_bracketed(host)}:{port}"
        write_private(self._path, access_text(AdminAccess(self.address, self._caller)))
        self._listening.set()
        watches = [asyncio.create_task(served.leaving.run())] if served.leaving is not None else []
        await self._stop.wait()
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        await served.service.close()
        await server.stop(1.0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def admin_for(
    config: Config,
    state_dir: Path,
    token: str,
    pools: Pools,
    membership: Membership,
    router: RouterProcess,
    ray: RayNode,
    access: router_view.Access,
    note: Callable[[str], None],
) -> AdminServer:
    """The server of a cluster whose first workers serve; not started."""
    tls = internal_tls(config.security)
    owner = mint(token, Caller.SUPERVISOR, tls=tls)

    def make_served() -> Served:
        calls = OwnerCalls(owner, lambda: router.addresses.internal)
        fleet = Fleet(
            config,
            pools,
            membership,
            calls,
            lambda worker, role, total: plan_worker(config, worker, role, total, ray),
            lambda: router_view.states(access),
            note,
        )
        leaving = None if ray.owned else Leaving(fleet, membership, pools.groups, note)
        return Served(AdminService(fleet, membership, calls, note), leaving)

    caller = mint(token, Caller.ADMIN, tls=tls)
    if path := config.admin.token_file:
        caller = admin_caller(read_token(path, "admin.token_file"), tls=tls)
    served = taking_admin(owner, caller)
    return AdminServer(config.admin, served, caller, make_served, state_dir)
