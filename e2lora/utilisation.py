"""Where the time of worker groups goes: training steps, and everything beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PARTS = ("steps", "other", "loading")
"""What a worker tells of each job: its training steps (of those done in this run, not of those that
a resumed trial found done); evaluation, checkpoints and saving; and, before both, its model and
data."""


@dataclass(frozen=True)
class Utilisation:
    """Shares of a run's wall time on all its slots; a slot is room for one worker group.

    Args:
        wall_seconds: of the run, from its command to its end.
        slots: how many groups the cluster held at once, on average.
        spent: seconds of all groups together, by ``PARTS``; and ``"starting"``, until they came up.
    """

    wall_seconds: float
    slots: float
    spent: Mapping[str, float]

    def share(self, part: str) -> float:
        """Of wall time x slots.

        >>> Utilisation(100, 2, {"steps": 150}).share("steps")
        0.75
        """
        return self.spent.get(part, 0.0) / max(self.wall_seconds * self.slots, 1e-9)

    @property
    def idle(self) -> float:
        """The share in which a slot had no group, or its group no job; at least 0."""
        return max(0.0, 1.0 - sum(self.share(part) for part in (*PARTS, "starting")))

    def line(self) -> str:
        """
        >>> spent = {"steps": 152.0, "other": 30.0, "loading": 2.0, "starting": 10.0}
        >>> print(Utilisation(100, 2, spent).line())
        utilisation 91 % of 2 slots (76 % in training steps, 15 % in evaluation and saving; 5 % \
start-up of groups, 1 % loading, 3 % between trials)
        """
        steps, other = self.share("steps"), self.share("other")
        return (
            f"utilisation {steps + other:.0%} of {self.slots:.3g} slots ({steps:.0%} in training "
            f"steps, {other:.0%} in evaluation and saving; {self.share('starting'):.0%} start-up "
            f"of groups, {self.share('loading'):.0%} loading, {self.idle:.0%} between trials)"
        ).replace("%", " %")
