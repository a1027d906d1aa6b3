"""Who works on what: jobs waiting, attempts under lease, and what they reported.

Plain state without Ray, so that the protocol can be read and tested by itself; `e2lora.pool`
runs it as an actor. The rules:

* A job is handed out as an *attempt* with a token of its own. Reports that carry any other token
  of that job are refused, so a lost attempt can't speak after its successor started.
* A lease is renewed by every sign of life. When it runs out, or the group that held it restarts,
  the job goes back to the front of the queue; after ``max_attempts`` it is failed. An elastic
  group restarts whenever a node goes or comes: of its attempts only those count that are in a row
  and got no further than an earlier one.
* Evaluations are kept by step: a resumed attempt that repeats one changes nothing.
* A job that is no longer wanted ends at once: it leaves the queue, or its attempt's next sign of
  life is refused.
* A group is given what is like its last job, if that waits, so that its model and its data are
  there already; but no job is passed over more than ``MAX_PASSED_OVER`` times.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from e2lora.config import GroupSpec, TrialConfig
from e2lora.records import Failure

MAX_PASSED_OVER = 8
"""Jobs that a group may be given before one that came earlier, for the sake of what it holds."""


@dataclass(frozen=True)
class Job:
    """Work for one group. ``key`` names it; submitting the same key again attaches to it.

    ``affinity``: what it needs in memory, as ``"MODEL/TASK"``, see :func:`affinity_of`.
    """

    key: str
    kind: str  # "trial" or "profile": which function of the group runs it
    spec: GroupSpec
    payload: dict[str, str]
    affinity: str = ""


def affinity_of(config: TrialConfig) -> str:
    """What a job of this configuration finds in memory where another of the same ran before."""
    return f"{config.model.fingerprint()}/{config.task.fingerprint()}"


def likeness(one: str, other: str) -> int:
    """2: of the same model and task; 1: of the same model.

    >>> [likeness("m/sst2", other) for other in ("m/sst2", "m/cola", "n/sst2", "")]
    [2, 1, 0, 0]
    """
    return 2 if one == other else int(one.partition("/")[0] == other.partition("/")[0])


@dataclass(frozen=True)
class Attempt:
    """A job as one group holds it."""

    job: Job
    token: str


@dataclass(frozen=True)
class Update:
    """What a waiting client is told: all evaluations so far, and how it ended, if it has.

    ``history`` is what was measured at each step up to the last evaluation; ``held_seconds``, for
    how long groups have held the job, in all attempts. ``stopped``: it was no longer wanted.
    """

    evaluations: list[dict[str, Any]]
    outcomes: dict[str, list[float]]
    history: dict[str, list[float]]
    result: dict[str, Any] | None
    error: str | None
    attempts: int
    failure: Failure | None = None
    stopped: bool = False
    held_seconds: float = 0.0

    @property
    def ended(self) -> bool:
        return self.stopped or self.result is not None or self.error is not None


class Running(NamedTuple):
    """How far a running job is; ``measured`` is what its last step showed.

    ``doing``: something else than a step.
    """

    step: int
    attempt: int
    measured: dict[str, float]
    doing: str | None = None


@dataclass
class _State:
    job: Job
    attempts: int = 0
    vain_attempts: int = 0  # those that count
    farthest: int = 0  # step that an attempt which was lost had come to
    token: str | None = None  # of the attempt that holds the lease
    group: str | None = None
    lease_until: float = 0.0
    step: int = 0
    measured: dict[str, float] = field(default_factory=dict)
    doing: str | None = None
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, list[float]] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: str | None = None
    failure: Failure | None = None
    stopped: bool = False
    passed_over: int = 0  # jobs that were handed out before it though they came later
    held_since: float = 0.0
    held_seconds: float = 0.0
    version: int = 0  # rises with every change a client should see

    @property
    def ended(self) -> bool:
        return self.stopped or self.result is not None or self.error is not None


class Broker:
    """The queue of one study. All times in seconds."""

    def __init__(
        self,
        lease_seconds: float = 600.0,
        max_attempts: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_seconds, self._max_attempts, self._clock = lease_seconds, max_attempts, clock
        self._states: dict[str, _State] = {}
        self._queue: deque[str] = deque()
        self._incarnations: dict[str, int] = {}
        self._heard: dict[str, float] = {}  # group → when it last spoke, in whatever way
        self._leaving: dict[str, str] = {}  # token of a stopped job → the group that still has it
        self._served: dict[str, str] = {}  # group → affinity of its last job
        self._retiring: set[str] = set()
        self._given_up: set[str] = set()
        self._spent: dict[str, dict[str, float]] = {}  # group → seconds by what they went into
        self._closed = False
        self._trouble: str | None = None

    # ---- clients ------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job; one whose key is known, ended or not, stays as it is."""
        if job.key not in self._states:
            self._states[job.key] = _State(job)
            self._queue.append(job.key)

    def stop(self, key: str) -> bool:
        """The job is no longer wanted. False: it had ended already."""
        self._expire()
        state = self._states[key]
        if state.ended:
            return False
        if state.token is None:
            self._queue.remove(key)
        elif state.group:
            self._leaving[state.token] = state.group
        self._release(state)
        state.stopped = True
        state.version += 1
        return True

    def update(self, key: str, seen: int) -> tuple[int, Update] | None:
        """What is new since version ``seen``, or None."""
        self._expire()
        state = self._states[key]
        if state.version == seen:
            return None
        steps = sorted(state.evaluations)
        update = Update(
            evaluations=[state.evaluations[step] for step in steps],
            outcomes=state.outcomes,
            history=state.history,
            result=state.result,
            error=state.error,
            attempts=state.attempts,
            failure=state.failure,
            stopped=state.stopped,
            held_seconds=state.held_seconds,
        )
        return state.version, update

    def progress(self) -> dict[str, Running]:
        """Running jobs by their keys."""
        self._expire()
        running = (state for state in self._states.values() if state.token)
        return {s.job.key: Running(s.step, s.attempts, s.measured, s.doing) for s in running}

    # ---- groups -------------------------------------------------------------------------------

    def join(self, group: str) -> int:
        """A group (re)started: whatever it held before is lost. Returns its incarnation."""
        self._incarnations[group] = self._incarnations.get(group, 0) + 1
        self._heard[group] = self._clock()
        self._lose_all_of(group, f"its worker group {group} died")
        return self._incarnations[group]

    def leave(self, group: str) -> None:
        """A group's workers are gone, and others may be long in coming: what it held is lost."""
        self._lose_all_of(group, f"its worker group {group} died")

    def next_attempt(self, group: str, incarnation: int, spec: GroupSpec) -> Attempt | str | None:
        """An attempt for an idle group; ``"retire"`` if it should end; None if nothing waits."""
        self._expire()
        self._heard[group] = self._clock()
        if self._closed or self._trouble or group in self._retiring | self._given_up:
            return "retire"
        if self._incarnations.get(group) != incarnation:
            return "retire"  # another start of this group has taken its place
        self._lose_all_of(group, f"{group} left it")
        state = self._choose(group, spec)
        if state is None:
            return None
        self._queue.remove(state.job.key)
        self._served[group] = state.job.affinity
        state.passed_over = 0
        state.attempts += 1
        state.token = f"{state.job.key}/{state.attempts}"
        state.group = group
        state.held_since = self._clock()
        self._renew(state)
        return Attempt(state.job, state.token)

    def alive(
        self,
        token: str,
        step: int | None = None,
        measured: dict[str, float] | None = None,
        doing: str | None = None,
    ) -> bool:
        """A sign of life. False: the attempt has lost its job and must stop."""
        state = self._holder(token)
        if state is None:
            return False
        state.step = state.step if step is None else step
        state.measured = state.measured if measured is None else measured
        state.doing = doing
        self._renew(state)
        return True

    def report(
        self,
        token: str,
        evaluation: dict[str, Any],
        outcomes: dict[str, list[float]],
        history: dict[str, list[float]],
    ) -> bool:
        """An evaluation, kept by its step. False: refused, see :meth:`alive`."""
        state = self._holder(token)
        if state is None:
            return False
        if state.evaluations.get(evaluation["step"]) != evaluation or state.outcomes != outcomes:
            state.evaluations[evaluation["step"]] = evaluation
            state.outcomes, state.history = outcomes, history
            state.version += 1
        self._renew(state)
        return True

    def complete(self, token: str, result: dict[str, Any]) -> bool:
        return self._end(token, result, None)

    def fail(self, token: str, error: str, kind: Failure = "error") -> bool:
        """The attempt raised. That is the job's own failure and is not tried again."""
        return self._end(token, None, error, kind)

    def spend(self, group: str, seconds: dict[str, float]) -> None:
        """What a group's time went into, since it last told."""
        spent = self._spent.setdefault(group, {})
        for part, more in seconds.items():
            spent[part] = spent.get(part, 0.0) + more

    def lose(self, token: str, why: str) -> bool:
        """The attempt broke for a reason that need not be the job's own; it is tried again."""
        state = self._holder(token)
        if state is None:
            return False
        self._lose(state, why)
        return True

    def put_back(self, token: str, trouble: str) -> bool:
        """The attempt can't go on for what is wrong with all of them: it counts as none.

        No job is handed out any more.
        """
        self.tell_trouble(trouble)
        state = self._holder(token)
        if state is None:
            return False
        self._release(state)
        self._queue.appendleft(state.job.key)
        return True

    def tell_trouble(self, trouble: str) -> None:
        """Something keeps every job from being served; the first such thing is kept."""
        self._trouble = self._trouble or trouble

    # ---- the pool -----------------------------------------------------------------------------

    def demand(self) -> dict[GroupSpec, int]:
        """Jobs waiting, by the kind of group they need, in the order of the queue."""
        self._expire()
        waiting: dict[GroupSpec, int] = {}
        for key in self._queue:
            spec = self._states[key].job.spec
            waiting[spec] = waiting.get(spec, 0) + 1
        return waiting

    def trouble(self) -> str | None:
        """What keeps every job from being served."""
        return self._trouble

    def busy_groups(self) -> set[str]:
        """Those that hold a job, or have not left one yet that was stopped."""
        self._expire()
        holding = {s.group for s in self._states.values() if s.token and s.group}
        return holding | set(self._leaving.values())

    def retire(self, group: str) -> None:
        """The group ends when it next asks for work."""
        self._retiring.add(group)

    def give_up(self, group: str) -> None:
        """The group is not waited for any longer; what it held is lost."""
        self._given_up.add(group)
        self._lose_all_of(group, f"its worker group {group} was not there any more")

    def is_wanted(self, group: str) -> bool:
        """Whether a group that has not come up should go on trying."""
        return group not in self._given_up

    def spent(self) -> dict[str, dict[str, float]]:
        """Of each group, what it told with :meth:`spend` in all."""
        return self._spent

    def silences(self) -> dict[str, float]:
        """Seconds since each group that ever came up last spoke."""
        return {group: self._clock() - heard for group, heard in self._heard.items()}

    def close(self) -> None:
        """Every attempt ends at its next sign of life, unfinished, and every group retires."""
        self._closed = True
        for state in self._states.values():
            self._release(state)

    # ---- inside -------------------------------------------------------------------------------

    def _choose(self, group: str, spec: GroupSpec) -> _State | None:
        """The waiting job for an idle group, see the rules above."""
        fitting = [self._states[key] for key in self._queue if self._states[key].job.spec == spec]
        if not fitting:
            return None
        overdue = [state for state in fitting if state.passed_over >= MAX_PASSED_OVER]
        last = self._served.get(group, "")
        chosen = (
            overdue[0]
            if overdue
            else max(  # the first of those that are most alike
                fitting, key=lambda state: likeness(last, state.job.affinity)
            )
        )
        for state in fitting[: fitting.index(chosen)]:
            state.passed_over += 1
        return chosen

    def _holder(self, token: str) -> _State | None:
        self._expire()
        if token in self._leaving:
            self._heard[self._leaving[token]] = self._clock()
        state = self._states.get(token.rpartition("/")[0])
        return state if state is not None and state.token == token else None

    def _renew(self, state: _State) -> None:
        state.lease_until = self._clock() + self._lease_seconds
        if state.group:
            self._heard[state.group] = self._clock()

    def _expire(self) -> None:
        now = self._clock()
        for state in self._states.values():
            if state.token and state.lease_until < now:
                self._lose(state, f"it gave no sign of life for {self._lease_seconds:.0f} s")

    def _lose_all_of(self, group: str, why: str) -> None:
        self._leaving = {token: g for token, g in self._leaving.items() if g != group}
        for state in self._states.values():
            if state.group == group:
                self._lose(state, why)

    def _lose(self, state: _State, why: str) -> None:
        if state.token is None:
            return
        self._release(state)
        if state.job.spec.min_workers is not None and state.step > state.farthest:
            state.vain_attempts = 0
        state.vain_attempts += 1
        state.farthest = max(state.farthest, state.step)
        if state.vain_attempts >= self._max_attempts:
            counted = f" of {self._max_attempts}"
            if state.vain_attempts < state.attempts:
                counted = (
                    f", one of {self._max_attempts} in a row that got no further than step "
                    f"{state.farthest},"
                )
            state.error = f"attempt {state.attempts}{counted} was lost: {why}"
            state.failure = "lost"
            state.version += 1
        else:
            self._queue.appendleft(state.job.key)

    def _release(self, state: _State) -> None:
        """No group holds it any more."""
        if state.token is not None:
            state.held_seconds += self._clock() - state.held_since
        state.token = state.group = None

    def _end(
        self,
        token: str,
        result: dict[str, Any] | None,
        error: str | None,
        failure: Failure | None = None,
    ) -> bool:
        state = self._holder(token)
        if state is None:
            return False
        self._renew(state)
        self._release(state)
        state.result, state.error, state.failure = result, error, failure
        state.version += 1
        return True
