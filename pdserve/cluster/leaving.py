"""Moves workers off hosts that are to leave a joined Ray, before they go.

look (each second) -> nobody leaves
                   -> workers whose places are there, and others do their work -> Fleet.move
                   -> the last of their kind stay and serve; asked again with the next look

A host that leaves without this loses its workers as one that dies: streams go on elsewhere then,
after their tokens were read again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from ray.util.placement_group import PlacementGroup

from pdserve.cluster.fleet import Fleet
from pdserve.cluster.membership import Membership
from pdserve.cluster.ray_tables import RayTables
from pdserve.cluster.sizes import Members, PoolRules, check_idle
from pdserve.errors import NotAllowed, PdserveError
from pdserve.types import WorkerId

logger = logging.getLogger(__name__)

LOOK_S = 1.0


def may_go(
    members: Members,
    present: Collection[WorkerId],
    ready: Collection[WorkerId],
    asked: Sequence[WorkerId],
    rules: PoolRules,
) -> list[WorkerId]:
    """Those of ``asked`` that may go at once: they are not ``present``, or others are ``ready``."""
    going = [worker for worker in asked if worker not in present]
    serving = {worker: member for worker, member in members.items() if worker in ready}
    for worker in asked:
        if worker in going:
            continue
        try:
            check_idle(serving, [*going, worker], rules)
        except NotAllowed:
            continue
        going.append(worker)
    return going


class Leaving:
    """Used in the event loop of its fleet."""

    def __init__(
        self,
        fleet: Fleet,
        membership: Membership,
        places: Callable[[], Mapping[WorkerId, PlacementGroup]],
        note: Callable[[str], None],
    ) -> None:
        self._fleet = fleet
        self._membership = membership
        self._places = places
        self._note = note
        self._told: frozenset[WorkerId] = frozenset()  # of whom it was said that they cannot go

    async def run(self) -> None:
        """Until it is cancelled. While Ray's control plane is away nobody is seen to leave."""
        tables = RayTables()
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                try:
                    leaving = await tables.leaving(self._places()) or frozenset()
                    await self._look(leaving | self._fleet.unmoved)
                except PdserveError as error:
                    self._note(f"not all moved: {error.code}: {error}")
                except Exception:  # Ray's are of many kinds; the next look tries again
                    logger.exception("looking after hosts that leave failed")
        finally:
            tables.close()

    async def _look(self, leaving: frozenset[WorkerId]) -> None:
        if not leaving or self._fleet.under_way:
            return
        try:
            ready = await self._fleet.ready()
        except PdserveError as error:
            logger.info("who could do the work of others is not known: %s", error)
            return
        # From here to the move nobody else has a turn.
        members = self._fleet.members()
        asked = [worker for worker in members if worker in leaving]
        present = [facts.id for facts in self._membership.workers()]
        going = may_go(members, present, ready, asked, self._fleet.rules)
        self._tell(frozenset(asked) - frozenset(going))
        if going and not self._fleet.under_way:
            self._note(f"{', '.join(going)}: on a host that leaves, moving")
            await self._fleet.move(going)

    def _tell(self, staying: frozenset[WorkerId]) -> None:
        if staying and staying != self._told:
            named = ", ".join(sorted(staying))
            self._note(f"{named}: on a host that leaves, and nobody else could do their work")
        self._told = staying
