"""Which worker groups to start, retire or give up: a pure decision about what a cluster holds.

A group is started only where it fits beside all that are there, so kinds never wait for each other
while each holds half of what it needs. When a kind of group has no room:

* groups of other kinds go that have nothing to do: idle ones are retired, those that never came up
  are given up;
* a kind that has had no group for a whole turn gets one: groups at work that have had theirs, the
  oldest first, end after their job, and nothing is started meanwhile in the room that they leave.

Sizes are in CPUs and GPUs, times in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from e2lora.config import GroupSpec


@dataclass(frozen=True)
class Node:
    """What one machine has in all, used or not."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Held:
    """A group as it is now.

    Attributes:
        up: it has spoken lately; else its workers are still to come, or were lost.
        still_seconds: for how long it has had nothing to do, or has been coming.
        up_seconds: since it first came up.
    """

    name: str
    spec: GroupSpec
    up: bool
    busy: bool = False
    retiring: bool = False
    still_seconds: float = 0.0
    up_seconds: float = 0.0


@dataclass(frozen=True)
class Wish:
    """Jobs that wait for groups of one kind; ``hungry_seconds``: for how long it has had none."""

    waiting: int
    hungry_seconds: float = 0.0


@dataclass(frozen=True)
class Patience:
    """Seconds. ``grace``: an idle group may be given its next job yet. ``turn``: see above.
    ``coming``: a group that takes longer finds no room, whatever the arithmetic says.
    ``idle``: a group with nothing to do is kept for so long though nobody else wants its place.
    """

    grace: float = 2.0
    turn: float = 120.0
    coming: float = 120.0
    idle: float = 300.0


@dataclass
class Moves:
    """What is to be done now. ``lacking``: groups that there is no room for, by kind."""

    start: list[GroupSpec] = field(default_factory=list)
    retire: list[str] = field(default_factory=list)
    give_up: list[str] = field(default_factory=list)
    lacking: dict[GroupSpec, int] = field(default_factory=dict)


def fits(nodes: Sequence[Node], groups: Iterable[GroupSpec]) -> bool:
    """Whether all these groups, as small as they may be, fit the machines at once.

    Workers are placed one by one, the largest first, where they leave least.

    >>> pair = GroupSpec(num_workers=2, cpus_per_worker=2, gpus_per_worker=0, zero_stage=1,
    ...                  precision="fp32")
    >>> fits([Node(3), Node(2)], [pair]), fits([Node(3), Node(1)], [pair])
    (True, False)
    """
    free = [(node.gpus, node.cpus) for node in nodes]
    workers = [
        (spec.gpus_per_worker, spec.cpus_per_worker)
        for spec in groups
        for _ in range(smallest(spec))
    ]
    for gpus, cpus in sorted(workers, reverse=True):
        places = [i for i, (g, c) in enumerate(free) if g >= gpus and c >= cpus]
        if not places:
            return False
        best = min(places, key=lambda i: free[i])
        free[best] = (free[best][0] - gpus, free[best][1] - cpus)
    return True


def smallest(spec: GroupSpec) -> int:
    """Workers that a group of this kind has at least."""
    return spec.min_workers or spec.num_workers


def next_moves(
    nodes: Sequence[Node],
    groups: Sequence[Held],
    wishes: Mapping[GroupSpec, Wish],
    patience: Patience | None = None,
) -> Moves:
    """What to do for the jobs that wait.

    Args:
        groups: all whose resources may still be held, in the order they were started.
        wishes: by kind, that of the longest waiting job first.
    """
    return _Decision(nodes, groups, wishes, patience or Patience()).made()


class _Decision:
    def __init__(
        self,
        nodes: Sequence[Node],
        groups: Sequence[Held],
        wishes: Mapping[GroupSpec, Wish],
        patience: Patience,
    ) -> None:
        self.nodes, self.groups, self.wishes, self.patience = nodes, groups, wishes, patience
        self.moves = Moves()
        self.there = [group.spec for group in groups]  # holding room now, or about to
        self.staying = [group for group in groups if not group.retiring]
        self.kept_free: list[GroupSpec] = []  # room that others may not take
        # a node was lost: those that were on it can't come again where others are
        self.crowded = not fits(nodes, [group.spec for group in self.staying])

    def made(self) -> Moves:
        for group in self.staying[:]:
            if not group.up and not fits(self.nodes, [group.spec]):
                self._send_away(
                    group
                )  # it would wait for nodes; it is started again when they come
        for spec, wish in sorted(self.wishes.items(), key=self._turn):
            self._serve(spec, wish)
        self._let_idle_ones_go()
        return self.moves

    def _turn(self, item: tuple[GroupSpec, Wish]) -> float:
        """Kinds that were hungry for a whole turn come first, the hungriest of them before."""
        hungry = item[1].hungry_seconds
        return -hungry if hungry >= self.patience.turn else 0.0

    def _serve(self, spec: GroupSpec, wish: Wish) -> None:
        free = [g for g in self.staying if g.spec == spec and not g.busy]
        missing = wish.waiting - len(free)
        possible = fits(self.nodes, [spec])
        while missing > 0 and possible and self._has_room(spec):
            self.moves.start.append(spec)
            self.there.append(spec)
            self.kept_free.append(spec)
            missing -= 1
        if missing > 0:
            self.moves.lacking[spec] = missing
        none_at_work = not any(g.spec == spec and (g.up or g.busy) for g in self.staying)
        stuck = none_at_work and any(
            g.still_seconds > self.patience.coming or (self.crowded and not g.up) for g in free
        )
        if possible and (missing > 0 or stuck) and spec not in self.moves.start:
            forced = none_at_work and wish.hungry_seconds >= self.patience.turn
            self._make_room(spec, forced, stuck)

    def _has_room(self, spec: GroupSpec) -> bool:
        planned = [g.spec for g in self.staying] + self.kept_free
        return fits(self.nodes, [*self.there, spec]) and fits(self.nodes, [*planned, spec])

    def _make_room(self, spec: GroupSpec, forced: bool, stuck: bool) -> None:
        """Send groups of other kinds away until one more of this kind fits; keep that room free."""

        def enough() -> bool:
            planned = [g.spec for g in self.staying] + self.kept_free
            return not stuck and fits(self.nodes, [*planned, spec])

        others = [g for g in self.staying if g.spec != spec]
        at_rest = [g for g in self._surplus() if g in others and self._rests(g)]
        for group in at_rest:
            if not enough():
                self._send_away(group)
        if forced:
            for group in others:
                if not enough() and group in self.staying and self._had_its_turn(group):
                    self._send_away(group)
        if not stuck and enough():
            self.kept_free.append(spec)

    def _rests(self, group: Held) -> bool:
        return not group.up or group.still_seconds >= self.patience.grace

    def _had_its_turn(self, group: Held) -> bool:
        if group.up:
            return group.up_seconds >= self.patience.turn
        return group.still_seconds > self.patience.coming

    def _surplus(self) -> list[Held]:
        """Groups that are neither at work nor needed by jobs of their kind; the youngest first."""
        needed = Counter({spec: wish.waiting for spec, wish in self.wishes.items()})
        surplus = []
        for group in sorted(self.staying, key=lambda g: not g.up):  # those that are up serve first
            if group.busy:
                continue
            if needed[group.spec] > 0:
                needed[group.spec] -= 1
            else:
                surplus.append(group)
        return surplus[::-1]

    def _send_away(self, group: Held) -> None:
        self.staying.remove(group)
        (self.moves.retire if group.up or group.busy else self.moves.give_up).append(group.name)

    def _let_idle_ones_go(self) -> None:
        """Beyond one of each kind, which the next job may want."""
        for group in self._surplus():
            alike = sum(g.spec == group.spec for g in self.staying)
            if alike > 1 and group.up and group.still_seconds >= self.patience.idle:
                self._send_away(group)
