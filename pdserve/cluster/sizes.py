"""What a change of the pools comes to: who is added and who leaves, or why it is not allowed.

Pure: the members and what is wanted of each go in, a Change or NotAllowed comes out. New workers
take the lowest free number of their role; a pool shrinks by its drained workers first, then by its
highest numbers. Somebody who writes answers always stays, and in strict mode somebody who reads
prompts for others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pdserve.config import Config
from pdserve.errors import NotAllowed
from pdserve.types import Duty, Role, WorkerId


@dataclass(frozen=True, slots=True)
class Bounds:
    """Inclusive."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Member:
    """One planned worker."""

    role: Role
    duty: Duty = Duty.SERVE


@dataclass(frozen=True, slots=True)
class Change:
    add: tuple[tuple[WorkerId, Role], ...] = ()
    remove: tuple[WorkerId, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolRules:
    """What holds of every size."""

    bounds: Mapping[Role, Bounds]
    strict: bool

    @staticmethod
    def of(config: Config) -> PoolRules:
        pools = config.pools
        return PoolRules(
            {
                Role.PREFILL: Bounds(pools.prefill_min, pools.prefill_max),
                Role.DECODE: Bounds(pools.decode_min, pools.decode_max),
                Role.MIXED: Bounds(pools.mixed_min, pools.mixed_max),
            },
            config.router.strict,
        )


Members = Mapping[WorkerId, Member]


def sizes(members: Members) -> dict[Role, int]:
    return {role: sum(m.role is role for m in members.values()) for role in Role}


def plan_resize(members: Members, wanted: Mapping[Role, int], rules: PoolRules) -> Change:
    """From the members that there are to pools of the wanted sizes; an absent pool stays."""
    have = sizes(members)
    target = {**have, **wanted}
    for role in wanted:
        _check_bounds(role, target[role], rules.bounds[role])
    _check_whole(target, rules)
    change = Change(
        tuple(pair for role in Role for pair in _added(members, role, target[role] - have[role])),
        tuple(w for role in Role for w in _removed(members, role, have[role] - target[role])),
    )
    if change.remove and not change.add:
        check_idle(members, change.remove, rules)
    return change


def check_remove(members: Members, worker: WorkerId, rules: PoolRules) -> None:
    """NotAllowed when the pool, or the cluster, cannot do without this worker."""
    role = members[worker].role
    target = sizes(members)
    target[role] -= 1
    _check_bounds(role, target[role], rules.bounds[role])
    _check_whole(target, rules)
    check_idle(members, [worker], rules)


def check_idle(members: Members, workers: Collection[WorkerId], rules: PoolRules) -> None:
    """NotAllowed when nobody could take over what these workers do."""
    serving = [m.role for w, m in members.items() if w not in workers and m.duty is Duty.SERVE]
    named = ", ".join(workers)
    if Role.DECODE not in serving and Role.MIXED not in serving:
        raise NotAllowed(
            f"{named}: no other decode or mixed worker takes work; add one or undrain one first"
        )
    if rules.strict and Role.PREFILL not in serving and Role.MIXED not in serving:
        raise NotAllowed(
            f"{named}: router.strict needs a prefill worker, and no other one takes work; add one "
            "or undrain one first"
        )


def _check_bounds(role: Role, size: int, bounds: Bounds) -> None:
    if not bounds.low <= size <= bounds.high:
        raise NotAllowed(
            f"{role.value} = {size}: allowed are {bounds.low} to {bounds.high} "
            f"(pools.{role.value}_min, pools.{role.value}_max)"
        )


def _check_whole(target: Mapping[Role, int], rules: PoolRules) -> None:
    if target[Role.DECODE] + target[Role.MIXED] < 1:
        raise NotAllowed("decode = 0, mixed = 0: somebody must write the answers; leave one")
    if rules.strict and target[Role.PREFILL] + target[Role.MIXED] < 1:
        raise NotAllowed("prefill = 0: router.strict refuses every request then; leave one")


def _added(members: Members, role: Role, count: int) -> list[tuple[WorkerId, Role]]:
    added: list[tuple[WorkerId, Role]] = []
    number = 0
    while len(added) < count:
        worker = WorkerId(f"{role.value}-{number}")
        if worker not in members:
            added.append((worker, role))
        number += 1
    return added


def _removed(members: Members, role: Role, count: int) -> list[WorkerId]:
    def order(worker: WorkerId) -> tuple[bool, int]:
        return members[worker].duty is Duty.SERVE, -int(worker.rpartition("-")[2])

    pool = sorted((w for w, m in members.items() if m.role is role), key=order)
    return pool[: max(0, count)]
