"""One cluster on this machine, from nothing to serving and back.

start_cluster: run opened, ports free
               -> Redis, the model and Ray side by side -> router as soon as the model is there
               -> actors -> all described, and the router told -> admin service -> Cluster
Cluster.stop:  admin service -> router (drains) -> membership -> workers -> Ray -> Redis -> sweep
               -> run closed

Whatever fails or is interrupted on the way up goes the way down from there. The way down ends with
a look for marked processes, and returns only when none is left.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.cluster import orphans, ray_node, router_view
from pdserve.cluster.background import Background
from pdserve.cluster.ports import check_free
from pdserve.cluster.progress import Progress, Silent
from pdserve.cluster.ray_node import LOCAL, RayNode
from pdserve.cluster.redis_server import RedisServer
from pdserve.cluster.router_process import Addresses, RouterProcess, RouterSpec
from pdserve.cluster.run_dir import Run, cluster_token, hash_key, open_run
from pdserve.config import Config
from pdserve.engine.progress import Progress as ModelStep
from pdserve.engine.resolve import PreparedModel, cache_folder, prepare_model
from pdserve.errors import DeadlineExceeded
from pdserve.rpc.identity import Caller, mint
from pdserve.rpc.tls import internal_tls
from pdserve.types import Role, WorkerFacts, WorkerId
from pdserve.worker.boot import ENTRY_POINTS

if TYPE_CHECKING:
    from pdserve.cluster.admin_server import AdminServer
    from pdserve.cluster.keeper import Keeper
    from pdserve.cluster.membership import Membership
    from pdserve.cluster.pools import Pools, PoolSpec

_WORKER_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Secrets:
    token: str
    hash_key: bytes


class Cluster:
    """Owns everything that was started. Made by start_cluster; ``stop`` may be called twice."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        run: Run,
        shared_ray: RayNode | None,
        modules: Mapping[Role, str],
    ) -> None:
        self.config = config
        self.run = run
        self._progress = progress
        self._modules = modules
        self._shared_ray = shared_ray
        self._ray: RayNode | None = shared_ray
        self._redis: RedisServer | None = None
        self._router: RouterProcess | None = None
        self._pools: Pools | None = None
        self._membership: Membership | None = None
        self._keeper: Keeper | None = None
        self._admin: AdminServer | None = None
        # Set when the cluster can no longer do its work and will not mend.
        self.broken = threading.Event()
        self.broken_by = ""
        self._ray_ended = False
        self._stopping = threading.Event()
        self._starting_router = threading.Lock()

    @property
    def addresses(self) -> Addresses:
        assert self._router is not None, "asked before the start was done"
        return self._router.addresses

    @property
    def http(self) -> router_view.Access:
        """How to call the HTTP front from this machine."""
        return router_view.access_to(self.addresses.http, self.config.security)

    @property
    def router_pid(self) -> int:
        return self._router.pid if self._router is not None else 0

    @property
    def redis_url(self) -> str:
        """Empty without a Redis tier."""
        if self._redis is not None:
            return self._redis.url
        return self.config.cache.redis.url

    def workers(self) -> tuple[WorkerFacts, ...]:
        """The workers that exist now."""
        return self._membership.workers() if self._membership is not None else ()

    def wait_workers(self, timeout_s: float) -> None:
        """Waits until every planned worker exists and the router knows it. DeadlineExceeded."""
        from pdserve.cluster.first_workers import all_present  # noqa: PLC0415

        assert self._membership is not None
        if not self._membership.wait(all_present, timeout_s):
            raise DeadlineExceeded(f"not all workers came back within {timeout_s:g} s")

    def kill_worker(self, worker: WorkerId) -> None:
        """Ends its process at once, frozen or not; Ray starts it anew where that is configured."""
        assert self._pools is not None
        assert self._ray is not None
        for facts in self.workers():
            # On this machine the kernel does it, even to a process that is stopped.
            if facts.id == worker and orphans.kill_pid(facts.pid, self._ray.mark):
                return
        self._pools.kill(worker)

    def start(self) -> None:
        """Starts everything; on any failure, or an interrupt, all of it has ended again."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self, drain_s: float | None = None) -> None:
        """Ends everything, in order, and returns when no process is left."""
        with self._starting_router:
            if self._stopping.is_set():
                return
            self._stopping.set()
        try:
            if self._ray_ended and self.config.pools.ray_address == LOCAL:
                drain_s = 0.0  # all workers ended with their Ray: nothing can go on
            self._stop_parts(self.config.timers.drain_s if drain_s is None else drain_s)
        finally:
            orphans.sweep(self.run.state_dir, self.run.run_id)
            self.run.close()

    def _stop_parts(self, drain_s: float) -> None:
        if self._admin is not None:
            self._admin.stop()
        if self._keeper is not None:
            self._keeper.stop()
        if self._router is not None:
            self._router.stop(drain_s)
        if self._membership is not None:
            self._membership.stop()
        if self._pools is not None:
            present = self.workers()
            self._pools.stop([facts.id for facts in present], 0.0, _WORKER_STOP_S)
            self._await_ends([facts.pid for facts in present])
        if self._ray is not None and self._shared_ray is None:
            self._ray.stop()
        if self._redis is not None:
            self._redis.stop()

    def kill(self) -> None:
        """Ends everything at once; for an owner who cannot wait."""
        self._stopping.set()
        orphans.sweep(self.run.state_dir, self.run.run_id, grace_s=0.0)
        shutil.rmtree(self.run.short_dir, ignore_errors=True)

    def _await_ends(self, pids: list[int]) -> None:
        """Workers of a shared Ray carry its mark, not ours: see that they are gone."""
        assert self._ray is not None
        limit = time.monotonic() + _WORKER_STOP_S
        for pid in pids:
            if orphans.mark_of(pid) != self._ray.mark:
                continue
            if not orphans.wait_gone(pid, limit - time.monotonic()):
                orphans.kill_pid(pid, self._ray.mark)

    def _start(self) -> None:
        config, progress = self.config, self._progress
        _check_ports(config)
        secret = Secrets(cluster_token(config), hash_key(config, self.run.state_dir))
        if self.run.orphans:
            progress.note(f"ended {len(self.run.orphans)} processes of an earlier run")
        self._start_redis()
        model = Background("model", self._prepare_model)
        router = Background("router", lambda: self._start_router(model.result(), secret))
        self._start_ray()
        prepared = model.result()
        # Ray reads its environment when it is imported, which start_ray has prepared.
        from pdserve.cluster.pools import Pools, minimum, plan_pools  # noqa: PLC0415

        assert self._ray is not None
        if config.pools.ray_address != LOCAL:
            from pdserve.cluster.slots import await_slots  # noqa: PLC0415

            self._ray = await_slots(
                self._ray,
                minimum(config),
                config.pools.gpus_per_worker,
                config.timers.start_timeout_s,
                progress.note,
            )
        plans = plan_pools(config, self._ray.gpus, self._ray.nodes)
        progress.begin("workers", f"starting {len(plans)} worker{'s' * (len(plans) > 1)}")
        self._pools = Pools(self._pool_spec(prepared, secret), plans)
        self._pools.create()
        router.result()
        if self._redis is not None:
            self._redis.wait_ready()
        self._start_membership(secret)
        self._start_admin(secret)

    def _start_redis(self) -> None:
        if self.config.cache.redis.mode != "local":
            return
        self._redis = RedisServer(
            self.config.cache.redis,
            self.run.short_dir,
            self.run.logs,
            self.run.mark,
            self._progress.note,
        )
        self._redis.start()

    def _prepare_model(self) -> PreparedModel:
        progress = self._progress
        progress.begin("model", f"looking for {self.config.model.path}")

        def step(at: ModelStep) -> None:
            progress.update("model", at.text, (at.index - 1) / max(1, at.total))

        prepared = prepare_model(self.config.model, cache_folder(self.config), step)
        progress.end("model", f"model {prepared.served_name}: {prepared.path}")
        return prepared

    def _start_router(self, prepared: PreparedModel, secret: Secrets) -> None:
        self._progress.begin("router", "starting the router")
        spec = RouterSpec(
            config=self.config,
            model_path=str(prepared.path),
            served_name=prepared.served_name,
            cluster_token=secret.token,
            hash_key=secret.hash_key,
            boot_dir=self.run.boot_dir,
            log=self.run.logs / "router.log",
            mark=self.run.mark,
        )
        router = RouterProcess(spec, self._progress.note)
        with self._starting_router:
            if self._stopping.is_set():  # a stop would no longer see this router
                return
            self._router = router
            router.start()
        router.wait_ready()
        addresses = router.addresses
        self._progress.end("router", f"router: HTTP {addresses.http}, gRPC {addresses.grpc}")
        security = self.config.security
        self.run.record(
            http=self.http.url,
            grpc=router_view.local_address(addresses.grpc),
            certificate=security.tls_cert,
            api_key_file=next(iter(security.api_key_files), ""),
        )

    def _start_ray(self) -> None:
        if self._shared_ray is not None:
            return
        address = self.config.pools.ray_address
        what = "starting Ray" if address == LOCAL else f"joining Ray at {address}"
        self._progress.begin("ray", what)
        self._ray = ray_node.start_ray(
            address,
            self.run.short_dir / "ray",
            self.run.mark,
            _threads(self.config),
            self._on_ray_death,
            self.config.pools.ray_fault_tolerance,
        )
        self._progress.end("ray", "Ray: one of our own" if self._ray.owned else f"Ray: {address}")

    def _on_ray_death(self, what: str) -> None:
        self._ray_ended = True
        self._break(what)

    def _break(self, what: str) -> None:
        if self.broken.is_set():  # one end brings another
            return
        self.broken_by = what
        self.broken.set()

    def _pool_spec(self, prepared: PreparedModel, secret: Secrets) -> PoolSpec:
        from pdserve.cluster.pools import PoolSpec  # noqa: PLC0415

        local = self.config.pools.ray_address == LOCAL
        return PoolSpec(
            config=self.config,
            node=socket.gethostname() if local else "",
            host="127.0.0.1" if local else "",
            model_path=str(prepared.path),
            cluster_token=secret.token,
            hash_key=secret.hash_key,
            redis_url=self.redis_url if self.config.cache.redis.mode != "off" else "",
            threads=_threads(self.config) if local else self.config.pools.threads_per_worker,
            logs=self.run.logs if local else None,
            modules=self._modules,
        )

    def _start_membership(self, secret: Secrets) -> None:
        from pdserve.cluster import pools  # noqa: PLC0415
        from pdserve.cluster.first_workers import await_first  # noqa: PLC0415
        from pdserve.cluster.keeper import Keeper  # noqa: PLC0415
        from pdserve.cluster.membership import Membership  # noqa: PLC0415

        assert self._pools is not None
        assert self._router is not None
        router = self._router
        timers = self.config.timers
        self._membership = Membership(
            self._pools.actors,
            router,
            lambda: router.addresses.internal,
            mint(secret.token, Caller.SUPERVISOR, tls=internal_tls(self.config.security)),
            timers,
            self._progress.note,
            self._pools.renew,
            lambda error: self._break(str(error)),
        )
        self._membership.start()
        minimum = pools.minimum(self.config)
        await_first(self._membership, minimum, timers.start_timeout_s, self.run.logs)
        present = ", ".join(_pool_text(facts) for facts in self.workers())
        self._progress.end("workers", f"workers: {present}")
        access = self.http
        self._keeper = Keeper(
            lambda: router_view.workers(access),
            lambda: self._membership.seen if self._membership is not None else {},
            self.kill_worker,
            timers,
            self._progress.note,
        )
        self._keeper.start()

    def _start_admin(self, secret: Secrets) -> None:
        from pdserve.cluster.admin_server import admin_for  # noqa: PLC0415

        pools, membership, router, ray = self._pools, self._membership, self._router, self._ray
        assert pools is not None
        assert membership is not None
        assert router is not None
        assert ray is not None
        self._admin = admin_for(
            self.config,
            self.run.state_dir,
            secret.token,
            pools,
            membership,
            router,
            ray,
            self.http,
            self._progress.note,
        )
        self._admin.start()


def _pool_text(facts: WorkerFacts) -> str:
    tokens = facts.blocks_total * facts.model.block_size
    return f"{facts.id} (pid {facts.pid}, KV pool of {facts.blocks_total} blocks, {tokens} tokens)"


def _threads(config: Config) -> int:
    return config.pools.threads_per_worker or len(os.sched_getaffinity(0))


def _check_ports(config: Config) -> None:
    router = config.router
    check_free(router.host, router.http_port, "router.http_port")
    check_free(router.host, router.grpc_port, "router.grpc_port")


def open_cluster(
    config: Config,
    progress: Progress | None = None,
    *,
    ray: RayNode | None = None,
    modules: Mapping[Role, str] | None = None,
) -> Cluster:
    """Takes the cluster's name and cleans up after a killed run of it; starts nothing yet.

    ``ray`` lends a Ray that is already started (one for several clusters); it is not stopped.
    ``modules`` says where each role's ``start_worker`` is. Raises ConfigError.
    """
    run = open_run(config)
    return Cluster(config, progress or Silent(), run, ray, modules or ENTRY_POINTS)


def start_cluster(
    config: Config,
    progress: Progress | None = None,
    *,
    ray: RayNode | None = None,
    modules: Mapping[Role, str] | None = None,
) -> Cluster:
    """open_cluster and Cluster.start: returns when every worker serves and the router knows it.

    Raises PdserveError; ConfigError for what the user can mend. Call from the main thread.
    """
    cluster = open_cluster(config, progress, ray=ray, modules=modules)
    cluster.start()
    return cluster
