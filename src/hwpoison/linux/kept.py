"""What must outlive the manager: descriptors that another process holds for it, each under a label."""

from __future__ import annotations

from typing import Protocol


class Keeping(Protocol):
    """Who keeps them. A successor of the manager has all that was kept and not dropped."""

    def keep(self, *things: tuple[str, int]) -> None:
        """Hold copies of the descriptors, under their labels. What had a label before is let go."""

    def drop(self, *labels: str) -> None:
        """Let go of what is held under the labels, if anything is."""


class Alone:
    """Nobody keeps anything: there will be no successor."""

    def keep(self, *things: tuple[str, int]) -> None:
        pass

    def drop(self, *labels: str) -> None:
        pass
