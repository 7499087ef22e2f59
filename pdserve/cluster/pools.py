"""Which workers a configuration asks for, and their actors in Ray.

plan_pools (pure) -> Pools.create -> ... Pools.kill (Ray restarts it) ... -> Pools.stop
                     (measures the hosts' memory, once for all starts of their workers)

All are asked for at once. One for which no node has room waits in Ray, whose autoscaler hears of
it, and starts when a node comes.

An actor is detached, named after its worker in the cluster's namespace, and sits in a placement
group of its own, so that a worker of several devices can later be placed as one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from pdserve.cluster.actor import ActorBoot, WorkerActor
from pdserve.cluster.ray_node import RayNode
from pdserve.config import Config
from pdserve.engine.host_memory import Memory, measure_host
from pdserve.errors import ConfigError, InternalError
from pdserve.rpc.identity import Caller, mint
from pdserve.rpc.tls import internal_tls
from pdserve.types import Role, WorkerId
from pdserve.worker.boot import WorkerBoot

_CALLERS = {
    Role.PREFILL: Caller.PREFILL,
    Role.DECODE: Caller.DECODE,
    Role.MIXED: Caller.DECODE,
}

logger = logging.getLogger(__name__)

_RAY_CALLS_S = 5.0
# A host's first task waits for a process of Ray's.
_MEASURE_S = 20.0


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to be."""

    id: WorkerId
    role: Role
    gpus: float  # share of a GPU; 0 runs on the CPU
    sharing: int  # workers, this one included, that share its memory
    # Of these, those that are sized as if they held one copy of the weights together. One that
    # comes later may find nobody who maps its copy: it is sized as if it held one alone.
    weights_holders: int = 1


def counts(config: Config) -> dict[Role, int]:
    pools = config.pools
    return {Role.PREFILL: pools.prefill, Role.DECODE: pools.decode, Role.MIXED: pools.mixed}


def minimum(config: Config) -> dict[Role, int]:
    """How many of each role there have to be before the cluster serves."""
    pools = config.pools
    least = {
        Role.PREFILL: pools.prefill_min,
        Role.DECODE: pools.decode_min,
        Role.MIXED: pools.mixed_min,
    }
    return {role: least[role] or count for role, count in counts(config).items()}


def plan_pools(config: Config, gpus: float, nodes: int) -> tuple[WorkerPlan, ...]:
    """The workers of a cluster that starts on ``nodes`` hosts with ``gpus`` in all.

    Those that serving starts with share GPUs evenly when there are fewer GPUs than these; the
    others wait for nodes of their own. ConfigError without any GPU where one is asked for.
    """
    wanted = counts(config)
    total = sum(minimum(config).values())
    # Memory keeps nobody off a host, so all may come to share what there is now.
    share, sharing = 0.0, max(1, math.ceil(sum(wanted.values()) / max(1, nodes)))
    if config.pools.gpus_per_worker:
        if gpus < 1:
            raise ConfigError("pools.gpus_per_worker = 1, but Ray finds no GPU here")
        sharing = max(1, math.ceil(total / math.floor(gpus)))
        share = 1.0 if sharing == 1 else math.floor(1000 / sharing) / 1000
    return tuple(
        WorkerPlan(WorkerId(f"{role.value}-{index}"), role, share, sharing, sharing)
        for role, count in wanted.items()
        for index in range(count)
    )


def plan_worker(
    config: Config, worker: WorkerId, role: Role, total: int, node: RayNode
) -> WorkerPlan:
    """One more worker beside ``total`` others; it shares the memory of a host as if all moved up.

    It takes a whole GPU: those that are there keep their shares.
    """
    gpus = float(config.pools.gpus_per_worker)
    return WorkerPlan(
        worker, role, gpus, 1 if gpus else math.ceil((total + 1) / max(1, node.nodes))
    )


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What all workers of a cluster have in common."""

    config: Config
    node: str  # empty: each finds out where Ray put it
    host: str
    model_path: str
    cluster_token: str
    hash_key: bytes
    redis_url: str
    threads: int
    logs: Path | None  # None leaves output to Ray
    modules: Mapping[Role, str]  # where each role's start_worker is


def namespace_of(config: Config) -> str:
    return f"pdserve-{config.name}"


class Pools:
    """Owns the actors. ``add`` and ``remove`` are called by one thread at a time."""

    def __init__(self, spec: PoolSpec, plans: Sequence[WorkerPlan]) -> None:
        self._spec = spec
        self.plans = tuple(plans)
        self.actors: dict[WorkerId, Any] = {}
        self._groups: dict[WorkerId, PlacementGroup] = {}
        self._names: dict[WorkerId, int] = {}  # how many names a worker has used up
        self._added: dict[WorkerId, WorkerPlan] = {}  # gone ones too
        self._ended: weakref.WeakSet[Any] = weakref.WeakSet()  # actors that were ended on purpose
        self._stopped = False
        self._changing = threading.Lock()  # of who has which actor, and of all above
        self._memory: Mapping[str, Memory] = {}

    def create(self) -> None:
        """Asks Ray for all actors at once and returns; they start side by side."""
        self._end_leftovers()
        self._memory = _measure_hosts()
        for plan in self.plans:
            self.add(plan)

    def add(self, plan: WorkerPlan) -> Any:
        """Asks Ray for one more actor, and returns its handle."""
        self._check_open()
        self._added[plan.id] = plan
        name = self._name(plan.id)
        # Named, so that a later run finds what a killed one left.
        group = placement_group(
            [_bundle(plan)], lifetime="detached", name=f"{namespace_of(self._spec.config)}/{name}"
        )
        try:
            actor = self._actor(plan, group, name)
        except BaseException:
            remove_placement_group(group)
            raise
        with self._changing:
            self.actors[plan.id], self._groups[plan.id] = actor, group
            stopped = self._stopped
        if stopped:
            _kill(actor, group)
        else:
            # The start begins with the first question; membership asks again, and hears the answer.
            actor.describe.remote()
        return actor

    def remove(self, worker: WorkerId, present: bool, timeout_s: float) -> None:
        """Ends a worker for good: in order where it is ``present``, within ``timeout_s``."""
        self._end(worker, present, timeout_s)
        with self._changing:
            for known in (self.actors, self._groups):
                known.pop(worker, None)

    def replace(self, worker: WorkerId, present: bool, timeout_s: float) -> Any:
        """Ends a worker, and asks for another as it was planned, wherever there is room now.

        May be called again after it raised.
        """
        self._end(worker, present, timeout_s)
        return self.add(self._added[worker])

    def groups(self) -> dict[WorkerId, PlacementGroup]:
        """Where Ray puts each worker."""
        with self._changing:
            return dict(self._groups)

    def _end(self, worker: WorkerId, present: bool, timeout_s: float) -> None:
        self._check_open()
        with self._changing:
            actor, group = self.actors[worker], self._groups[worker]
            self._ended.add(actor)
        if present:
            ray.wait([actor.stop.remote(0.0)], timeout=timeout_s)
            self._check_open()
        _kill(actor, group)

    def _check_open(self) -> None:
        """After ``stop`` Ray may be left already, and a call to it would join one anew."""
        with self._changing:
            if self._stopped:
                raise InternalError("the workers are being stopped")

    def _name(self, worker: WorkerId) -> str:
        """Another one each time: Ray gives a name back some time after its holder's end."""
        with self._changing:
            number = self._names.get(worker, 0)
            self._names[worker] = number + 1
        return f"{worker}.{number}"

    def renew(self, worker: WorkerId, silent: Any) -> Any | None:
        """Another actor in the place of one that Ray says nothing of any more; None: it may not.

        Ray does not tell an owner that outlived its head what becomes of actors from before
        (decision 5): it starts them again, and the owner's handles never hear of that. May raise
        what Ray raises, or take for ever; whoever asks again gets what a late call made.
        """
        if not self._spec.config.pools.restart_workers:
            return None
        with self._changing:
            actor = self.actors.get(worker)
            if actor is None or actor in self._ended or self._stopped:
                return None
            if actor is not silent:
                return actor
            group = self._groups[worker]
        ray.kill(actor, no_restart=True)
        made = self._actor(self._added[worker], group, self._name(worker))
        with self._changing:
            wanted = self.actors.get(worker) is actor and actor not in self._ended
            if wanted and not self._stopped:
                self.actors[worker] = made
                made.describe.remote()
                return made
        ray.kill(made, no_restart=True)  # the worker was removed meanwhile
        return None

    def kill(self, worker: WorkerId) -> None:
        """Ends a worker at once; Ray starts it anew, where workers are restarted."""
        actor = self.actors.get(worker)
        if actor is not None:  # None: it was removed meanwhile
            ray.kill(actor, no_restart=not self._spec.config.pools.restart_workers)

    def stop(self, present: Sequence[WorkerId], drain_s: float, timeout_s: float) -> None:
        """Lets those present end side by side, then ends what is left; takes bounded time."""
        # Calls to a Ray that is broken may never return.
        thread = threading.Thread(
            target=self._stop, args=(present, drain_s, timeout_s), name="pools-stop", daemon=True
        )
        thread.start()
        thread.join(timeout_s + _RAY_CALLS_S)

    def _stop(self, present: Sequence[WorkerId], drain_s: float, timeout_s: float) -> None:
        with self._changing:
            self._stopped = True  # a change of the pools that is under way leaves nothing behind
            actors, groups = dict(self.actors), dict(self._groups)
        try:
            # One that has no place yet would not answer.
            calls = [actors[worker].stop.remote(drain_s) for worker in present if worker in actors]
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
            for actor in actors.values():
                ray.kill(actor, no_restart=True)
            for group in groups.values():
                remove_placement_group(group)
        except (RayError, RuntimeError) as error:
            # Their processes are ended all the same, by whoever owns the run.
            logger.warning("Ray could not stop all workers: %s", error)
        self.actors.clear()
        self._groups.clear()

    def _actor(self, plan: WorkerPlan, group: PlacementGroup, name: str) -> Any:
        restarts = -1 if self._spec.config.pools.restart_workers else 0
        options: dict[str, Any] = {
            "name": name,
            "namespace": namespace_of(self._spec.config),
            "lifetime": "detached",
            # Two cores hold more than two workers; threads are set by the worker itself.
            "num_cpus": 0,
            "num_gpus": plan.gpus,
            "resources": {plan.role.value: 1},
            "max_restarts": restarts,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
        }
        return ray.remote(WorkerActor).options(**options).remote(self._boot(plan))

    def _boot(self, plan: WorkerPlan) -> ActorBoot:
        spec = self._spec
        worker = WorkerBoot(
            config=spec.config,
            worker_id=plan.id,
            role=plan.role,
            node=spec.node,
            host=spec.host,
            model_path=spec.model_path,
            pool_blocks=spec.config.engine.pool_blocks,
            identity=mint(
                spec.cluster_token, _CALLERS[plan.role], tls=internal_tls(spec.config.security)
            ),
            hash_key=spec.hash_key,
            redis_url=spec.redis_url,
            # Ray shows a worker its own GPU alone.
            device="cuda:0" if plan.gpus else "cpu",
            threads=spec.threads,
            workers_on_host=plan.sharing,
            weights_holders=plan.weights_holders,
        )
        log = str(spec.logs / f"{plan.id}.log") if spec.logs is not None else ""
        return ActorBoot(worker, spec.modules[plan.role], log, self._memory)

    def _end_leftovers(self) -> None:
        """Ends actors that a killed run left in a joined Ray, and frees the places that they had.

        The name's lock is ours.
        """
        namespace = namespace_of(self._spec.config)
        named = ray.util.list_named_actors(all_namespaces=True)
        left = [entry["name"] for entry in named if entry["namespace"] == namespace]
        for name in left:
            ray.kill(ray.get_actor(name, namespace), no_restart=True)
        limit = time.monotonic() + 10
        while left and time.monotonic() < limit:
            names = ray.util.list_named_actors(all_namespaces=True)
            left = [entry["name"] for entry in names if entry["namespace"] == namespace]
            time.sleep(0.05)
        places = ray.util.placement_group_table().values()
        for place in places:
            if place["name"].startswith(f"{namespace}/") and place["state"] != "REMOVED":
                place_id = ray.PlacementGroupID(bytes.fromhex(place["placement_group_id"]))
                remove_placement_group(PlacementGroup(place_id))


def _measure_hosts() -> dict[str, Memory]:
    """Of each node that takes workers, by its id. One that does not answer in time is left out."""
    here, roles = ray.get_runtime_context().get_node_id(), {role.value for role in Role}
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and roles & n["Resources"].keys()]
    found = {here: measure_host()} if here in nodes else {}
    asked = {
        ray.remote(measure_host)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(): node
        for node in nodes
        if node != here
    }
    answered = ray.wait([*asked], num_returns=len(asked), timeout=_MEASURE_S)[0] if asked else ()
    for answer in answered:
        try:
            found[asked[answer]] = ray.get(answer)
        except RayError as error:
            logger.warning("the memory of a host was not measured: %s", type(error).__name__)
    return found


def _kill(actor: Any, group: PlacementGroup) -> None:
    ray.kill(actor, no_restart=True)
    remove_placement_group(group)


def _bundle(plan: WorkerPlan) -> dict[str, float]:
    bundle = {plan.role.value: 1.0}
    if plan.gpus:
        bundle["GPU"] = plan.gpus
    return bundle
