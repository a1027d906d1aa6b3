"""The protocol of jobs, attempts and leases, with a clock that is moved by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from e2lora.broker import MAX_PASSED_OVER, Attempt, Broker, Job, Running
from e2lora.config import GroupSpec

SPEC = GroupSpec(
    num_workers=1, cpus_per_worker=1, gpus_per_worker=0, zero_stage=1, precision="fp32"
)
WIDE = SPEC.model_copy(update={"num_workers": 2})
LEASE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def broker(clock: Clock) -> Broker:
    return Broker(lease_seconds=LEASE, max_attempts=3, clock=clock)


def job(key: str = "study/7", spec: GroupSpec = SPEC, affinity: str = "") -> Job:
    return Job(key, "trial", spec, {"folder": f"/somewhere/{key}"}, affinity)


def take(broker: Broker, group: str = "g1", spec: GroupSpec = SPEC) -> Attempt:
    """A group starts anew and asks for work."""
    attempt = broker.next_attempt(group, broker.join(group), spec)
    assert isinstance(attempt, Attempt)
    return attempt


def news(broker: Broker, key: str = "study/7", seen: int = -1) -> Any:
    """What a client learns; None if nothing is new."""
    found = broker.update(key, seen)
    return found and found[1]


def evaluation(step: int, accuracy: float = 0.5) -> dict[str, Any]:
    return {"step": step, "metrics": {"accuracy": accuracy}}


def refused_everywhere(broker: Broker, token: str) -> bool:
    answers = [
        broker.alive(token),
        broker.alive(token, 5),
        broker.report(token, evaluation(99, 0.99), [0.0], {}),
        broker.complete(token, {"metrics": {"accuracy": 0.99}}),
        broker.fail(token, "late"),
    ]
    return not any(answers)


# ---- the life of a job ------------------------------------------------------------------------


def test_job_is_handed_out_reported_and_completed(broker: Broker) -> None:
    broker.submit(job())
    attempt = take(broker)
    assert attempt.job == job()
    assert broker.progress() == {"study/7": Running(0, 1, {})}
    assert broker.busy_groups() == {"g1"}
    assert broker.alive(attempt.token, 2)
    assert broker.progress() == {"study/7": Running(2, 1, {})}
    assert broker.report(attempt.token, evaluation(3), {"right": [1.0, 0.0]}, {})
    assert not news(broker).ended
    assert broker.complete(attempt.token, {"metrics": {"accuracy": 0.5}})
    told = news(broker)
    assert told.ended
    assert (told.result, told.error) == ({"metrics": {"accuracy": 0.5}}, None)
    assert (told.evaluations, told.outcomes, told.attempts) == (
        [evaluation(3)],
        {"right": [1.0, 0.0]},
        1,
    )
    assert broker.progress() == broker.demand() == {}
    assert broker.busy_groups() == set()


def test_jobs_are_handed_out_in_the_order_they_came_each_to_one_group(broker: Broker) -> None:
    for key in ("a", "b", "c"):
        broker.submit(job(key))
    taken = [take(broker, group).job.key for group in ("g1", "g2", "g3")]
    assert taken == ["a", "b", "c"]
    assert broker.next_attempt("g4", broker.join("g4"), SPEC) is None


def test_job_goes_only_to_a_group_of_its_kind_and_holds_up_no_other(broker: Broker) -> None:
    broker.submit(job("wide", WIDE))
    broker.submit(job("usual"))
    assert broker.demand() == {WIDE: 1, SPEC: 1}
    assert take(broker, "g1", SPEC).job.key == "usual"
    assert broker.next_attempt("g1", broker.join("g1"), SPEC) != "retire"
    assert take(broker, "g2", WIDE).job.key == "wide"


def test_submitting_a_known_key_attaches_to_it(broker: Broker) -> None:
    broker.submit(job())
    broker.submit(job())
    attempt = take(broker)
    broker.submit(job())
    assert broker.next_attempt("g2", broker.join("g2"), SPEC) is None
    broker.complete(attempt.token, {"done": True})
    broker.submit(job())
    assert broker.next_attempt("g2", broker.join("g2"), SPEC) is None
    assert news(broker).result == {"done": True}


def test_client_is_told_only_what_is_new(broker: Broker) -> None:
    broker.submit(job())
    assert broker.update("study/7", 0) is None
    attempt = take(broker)
    broker.alive(attempt.token, 1)
    assert broker.update("study/7", 0) is None, "a sign of life is no news"
    broker.report(attempt.token, evaluation(3), {"right": [1.0]}, {})
    version, _ = broker.update("study/7", 0) or pytest.fail("an evaluation is news")
    assert broker.update("study/7", version) is None


# ---- lost attempts ----------------------------------------------------------------------------


def test_group_that_left_loses_its_job_long_before_it_comes_again(broker: Broker) -> None:
    broker.submit(job())
    attempt = take(broker)
    broker.leave("g1")
    assert broker.demand() == {SPEC: 1}, "another group may have it"
    assert refused_everywhere(broker, attempt.token)
    broker.join("g1")
    assert news(broker).attempts == 1
    assert not news(broker).ended, "it was lost once, not twice"


def test_restarted_group_loses_its_job_and_its_old_token_is_refused(broker: Broker) -> None:
    broker.submit(job())
    old = take(broker, "g1")
    new = take(broker, "g1")
    assert new.job == old.job
    assert new.token != old.token
    assert refused_everywhere(broker, old.token)
    assert broker.alive(new.token)
    assert news(broker).evaluations == []
    assert news(broker).attempts == 2


def test_old_incarnation_of_a_group_is_told_to_retire(broker: Broker) -> None:
    broker.submit(job())
    first = broker.join("g1")
    second = broker.join("g1")
    assert broker.next_attempt("g1", first, SPEC) == "retire"
    assert isinstance(broker.next_attempt("g1", second, SPEC), Attempt)


def test_group_that_never_joined_gets_nothing(broker: Broker) -> None:
    broker.submit(job())
    assert broker.next_attempt("stranger", 1, SPEC) == "retire"
    assert broker.demand() == {SPEC: 1}


ELASTIC = SPEC.model_copy(update={"num_workers": 4, "min_workers": 1})


@pytest.mark.parametrize("spec", [SPEC, ELASTIC], ids=["fixed", "elastic"])
def test_restart_that_got_further_counts_only_where_workers_are_meant_to_go_and_come(
    broker: Broker, spec: GroupSpec
) -> None:
    broker.submit(job(spec=spec))
    for step in (10, 20, 30):
        assert news(broker) is None or not news(broker).ended
        assert broker.alive(take(broker, "g1", spec).token, step)
    broker.join("g1")
    assert (news(broker) is not None and news(broker).ended) == (spec is SPEC)


def test_elastic_job_that_gets_no_further_is_failed(broker: Broker) -> None:
    broker.submit(job(spec=ELASTIC))
    for step in (10, 20, 20, 15):
        assert broker.alive(take(broker, "g1", ELASTIC).token, step)
    broker.join("g1")
    error = news(broker).error
    assert "attempt 4, one of 3 in a row that got no further than step 20, was lost" in error


def test_restart_of_one_group_costs_no_other_its_job(broker: Broker) -> None:
    broker.submit(job("a"))
    broker.submit(job("b"))
    first, second = take(broker, "g1"), take(broker, "g2")
    broker.join("g1")
    assert refused_everywhere(broker, first.token)
    assert broker.alive(second.token)


def test_silent_attempt_loses_its_lease_and_the_job_goes_to_the_front(
    broker: Broker, clock: Clock
) -> None:
    for key in ("a", "b", "c"):
        broker.submit(job(key))
    lost = take(broker, "g1")
    clock.now += LEASE + 1
    assert refused_everywhere(broker, lost.token)
    assert take(broker, "g2").job.key == "a"
    assert take(broker, "g3").job.key == "b"


def test_every_sign_of_life_renews_the_lease(broker: Broker, clock: Clock) -> None:
    broker.submit(job())
    token = take(broker).token
    for step in range(1, 9):
        clock.now += 0.9 * LEASE
        assert (
            broker.alive(token, step)
            if step % 2
            else broker.report(token, evaluation(step), [], {})
        )
    assert broker.complete(token, {})


def test_attempt_that_is_put_back_costs_nothing_and_nothing_more_is_handed_out(
    broker: Broker,
) -> None:
    broker.submit(job("study/1"))
    broker.submit(job("study/2"))
    incarnation = broker.join("g1")
    for _ in range(2):  # one more would be its last
        attempt = broker.next_attempt("g1", incarnation, SPEC)
        assert isinstance(attempt, Attempt)
        assert broker.lose(attempt.token, "by chance")
    attempt = broker.next_attempt("g1", incarnation, SPEC)
    assert isinstance(attempt, Attempt)
    assert broker.put_back(attempt.token, "the disk is full")
    assert broker.trouble() == "the disk is full"
    update = news(broker, "study/1")
    assert (update.error, update.ended) == (None, False)
    assert refused_everywhere(broker, attempt.token)
    assert broker.demand() == {SPEC: 2}
    assert broker.next_attempt("g1", incarnation, SPEC) == "retire"
    broker.tell_trouble("the network, too")
    assert broker.trouble() == "the disk is full", "the first is what it began with"


def test_job_that_lost_all_its_attempts_has_failed_and_says_why(
    broker: Broker, clock: Clock
) -> None:
    broker.submit(job())
    for number in range(1, 4):
        assert news(broker).attempts == number - 1
        lost = take(broker, f"g{number}")
        clock.now += LEASE + 1
    told = news(broker)
    assert told.result is None
    assert told.error == "attempt 3 of 3 was lost: it gave no sign of life for 10 s"
    assert refused_everywhere(broker, lost.token)
    assert broker.next_attempt("g4", broker.join("g4"), SPEC) is None


def test_job_whose_group_died_too_often_names_the_group(broker: Broker) -> None:
    broker.submit(job())
    for _ in range(3):
        take(broker, "g1")
    broker.join("g1")
    assert news(broker).error == "attempt 3 of 3 was lost: its worker group g1 died"


def test_failure_of_the_job_itself_is_not_tried_again(broker: Broker) -> None:
    broker.submit(job())
    assert broker.fail(take(broker).token, "the loss must stay finite")
    told = news(broker)
    assert (told.error, told.attempts) == ("the loss must stay finite", 1)
    assert broker.next_attempt("g2", broker.join("g2"), SPEC) is None


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_ended_job_stays_as_it_ended(broker: Broker, clock: Clock, end: str) -> None:
    broker.submit(job())
    token = take(broker).token
    assert broker.complete(token, {}) if end == "complete" else broker.fail(token, "wrong")
    before = news(broker)
    assert refused_everywhere(broker, token)
    clock.now += 100 * LEASE
    broker.join("g1")
    assert news(broker) == before


@pytest.mark.parametrize("token", ["", "study/7", "study/7/0", "study/7/2", "study/8/1", "7/1"])
def test_token_that_was_never_given_is_refused(broker: Broker, token: str) -> None:
    broker.submit(job())
    take(broker)
    assert refused_everywhere(broker, token)


# ---- jobs that are no longer wanted -----------------------------------------------------------


def test_stopped_job_leaves_the_queue_and_is_given_to_nobody(broker: Broker) -> None:
    broker.submit(job("a"))
    broker.submit(job("b"))
    assert broker.stop("a")
    told = news(broker, "a")
    assert (told.stopped, told.ended, told.result, told.error) == (True, True, None, None)
    assert broker.demand() == {SPEC: 1}
    assert take(broker).job.key == "b"


def test_attempt_of_a_stopped_job_is_refused_and_its_group_goes_on_with_the_next(
    broker: Broker, clock: Clock
) -> None:
    broker.submit(job("a"))
    broker.submit(job("b"))
    incarnation = broker.join("g1")
    attempt = broker.next_attempt("g1", incarnation, SPEC)
    assert isinstance(attempt, Attempt)
    broker.report(attempt.token, evaluation(3), {}, {})
    clock.now += 4
    assert broker.stop("a")
    assert news(broker, "a").held_seconds == 4
    assert broker.busy_groups() == {"g1"}, "until it asks for something else"
    clock.now += 3
    assert refused_everywhere(broker, attempt.token)
    assert broker.silences() == {"g1": 0.0}, "it is refused, and alive all the same"
    after = broker.next_attempt("g1", incarnation, SPEC)
    assert isinstance(after, Attempt)
    assert after.job.key == "b"
    told = news(broker, "a")
    assert (told.stopped, told.evaluations, told.attempts) == (True, [evaluation(3)], 1)


def test_group_of_a_stopped_job_that_dies_or_retires_is_no_longer_busy(broker: Broker) -> None:
    broker.submit(job("a"))
    take(broker, "g1")
    broker.stop("a")
    broker.join("g1")
    assert broker.busy_groups() == set()


@pytest.mark.parametrize("end", ["complete", "fail", "stop", "lost"])
def test_job_that_has_ended_is_not_stopped(broker: Broker, end: str) -> None:
    broker.submit(job())
    token = take(broker).token
    if end == "lost":
        for _ in range(2):
            take(broker)
        broker.join("g1")
    else:
        {
            "complete": lambda: broker.complete(token, {}),
            "fail": lambda: broker.fail(token, "wrong"),
            "stop": lambda: broker.stop("study/7"),
        }[end]()
    before = news(broker)
    assert before.ended
    assert not broker.stop("study/7")
    assert news(broker) == before


@pytest.mark.parametrize("kind", ["diverged", "memory", "error"])
def test_failure_is_told_with_its_kind(broker: Broker, kind: Any) -> None:
    broker.submit(job())
    broker.fail(take(broker).token, "why", kind)
    assert (news(broker).failure, news(broker).error) == (kind, "why")


def test_held_seconds_are_those_of_all_attempts(broker: Broker, clock: Clock) -> None:
    broker.submit(job())
    clock.now += 7
    take(broker)
    clock.now += 2
    broker.join("g1")
    clock.now += 5
    token = take(broker).token
    clock.now += 3
    broker.complete(token, {})
    assert news(broker).held_seconds == 2 + 3


# ---- what a group holds already ---------------------------------------------------------------


def order(broker: Broker, group: str = "g1") -> list[str]:
    """Which jobs one group is given, one after another."""
    incarnation, keys = broker.join(group), []
    while isinstance(attempt := broker.next_attempt(group, incarnation, SPEC), Attempt):
        keys.append(attempt.job.key)
        broker.complete(attempt.token, {})
    return keys


def test_group_is_given_jobs_of_its_model_and_task_then_of_its_model(broker: Broker) -> None:
    for key, affinity in (("a", "m/x"), ("b", "n/x"), ("c", "m/y"), ("d", "m/x"), ("e", "n/x")):
        broker.submit(job(key, affinity=affinity))
    assert order(broker) == ["a", "d", "c", "b", "e"]


def test_two_groups_share_jobs_out_by_model(broker: Broker) -> None:
    incarnations = {group: broker.join(group) for group in ("g1", "g2")}
    for i in range(10):
        broker.submit(job(str(i), affinity=("m", "n")[i % 2]))
    served: dict[str, list[str]] = {"g1": [], "g2": []}
    for _ in range(5):
        for group in served:
            attempt = broker.next_attempt(group, incarnations[group], SPEC)
            assert isinstance(attempt, Attempt)
            served[group].append(attempt.job.affinity)
    assert served == {"g1": ["m"] * 5, "g2": ["n"] * 5}


def test_job_is_passed_over_only_so_many_times(broker: Broker) -> None:
    broker.submit(job("first", affinity="m"))
    broker.submit(job("other", affinity="n"))
    later = [f"later-{i}" for i in range(2 * MAX_PASSED_OVER)]
    for key in later:
        broker.submit(job(key, affinity="m"))
    given = order(broker)
    assert given.index("other") == 1 + MAX_PASSED_OVER
    assert set(given) == {"first", "other", *later}


# ---- evaluations ------------------------------------------------------------------------------


def test_evaluations_are_kept_by_step_and_in_order(broker: Broker) -> None:
    broker.submit(job())
    first = take(broker)
    broker.report(first.token, evaluation(3, 0.3), [0.0], {})
    broker.report(first.token, evaluation(6, 0.6), {"right": [1.0]}, {})
    again = take(broker)  # the group restarted; the attempt resumes after step 3
    told = broker.update("study/7", -1)
    assert told is not None
    version, _ = told
    assert broker.report(again.token, evaluation(6, 0.6), {"right": [1.0]}, {}), "accepted, but"
    assert broker.update("study/7", version) is None, "a duplicate is no news"
    assert broker.report(again.token, evaluation(9, 0.9), {"right": [1.0]}, {})
    assert not broker.report(first.token, evaluation(12), [0.0], {})
    update = news(broker)
    assert update.evaluations == [evaluation(3, 0.3), evaluation(6, 0.6), evaluation(9, 0.9)]
    assert update.outcomes == {"right": [1.0]}


# ---- the pool ---------------------------------------------------------------------------------


def test_retired_group_ends_when_it_next_asks_and_not_before(broker: Broker) -> None:
    broker.submit(job("a"))
    broker.submit(job("b"))
    incarnation = broker.join("g1")
    attempt = broker.next_attempt("g1", incarnation, SPEC)
    assert isinstance(attempt, Attempt)
    broker.retire("g1")
    assert broker.alive(attempt.token)
    assert broker.complete(attempt.token, {})
    assert broker.next_attempt("g1", incarnation, SPEC) == "retire"
    assert broker.demand() == {SPEC: 1}


def test_demand_counts_the_jobs_that_come_back(broker: Broker, clock: Clock) -> None:
    broker.submit(job("a"))
    broker.submit(job("w", WIDE))
    take(broker)
    assert broker.demand() == {WIDE: 1}
    clock.now += LEASE + 1
    assert broker.demand() == {SPEC: 1, WIDE: 1}


def test_group_is_heard_while_it_works_and_when_it_ends_a_long_job() -> None:
    clock = Clock()
    broker = Broker(lease_seconds=LEASE, clock=clock)
    broker.submit(job("a", SPEC))
    attempt = broker.next_attempt("g1", broker.join("g1"), SPEC)
    assert isinstance(attempt, Attempt)
    for _ in range(40):
        clock.now += LEASE - 1
        assert broker.alive(attempt.token)
        assert broker.silences() == {"g1": 0.0}
    clock.now += LEASE - 1
    assert broker.complete(attempt.token, {})
    assert broker.silences() == {"g1": 0.0}


# ---- any order of events ----------------------------------------------------------------------

KEYS = ("a", "b", "c/d", "e")
GROUPS = ("g1", "g2", "g3")
SPECS = {"a": SPEC, "b": SPEC, "c/d": WIDE, "e": SPEC}
AFFINITIES = {"a": "m/x", "b": "n/x", "c/d": "m/x", "e": "m/y"}


class Protocol(RuleBasedStateMachine):
    """A plain model of the rules beside the broker: they must agree after every event."""

    tokens = Bundle("tokens")

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.broker = Broker(lease_seconds=LEASE, max_attempts=2, clock=self.clock)
        self.submitted: list[str] = []
        self.waiting: list[str] = []
        self.held: dict[str, tuple[str, str, float]] = {}  # key → token, group, end of lease
        self.ended: dict[str, str] = {}  # key → how
        self.attempts: dict[str, int] = {}
        self.steps: dict[str, set[int]] = {}
        self.incarnations: dict[str, int] = {}
        self.retired: set[str] = set()
        self.last: dict[str, str] = {}  # group → the key it was given last
        self.leaving: dict[str, str] = {}  # token → group that was not told yet

    def lose(self, key: str) -> None:
        del self.held[key]
        if self.attempts[key] == 2:
            self.ended[key] = "lost"
        else:
            self.waiting.insert(0, key)

    def lose_all_of(self, group: str) -> None:
        self.leaving = {token: g for token, g in self.leaving.items() if g != group}
        for key in self.submitted:
            if key in self.held and self.held[key][1] == group:
                self.lose(key)

    def accepted(self, token: str) -> str | None:
        """The job for which the broker must accept a token now; its lease is renewed."""
        for key, (newest, group, _) in self.held.items():
            if newest == token:
                self.held[key] = (newest, group, self.clock.now + LEASE)
                return key
        return None

    @rule(key=st.sampled_from(KEYS))
    def submit(self, key: str) -> None:
        self.broker.submit(job(key, SPECS[key], AFFINITIES[key]))
        if key not in self.submitted:
            self.submitted.append(key)
            self.waiting.append(key)
            self.attempts[key], self.steps[key] = 0, set()

    @rule(group=st.sampled_from(GROUPS))
    def group_starts(self, group: str) -> None:
        self.lose_all_of(group)
        self.incarnations[group] = self.broker.join(group)

    @rule(
        target=tokens,
        group=st.sampled_from(GROUPS),
        age=st.sampled_from([0, 0, 0, 1]),
        spec=st.sampled_from([SPEC, SPEC, WIDE]),
    )
    def group_asks(self, group: str, age: int, spec: GroupSpec) -> Any:
        incarnation = self.incarnations.get(group, 0) - age
        answer = self.broker.next_attempt(group, incarnation, spec)
        retires = age or group not in self.incarnations or group in self.retired
        if not retires:  # who asks for work holds none
            self.lose_all_of(group)
        fitting = [key for key in self.waiting if SPECS[key] == spec]
        if retires:
            assert answer == "retire"
        elif not fitting:
            assert answer is None
        else:
            assert isinstance(answer, Attempt)
            given = self.best_of(fitting, self.last.get(group))
            assert answer.job.key == given, "like the last; else first come, lost ones before"
            self.last[group] = given
            self.waiting.remove(given)
            self.attempts[given] += 1
            self.held[given] = (answer.token, group, self.clock.now + LEASE)
            return answer.token
        return multiple()

    @staticmethod
    def best_of(fitting: list[str], last: str | None) -> str:
        if last is None:
            return fitting[0]
        same = [key for key in fitting if AFFINITIES[key] == AFFINITIES[last]]
        model = [key for key in fitting if AFFINITIES[key][0] == AFFINITIES[last][0]]
        return [*same, *model, *fitting][0]

    @rule(key=st.sampled_from(KEYS))
    def stop(self, key: str) -> None:
        if key not in self.submitted:
            return
        assert self.broker.stop(key) == (key not in self.ended)
        if key in self.ended:
            return
        if key in self.held:
            token, group, _ = self.held.pop(key)
            self.leaving[token] = group
        else:
            self.waiting.remove(key)
        self.ended[key] = "stopped"

    @rule(token=tokens, step=st.one_of(st.none(), st.integers(0, 9)))
    def alive(self, token: str, step: int | None) -> None:
        assert self.broker.alive(token, step) == (self.accepted(token) is not None)

    @rule(token=tokens, step=st.integers(1, 3))
    def report(self, token: str, step: int) -> None:
        key = self.accepted(token)
        assert self.broker.report(token, evaluation(step), {"right": [1.0]}, {}) == (
            key is not None
        )
        if key is not None:
            self.steps[key].add(step)

    @rule(token=tokens)
    def complete(self, token: str) -> None:
        key = self.accepted(token)
        assert self.broker.complete(token, {"of": token}) == (key is not None)
        if key is not None:
            del self.held[key]
            self.ended[key] = "complete"

    @rule(token=consumes(tokens))
    def fail(self, token: str) -> None:
        key = self.accepted(token)
        assert self.broker.fail(token, f"error of {token}", "diverged") == (key is not None)
        if key is not None:
            del self.held[key]
            self.ended[key] = "failed"

    @rule(token=consumes(tokens))
    def break_down(self, token: str) -> None:
        key = self.accepted(token)
        assert self.broker.lose(token, "a neighbour died") == (key is not None)
        if key is not None:
            self.lose(key)

    @rule(seconds=st.sampled_from([1.0, 6.0, LEASE + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for key in self.submitted:  # in this order they come back to the front
            if key in self.held and self.held[key][2] < self.clock.now:
                self.lose(key)

    @rule(group=st.sampled_from(GROUPS[:1]))
    def retire(self, group: str) -> None:
        self.broker.retire(group)
        self.retired.add(group)

    @invariant()
    def every_job_is_in_exactly_one_place(self) -> None:
        running, demand = self.broker.progress(), self.broker.demand()
        updates = {key: news(self.broker, key) for key in self.submitted}
        ended = {key for key, update in updates.items() if update.ended}
        assert set(running) == set(self.held)
        assert ended == set(self.ended)
        assert sum(demand.values()) == len(self.waiting)
        assert not set(running) & ended
        assert len(running) + sum(demand.values()) + len(ended) == len(self.submitted)
        for spec in (SPEC, WIDE):
            waiting = sum(SPECS[key] == spec for key in self.waiting)
            assert demand.get(spec, 0) == waiting

    @invariant()
    def clients_are_told_the_truth(self) -> None:
        for key in self.submitted:
            update, how = news(self.broker, key), self.ended.get(key)
            assert [e["step"] for e in update.evaluations] == sorted(self.steps[key])
            assert update.attempts == self.attempts[key] <= 2
            assert (update.result is not None) == (how == "complete")
            assert (update.error is not None) == (how in ("failed", "lost"))
            assert update.stopped == (how == "stopped")
            assert update.failure == {"failed": "diverged", "lost": "lost"}.get(how or "")
        if self.submitted:
            holding = {group for _, group, _ in self.held.values()}
            assert self.broker.busy_groups() == holding | set(self.leaving.values())


Protocol.TestCase.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, database=None
)
test_protocol_holds_whatever_happens = Protocol.TestCase
