"""Which groups are started, retired and given up: cases written out, and whole clusters played."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2lora.config import GroupSpec
from e2lora.fleet import Held, Node, Patience, Wish, fits, next_moves

ONE = GroupSpec(num_workers=1, cpus_per_worker=1, gpus_per_worker=0, zero_stage=1, precision="fp32")
OTHER = ONE.model_copy(update={"zero_stage": 2})
PAIR = ONE.model_copy(update={"num_workers": 2})
WIDE = ONE.model_copy(update={"cpus_per_worker": 2})
ELASTIC = ONE.model_copy(update={"num_workers": 4, "min_workers": 2})
GPU = ONE.model_copy(update={"gpus_per_worker": 1})


@pytest.mark.parametrize(
    ("nodes", "groups", "expected"),
    [
        ([Node(1)], [ONE], True),
        ([Node(1)], [ONE, ONE], False),
        ([Node(1), Node(1)], [PAIR], True),
        ([Node(1), Node(1)], [WIDE], False),
        ([Node(3)], [PAIR, PAIR], False),
        ([Node(3), Node(1)], [PAIR, PAIR], True),
        ([Node(2)], [ELASTIC], True),
        ([Node(1)], [ELASTIC], False),
        ([Node(8)], [GPU], False),
        ([Node(4, 1), Node(4)], [GPU, WIDE, WIDE], True),
        ([Node(1, 1), Node(4)], [ONE, GPU], True),
        ([], [], True),
        ([], [ONE], False),
    ],
)
def test_groups_fit_where_each_worker_has_a_machine(
    nodes: list[Node], groups: list[GroupSpec], expected: bool
) -> None:
    assert fits(nodes, groups) is expected


def held(name: str, spec: GroupSpec = ONE, **how: object) -> Held:
    return Held(name, spec, **{"up": True, **how})  # type: ignore[arg-type]


def test_as_many_groups_start_as_jobs_wait_and_nodes_hold() -> None:
    wishes = {ONE: Wish(5)}
    assert next_moves([Node(3)], [], wishes).start == [ONE] * 3
    assert next_moves([Node(3)], [], wishes).lacking == {ONE: 2}
    assert next_moves([Node(9)], [], wishes).start == [ONE] * 5
    coming = [held("a", up=False), held("b", up=False)]
    assert next_moves([Node(9)], coming, wishes).start == [ONE] * 3
    busy = [held("a", busy=True), held("b", busy=True)]
    assert next_moves([Node(2), Node(2)], busy, wishes).start == [ONE] * 2, "a node has come"


def test_kinds_share_a_cluster_that_has_room_for_both() -> None:
    moves = next_moves([Node(3)], [held("a", busy=True)], {PAIR: Wish(1)})
    assert (moves.start, moves.retire) == ([PAIR], [])


def test_idle_groups_of_a_kind_nobody_wants_make_room() -> None:
    groups = [held("a", still_seconds=9), held("b", busy=True), held("c", still_seconds=9)]
    moves = next_moves([Node(3)], groups, {PAIR: Wish(1)})
    assert (moves.start, sorted(moves.retire)) == ([], ["a", "c"])
    after = [Held("a", ONE, up=True, retiring=True), held("b", busy=True)]
    moves = next_moves([Node(3)], after, {PAIR: Wish(1)})
    assert (moves.start, moves.retire) == ([], []), "what it holds is not free yet"
    assert next_moves([Node(3)], [held("b", busy=True)], {PAIR: Wish(1)}).start == [PAIR]


def test_idle_group_is_left_a_moment_for_its_next_job() -> None:
    assert next_moves([Node(1)], [held("a", still_seconds=0.5)], {OTHER: Wish(1)}).retire == []


def test_group_that_still_comes_is_given_up_for_a_kind_that_is_wanted() -> None:
    moves = next_moves([Node(1)], [held("a", up=False)], {OTHER: Wish(1)})
    assert (moves.give_up, moves.retire) == (["a"], [])


def test_kind_without_a_group_gets_its_turn_though_the_other_has_work() -> None:
    groups = [held(name, busy=True, up_seconds=500) for name in "abc"]
    early = next_moves([Node(3)], groups, {ONE: Wish(4), PAIR: Wish(1, hungry_seconds=60)})
    assert early.retire == []
    moves = next_moves([Node(3)], groups, {ONE: Wish(4), PAIR: Wish(1, hungry_seconds=121)})
    assert moves.retire == ["a", "b"]
    fresh = [held(name, busy=True, up_seconds=50) for name in "abc"]
    moves = next_moves([Node(3)], fresh, {ONE: Wish(4), PAIR: Wish(1, hungry_seconds=121)})
    assert moves.retire == [], "they have a turn, too"
    left = [held("c", busy=True), held("b", busy=True, retiring=True)]
    moves = next_moves([Node(3)], left, {ONE: Wish(4), PAIR: Wish(1, hungry_seconds=180)})
    assert (moves.start, moves.retire) == ([], []), "the room that comes is kept for it"
    moves = next_moves([Node(3)], left[:1], {ONE: Wish(4), PAIR: Wish(1, hungry_seconds=200)})
    assert moves.start == [PAIR]


def test_group_whose_nodes_are_gone_is_given_up_and_starts_again_when_they_come() -> None:
    moves = next_moves([Node(1)], [held("a", PAIR, up=False)], {PAIR: Wish(1)})
    assert (moves.give_up, moves.start) == (["a"], [])
    assert next_moves([Node(1), Node(1)], [], {PAIR: Wish(1)}).start == [PAIR]


def test_lost_groups_that_come_again_on_another_node_have_room_made_at_once() -> None:
    """Before its node was lost, all three had room; they are no longer at their jobs."""
    again = [held("a", up=False, still_seconds=1), held("b", up=False, still_seconds=1)]
    idle = held("wide", PAIR, still_seconds=60)
    moves = next_moves([Node(2)], [*again, idle], {ONE: Wish(2)})
    assert (moves.retire, moves.start, moves.give_up) == (["wide"], [], [])
    moves = next_moves([Node(2), Node(2)], [*again, idle], {ONE: Wish(2)})
    assert moves.retire == [], "they are only coming"


def test_idle_groups_beyond_one_go_after_a_while_though_nobody_wants_their_place() -> None:
    groups = [held(name, still_seconds=301) for name in "abc"]
    assert sorted(next_moves([Node(3)], groups, {}).retire) == ["b", "c"]
    assert sorted(next_moves([Node(3)], groups, {ONE: Wish(2)}).retire) == ["c"]
    assert next_moves([Node(3)], [held("a", still_seconds=60)] * 2, {}).retire == []


# ---- whole clusters ---------------------------------------------------------------------------


@dataclass
class Group:
    """As it would be: its workers stand somewhere, once they found places."""

    name: str
    spec: GroupSpec
    since: int
    places: list[int] | None = None
    up_at: int | None = None
    ends_at: int | None = None
    retiring: bool = False


@dataclass
class Played:
    """A cluster, second by second; what was decided is what happens."""

    nodes: list[Node]
    jobs: list[tuple[int, GroupSpec, int]]  # when it comes, its kind, how long it takes
    patience: Patience = field(default_factory=lambda: Patience(turn=40, coming=40, idle=100))
    groups: list[Group] = field(default_factory=list)
    hungry: dict[GroupSpec, int] = field(default_factory=dict)
    started: int = 0
    ended: int = 0

    def place(self, group: Group) -> None:
        """As Ray does: all its workers at once, on what is free where it is."""
        free = [node.cpus for node in self.nodes]
        for other in self.groups:
            for place in other.places or []:
                free[place] -= other.spec.cpus_per_worker
        places = []
        for _ in range(group.spec.min_workers or group.spec.num_workers):
            fitting = [i for i, f in enumerate(free) if f >= group.spec.cpus_per_worker]
            if not fitting:
                return
            places.append(fitting[0])
            free[fitting[0]] -= group.spec.cpus_per_worker
        group.places = places

    def second(self, now: int) -> None:
        for group in self.groups[:]:
            if group.places is None:
                self.place(group)
                group.up_at = None if group.places is None else now + 5
            if group.ends_at is not None and now >= group.ends_at:
                group.ends_at, group.since, self.ended = None, now, self.ended + 1
            if self.is_up(group, now) and group.ends_at is None:
                waiting = [job for job in self.jobs if job[0] <= now and job[1] == group.spec]
                if group.retiring:
                    self.groups.remove(group)
                elif waiting:
                    self.jobs.remove(waiting[0])
                    group.ends_at = now + waiting[0][2]
        self.decide(now)

    @staticmethod
    def is_up(group: Group, now: int) -> bool:
        return group.up_at is not None and now >= group.up_at

    def decide(self, now: int) -> None:
        demand: dict[GroupSpec, int] = {}
        for begins, spec, _ in self.jobs:
            if begins <= now:
                demand[spec] = demand.get(spec, 0) + 1
        served = {g.spec for g in self.groups if self.is_up(g, now) and not g.retiring}
        self.hungry = {spec: self.hungry.get(spec, now) for spec in demand if spec not in served}
        wishes = {s: Wish(n, now - self.hungry.get(s, now)) for s, n in demand.items()}
        groups = [
            Held(
                g.name,
                g.spec,
                up=self.is_up(g, now),
                busy=g.ends_at is not None,
                retiring=g.retiring,
                still_seconds=now - g.since,
                up_seconds=now - (g.up_at or now),
            )
            for g in self.groups
        ]
        moves = next_moves(self.nodes, groups, wishes, self.patience)
        for spec in moves.start:
            self.started += 1
            self.groups.append(Group(f"g{self.started}", spec, now))
        self.groups = [g for g in self.groups if g.name not in moves.give_up]
        for group in self.groups:
            group.retiring |= group.name in moves.retire


KINDS = (ONE, OTHER, PAIR, WIDE, ELASTIC)


@settings(max_examples=60, deadline=None, database=None)
@given(
    cpus=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 999),
)
def test_every_job_that_fits_the_cluster_is_served_whatever_its_size(
    cpus: list[int], kinds: Sequence[GroupSpec], seed: int
) -> None:
    nodes, rng = [Node(n) for n in cpus], random.Random(seed)
    jobs = [(rng.randrange(200), rng.choice(kinds), rng.randint(1, 60)) for _ in range(20)]
    jobs = sorted((job for job in jobs if fits(nodes, [job[1]])), key=lambda job: job[0])
    played, total = Played(nodes, jobs[:]), len(jobs)
    for now in range(4000):
        played.second(now)
        if played.ended == total:
            break
    assert played.ended == total, (played.jobs, played.groups)


def test_two_kinds_in_turn_cost_few_starts() -> None:
    """Both always have work, and there is room for one: a turn holds several jobs."""
    jobs = [(0, kind, 5) for _ in range(30) for kind in (ONE, OTHER)]
    played = Played([Node(1)], jobs)
    now = 0
    while played.ended < 60:
        played.second(now)
        now += 1
        assert now < 1000
    assert played.started <= 10
