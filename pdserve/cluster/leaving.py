"""Moves workers off hosts that are to leave a joined Ray, before they go.

look (each second) -> nobody leaves
                   -> workers on hosts that leave, and others can do their work -> Fleet.move
                   -> the last of their kind stay and serve; asked again with the next look

A host that leaves without this loses its workers as one that dies: streams go on elsewhere then,
after their tokens were read again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from pdserve.cluster.fleet import Fleet
from pdserve.cluster.membership import Membership
from pdserve.cluster.ray_tables import RayTables
from pdserve.cluster.seen import Seen
from pdserve.cluster.sizes import Members, PoolRules, check_idle
from pdserve.errors import NotAllowed, PdserveError
from pdserve.types import WorkerId

logger = logging.getLogger(__name__)

LOOK_S = 1.0


def on_hosts(seen: Mapping[WorkerId, Seen], hosts: Collection[str]) -> list[WorkerId]:
    """Workers that exist there."""
    return [w for w, one in seen.items() if one.facts is not None and one.facts.node in hosts]


def may_go(
    members: Members, present: Collection[WorkerId], asked: Sequence[WorkerId], rules: PoolRules
) -> list[WorkerId]:
    """Those of ``asked`` that may go at once: others are ``present`` who can do their work."""
    here = {worker: member for worker, member in members.items() if worker in present}
    going: list[WorkerId] = []
    for worker in asked:
        try:
            check_idle(here, [*going, worker], rules)
        except NotAllowed:
            continue
        going.append(worker)
    return going


class Leaving:
    """Used in the event loop of its fleet."""

    def __init__(self, fleet: Fleet, membership: Membership, note: Callable[[str], None]) -> None:
        self._fleet = fleet
        self._membership = membership
        self._note = note
        self._told: frozenset[WorkerId] = frozenset()  # of whom it was said that they cannot go

    async def run(self) -> None:
        """Until it is cancelled. While Ray's control plane is away nobody is seen to leave."""
        tables = RayTables()
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                try:
                    await self._look(await tables.leaving_hosts() or frozenset())
                except PdserveError as error:
                    self._note(f"not all moved: {error.code}: {error}")
                except Exception:  # Ray's are of many kinds; the next look tries again
                    logger.exception("looking after hosts that leave failed")
        finally:
            tables.close()

    async def _look(self, hosts: frozenset[str]) -> None:
        seen, members = self._membership.seen, self._fleet.members()
        asked = [worker for worker in on_hosts(seen, hosts) if worker in members]
        present = [worker for worker, one in seen.items() if one.facts is not None]
        going = may_go(members, present, asked, self._fleet.rules)
        self._tell(frozenset(asked) - frozenset(going))
        if not going or self._fleet.under_way:
            return
        self._note(f"{', '.join(going)}: on a host that leaves, moving")
        await self._fleet.move(going)

    def _tell(self, staying: frozenset[WorkerId]) -> None:
        if staying and staying != self._told:
            named = ", ".join(sorted(staying))
            self._note(f"{named}: on a host that leaves, and nobody else could do their work")
        self._told = staying
