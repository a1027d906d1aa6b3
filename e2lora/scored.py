"""The trials of a study as what is compared: scores, cells of one system at one budget, sections.

A :class:`Section` is one model on one task; only trials of one section are compared. Nothing here
reads or writes a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from e2lora.config import AdapterConfig, Objective, PlanConfig, TrialConfig, system_name
from e2lora.pseudo import PSEUDO_METRICS
from e2lora.statistics import (
    ANYWHERE,
    SHARES,
    Interval,
    is_binary,
    pareto_front,
    proportion_interval,
)

TOLERANCE = 0.05  # of a cell's parameters from its budget, before it is said
REFERENCE = system_name(PlanConfig(topology="e2"), AdapterConfig(target_modules=("any",)))


@dataclass(frozen=True)
class Scored:
    """A complete trial: its metric ``value`` and, where stored, the outcome of every row.

    Attributes:
        outcome: the metric that ``outcomes`` are of: another one where the value is no mean over
            rows, as a correlation.
        origin: of its configuration, see :class:`e2lora.records.Suggestion`.
        chosen: of a run over seeds: the number of the trial whose configuration it has.
        test_value: the metric on the test rows, of runs that were scored on them.
        test_outcomes: as ``outcomes``, of the test rows.
    """

    number: int
    config: TrialConfig
    value: float
    parameters: int
    seconds: float
    outcomes: tuple[float, ...] | None = None
    outcome: str = ""
    origin: str = "sampler"
    chosen: int | None = None
    test_value: float | None = None
    test_outcomes: tuple[float, ...] | None = None

    @property
    def system(self) -> str:
        return self.config.system

    @property
    def r(self) -> int | None:
        return self.config.base_rank

    @property
    def budget(self) -> int | None:
        """The count of adapter parameters that its rank was chosen to meet."""
        return self.config.plan.target_parameters

    @cached_property
    def averages_outcomes(self) -> bool:
        """Whether the metric is the mean of the outcomes: only then a test of them speaks of it."""
        return _is_mean(self.value, self.outcomes)

    @cached_property
    def averages_test_outcomes(self) -> bool:
        """The same of the test rows."""
        return _is_mean(self.test_value, self.test_outcomes)

    @cached_property
    def interval(self) -> Interval | None:
        """95 % over the sampling of items, where the metric is a proportion of them."""
        if not self.outcomes or not self.averages_outcomes or not is_binary(self.outcomes):
            return None
        if self.outcome in PSEUDO_METRICS:  # no counts, even where all of them are 0
            return None
        return proportion_interval(round(sum(self.outcomes)), len(self.outcomes))


def _is_mean(value: float | None, outcomes: tuple[float, ...] | None) -> bool:
    if value is None or not outcomes:
        return False
    mean = math.fsum(outcomes) / len(outcomes)
    return math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-6)


def range_of(trials: Iterable[Scored]) -> Interval:
    """Where the metric of these trials can lie, as far as their outcomes tell."""
    return SHARES if all(trial.interval for trial in trials) else ANYWHERE


@dataclass(frozen=True)
class Unscored:
    """A trial that ended without a score that counts, and why.

    Attributes:
        is_effort: whether the configuration itself is the reason (a loss that diverged, an early
            stop): its cell had that try.
    """

    number: int
    config: TrialConfig
    error: str
    origin: str = "sampler"
    is_effort: bool = False


@dataclass(frozen=True)
class Cell:
    """One system at one budget.

    Attributes:
        tries: of its quota, those that are complete.
        effort: how many of its quota have been tried, those that diverged among them.
        chosen: the best of ``tries``: what stands for the system at this budget.
        runs: of the chosen configuration over seeds, in order of seeds; of a random partition each
            is another draw.
    """

    system: str
    budget: int
    tries: tuple[Scored, ...]
    effort: int
    chosen: Scored | None
    runs: tuple[Scored, ...] = ()

    @property
    def deviation(self) -> float:
        """Of the parameters from the budget, as a share of it."""
        return (self.chosen.parameters - self.budget) / self.budget if self.chosen else math.nan

    @property
    def misses_budget(self) -> bool:
        """Whether by so much that it must be said."""
        return abs(self.deviation) > TOLERANCE


@dataclass(frozen=True)
class Section:
    """The trials of one model on one task, and the metric they are judged by.

    Attributes:
        runs: of chosen configurations over seeds.
        quota: tries that each cell shall have.
    """

    model: str
    task: str
    metric: Objective
    trials: tuple[Scored, ...]
    unscored: tuple[Unscored, ...] = ()
    baseline: float | None = None
    runs: tuple[Scored, ...] = ()
    quota: int = 0

    @property
    def title(self) -> str:
        return f"{self.model} on {self.task}"

    @property
    def budgets(self) -> list[int]:
        """Those of the trials, from small to large."""
        return sorted({trial.budget for trial in self.trials if trial.budget is not None})

    @cached_property
    def front(self) -> frozenset[int]:
        """Numbers of the trials that no other beats in both metric and adapter parameters."""
        values = [(trial.value, trial.parameters) for trial in self.trials]
        kept = pareto_front(values, (self.metric.direction, "minimize"))
        return frozenset(self.trials[i].number for i in kept)

    def best(self, chosen: Callable[[Scored], bool] = lambda trial: True) -> Scored | None:
        """The best of the chosen by the metric; ties go to fewer parameters, then the earlier."""
        sign = -1.0 if self.metric.direction == "maximize" else 1.0
        return min(
            filter(chosen, self.trials),
            key=lambda trial: (sign * trial.value, trial.parameters, trial.number),
            default=None,
        )

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every system at every budget that the quota has tried it at: by budget, then by name."""
        every: tuple[Scored | Unscored, ...] = (*self.trials, *self.unscored)
        of_quota = [trial for trial in every if trial.origin == "quota"]
        keys = {
            (t.config.plan.target_parameters, t.config.system)
            for t in of_quota
            if t.config.plan.target_parameters is not None
        }
        return tuple(
            self._cell(system, budget)
            for budget, system in sorted(keys, key=lambda key: (key[0], key[1].casefold()))
        )

    def _cell(self, system: str, budget: int) -> Cell:
        def belongs(trial: Scored | Unscored) -> bool:
            plan = trial.config.plan
            mine = (trial.config.system, plan.target_parameters) == (system, budget)
            return mine and trial.origin == "quota"

        tries = tuple(filter(belongs, self.trials))
        lost = sum(belongs(t) and t.is_effort for t in self.unscored)
        chosen = self.best(belongs)
        runs = [run for run in self.runs if chosen and run.chosen == chosen.number]
        runs.sort(key=lambda run: (run.config.seed, run.config.plan.partition_seed or 0))
        return Cell(system, budget, tries, len(tries) + lost, chosen, tuple(runs))
