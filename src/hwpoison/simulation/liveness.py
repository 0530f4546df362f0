"""The second phase of a large world: nothing goes wrong any more, and everything must settle.

In the safety phase anything may happen, and what was promised must hold after each step. Then the faults end, and all that
was begun must come to its end. Then all look at everything: each page has what was last written, or is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwpoison.simulation.agents import Agent
from hwpoison.simulation.scenario import Step

if TYPE_CHECKING:
    from hwpoison.simulation.world import World

LOOKS_MAX = 4
"""Who meets a bad frame of which nobody knows has it reported. Then all look again, so often at most."""


class Liveness:
    """It begins after so many steps, or when nothing can happen any more before that."""

    def __init__(self, world: World, after: int) -> None:
        self._world = world
        self._after = after
        self.begun = False
        self.looks = 0
        self._look_again = True

    def step(self) -> bool:
        """Let one thing happen; False if all is over."""
        world = self._world
        if not self.begun and world.loop.steps >= self._after:
            self._begin()
        if world.loop.step():
            return True
        if not self.begun:
            self._begin()
            return True
        if not self._look_again or self.looks == LOOKS_MAX or world.object.closed or world.dead:
            return False
        self._look()
        return True

    def _begin(self) -> None:
        self.begun = True
        self._world.begin_liveness()

    def _look(self) -> None:
        """Everybody who has the object mapped will look at each page of it, and somebody who has seen none of it before."""
        world = self._world
        if not self.looks:
            world.agents.append(Agent(world, "newcomer", [Step("attach", 0)]))
        self.looks += 1
        self._look_again = False
        for agent in world.agents:
            if agent.process.alive and (agent.area in agent.process.areas or agent.at < len(agent.script)):
                agent.script += agent.views(range(world.object.pages.count))

    def met_bad(self, page: int) -> None:
        """Somebody has met a bad frame. The kernel may have missed it before; now it declares it bad."""
        world = self._world
        if self.begun and world.is_bad(page):
            self._look_again = True
        if self.begun and world.is_bad(page) and page not in world.unreported:
            world.goes_bad(page, declared=True)
            world.unreported.add(page)
