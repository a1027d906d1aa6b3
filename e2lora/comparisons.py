"""Which cells are compared, by which test, and what may be deployed.

A comparison is of two cells of one section, each standing for a system at a budget: over seeds
where both have run the same ones, else of the one trial that stands for each. Nothing here writes
a sentence but the reason why something is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from e2lora.config import Objective, TaskConfig, TextsConfig
from e2lora.scored import REFERENCE, Cell, Scored, Section
from e2lora.statistics import PairedTest, holm, paired_over_seeds, paired_test

SIGNIFICANCE = 0.05
NUM_DRAWS = 5  # of random partitions, before they are a control

Rows = Literal["validation", "test"]


@dataclass(frozen=True)
class Comparison:
    """One cell against another; the difference of a test is the first minus the second.

    Attributes:
        test: None where ``refusal`` says why the two can't be compared.
        one_seed: why it is of one trial each and not over seeds; empty: it is over seeds.
        rows: that the outcomes are of.
        speaks: whether the outcomes' mean is the metric, so that the test speaks of it.
        adjusted_p: for all comparisons of its kind in a report.
    """

    a: Cell
    b: Cell
    test: PairedTest | None = None
    refusal: str = ""
    one_seed: str = ""
    rows: Rows = "validation"
    speaks: bool = True
    adjusted_p: float = math.nan

    @property
    def is_significant(self) -> bool:
        return self.test is not None and self.adjusted_p <= SIGNIFICANCE

    def favours_a(self, metric: Objective) -> bool:
        """Whether the first does better, by the estimate alone."""
        assert self.test is not None
        return (self.test.difference > 0) == (metric.direction == "maximize")


def compare(section: Section) -> list[Comparison]:
    """E²LoRA against every other system at each budget; p-values not adjusted yet.

    On test rows where all runs of the two were scored on them: nothing was chosen by those.
    """
    found = []
    for budget in cell_budgets(section):
        cells = [cell for cell in section.cells if cell.budget == budget]
        reference = next((cell for cell in cells if cell.system == REFERENCE), None)
        if reference:
            others = (cell for cell in cells if cell is not reference)
            found += [_contest(section, reference, other) for other in others]
    return found


def cell_budgets(section: Section) -> list[int]:
    """Those of cells, from small to large."""
    return sorted({cell.budget for cell in section.cells})


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's adjustment, over all that were tested over seeds, and over all others."""
    adjusted = list(comparisons)
    for over_seeds in (True, False):
        places = [
            place
            for place, c in enumerate(comparisons)
            if c.test and (not c.one_seed) == over_seeds
        ]
        p_values = [c.test.p_value for c in (comparisons[place] for place in places) if c.test]
        for place, p_value in zip(places, holm(p_values), strict=True):
            adjusted[place] = replace(comparisons[place], adjusted_p=p_value)
    return adjusted


def _contest(section: Section, a: Cell, b: Cell, rows: Rows | None = None) -> Comparison:
    if refusal := _unequal_effort(section, a, b):
        return Comparison(a, b, refusal=refusal)
    if rows is None:
        scored = all(run.test_outcomes for run in (*a.runs, *b.runs))
        rows = "test" if scored and a.runs and b.runs else "validation"
    if not (lacking := _why_not_over_seeds(a, b, rows)):
        left, right = outcomes_by_seed(a, rows), outcomes_by_seed(b, rows)
        seeds = sorted(left)
        test = paired_over_seeds([left[s] for s in seeds], [right[s] for s in seeds])
        return Comparison(a, b, test, rows=rows, speaks=_speaks((*a.runs, *b.runs), rows))
    assert a.chosen
    assert b.chosen
    if refusal := _why_not_paired([a.chosen], [b.chosen], "validation"):
        return Comparison(a, b, refusal=refusal, one_seed=lacking)
    test = paired_test(a.chosen.outcomes or (), b.chosen.outcomes or ())
    speaks = _speaks((a.chosen, b.chosen), "validation")
    return Comparison(a, b, test, one_seed=lacking, speaks=speaks)


def _speaks(trials: Sequence[Scored], rows: Rows) -> bool:
    return all(
        t.averages_outcomes if rows == "validation" else t.averages_test_outcomes for t in trials
    )


def _unequal_effort(section: Section, a: Cell, b: Cell) -> str:
    empty = [cell for cell in (a, b) if cell.chosen is None]
    if empty:
        return f"none of the {empty[0].effort} tries of {empty[0].system} is complete"
    if a.effort == b.effort == section.quota:
        return ""
    return (
        f"their effort is unequal or not complete: of a quota of {section.quota} tries {a.system} "
        f"has had {a.effort}, {b.system} {b.effort}"
    )


def _why_not_over_seeds(a: Cell, b: Cell, rows: Rows) -> str:
    lacking = [cell.system for cell in (a, b) if not cell.runs]
    if lacking:
        return f"{' and '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} no runs over seeds"
    seeds = [sorted({run.config.seed for run in cell.runs}) for cell in (a, b)]
    if seeds[0] != seeds[1]:
        return (
            f"{a.system} has runs of seeds {seeds[0]}, {b.system} of {seeds[1]}: what is missing "
            "may be missing for a reason"
        )
    if len(seeds[0]) < 2:
        return "there are runs of one seed only"
    return _why_not_paired(a.runs, b.runs, rows)


def _why_not_paired(a: Sequence[Scored], b: Sequence[Scored], rows: Rows) -> str:
    for trial in (*a, *b):
        if not _outcomes(trial, rows):
            return f"trial {trial.number} has no outcomes per item"
    numbers = sorted({len(_outcomes(trial, rows) or ()) for trial in (*a, *b)})
    if len(numbers) > 1:
        return f"they were scored on {' and '.join(map(str, numbers))} items"
    first = a[0].config.task
    for trial in (*a[1:], *b):
        if differing := _differing_rows(first, trial.config.task):
            return f"their {rows} rows may differ (in {', '.join(differing)})"
    named = {trial.outcome for trial in (*a, *b)}
    if len(named) > 1:
        return f"their outcomes are of different metrics ({', '.join(sorted(named))})"
    return ""


def _differing_rows(one: TaskConfig, other: TaskConfig) -> list[str]:
    """Options in which two tasks differ, of those that decide what is asked of a model."""
    if one == other:
        return []
    if type(one) is not type(other):
        return ["kind"]
    # What a text is cut to changes a model's answers, not what is asked; sft cuts the answers
    # that are scored.
    cut = {"max_length"} if isinstance(one, TextsConfig) else None
    a_rows, b_rows = (task.model_dump(exclude=cut) for task in (one, other))
    return [key for key in a_rows if a_rows[key] != b_rows[key]]


def _outcomes(trial: Scored, rows: Rows) -> tuple[float, ...] | None:
    return trial.outcomes if rows == "validation" else trial.test_outcomes


def outcomes_by_seed(cell: Cell, rows: Rows) -> Mapping[int, NDArray[np.float64]]:
    """Of its runs; of several draws with one seed the mean."""
    by_seed: dict[int, list[NDArray[np.float64]]] = {}
    for run in cell.runs:
        by_seed.setdefault(run.config.seed, []).append(np.array(_outcomes(run, rows), dtype=float))
    return {seed: np.mean(draws, axis=0) for seed, draws in by_seed.items()}


def values_by_seed(cell: Cell, rows: Rows) -> Mapping[int, float]:
    """The metric of its runs that have it; of several draws with one seed the mean."""
    by_seed: dict[int, list[float]] = {}
    for run in cell.runs:
        value = run.value if rows == "validation" else run.test_value
        if value is not None:
            by_seed.setdefault(run.config.seed, []).append(value)
    return {seed: math.fsum(draws) / len(draws) for seed, draws in by_seed.items()}


def is_random(cell: Cell) -> bool:
    """Whether its runs are draws of random partitions."""
    trials = [*cell.tries, *cell.runs]
    return bool(trials) and trials[0].config.plan.topology == "random"


def num_draws(cell: Cell) -> int:
    """Different partitions among its runs; without runs, the one that stands for it."""
    trials = cell.runs or ((cell.chosen,) if cell.chosen else ())
    return len({trial.config.plan.partition_seed for trial in trials})


@dataclass(frozen=True)
class Choice:
    """What to deploy: the smallest cell that is not found worse than the best one.

    Attributes:
        against_best: its comparison with the best; None if it is the best.
        over_seeds: whether by means over seeds, or by one trial each.
        num_cells: among which it was chosen.
        num_worse: smaller ones that were found worse than the best.
        num_untested: smaller ones that could not be tested against it.
    """

    cell: Cell
    best: Cell
    against_best: Comparison | None
    over_seeds: bool
    num_cells: int
    num_worse: int
    num_untested: int


def choose(section: Section) -> Choice | None:
    """By the validation rows, whatever else was scored: test rows are for what was chosen.

    A test against the best is not adjusted for their number here: adjusting would make it harder
    to find a system worse, and so easier to deploy one that is. Random partitions are a control
    and not chosen. None where no cell has had its whole quota.
    """
    cells = [c for c in section.cells if c.chosen and c.effort == section.quota]
    cells = [cell for cell in cells if not is_random(cell)]
    by_seeds = [values_by_seed(cell, "validation") for cell in cells]
    most = max((frozenset(values) for values in by_seeds), key=len, default=frozenset())
    complete = [c for c, values in zip(cells, by_seeds, strict=True) if values.keys() == most]
    over_seeds = len(most) > 1 and len(complete) > 1
    cells = complete if over_seeds else cells
    if not cells:
        return None
    sign = -1.0 if section.metric.direction == "maximize" else 1.0

    def rank(cell: Cell) -> tuple[float, int]:
        assert cell.chosen
        values = values_by_seed(cell, "validation").values() if over_seeds else [cell.chosen.value]
        return sign * math.fsum(values) / len(values), cell.chosen.parameters

    best = min(cells, key=rank)
    smaller = [cell for cell in cells if rank(cell)[1] < rank(best)[1]]
    num_worse = num_untested = 0
    for cell in sorted(smaller, key=lambda cell: (rank(cell)[1], rank(cell)[0])):
        against = _contest(section, cell, best, rows="validation")
        if against.test is None or bool(against.one_seed) == over_seeds:
            num_untested += 1
        elif against.test.p_value > SIGNIFICANCE or against.favours_a(section.metric):
            return Choice(cell, best, against, over_seeds, len(cells), num_worse, num_untested)
        else:
            num_worse += 1
    return Choice(best, best, None, over_seeds, len(cells), num_worse, num_untested)
