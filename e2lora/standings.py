"""How the systems of a section stand: at each budget, over seeds, and trial by trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from e2lora.config import AdapterConfig, PlanConfig, system_name
from e2lora.scored import REFERENCE, TOLERANCE, Cell, Scored, Section, range_of
from e2lora.statistics import ANYWHERE, Interval, mean_and_sd, seed_interval
from e2lora.tables import Table

_ANY = AdapterConfig(target_modules=("any",))
CONTROLS = tuple(
    system_name(plan, _ANY)
    for plan in (PlanConfig(topology="random", partition_seed=0), PlanConfig(topology="matched"))
)
BUDGET_COLUMNS = ("budget", "system", "r", "learning rate", "parameters", "tries")
SEED_COLUMNS = ("over seeds: mean ± sd (n)", "95 % interval", "test")
TRIAL_COLUMNS = ("", "system", "r", "learning rate", "budget", "parameters")
NUMBERS = frozenset(
    ("budget", "r", "learning rate", "parameters", "tries", "test", "time", "trial", "difference")
)


@dataclass(frozen=True)
class Spread:
    """Runs of one configuration: mean, standard deviation (of a sample), t interval of the mean.

    >>> spread = Spread.of([0.7, 0.8, 0.9])
    >>> f"{spread.mean:.2f} ± {spread.deviation:.2f}", round(spread.interval.low, 3)
    ('0.80 ± 0.10', 0.552)
    """

    n: int
    mean: float
    deviation: float = math.nan
    interval: Interval | None = None

    @classmethod
    def of(cls, values: Sequence[float], within: Interval = ANYWHERE) -> Spread:
        """Of at least one value; a single one has no spread."""
        if len(values) == 1:
            return cls(1, values[0])
        return cls(len(values), *mean_and_sd(values), seed_interval(values, within=within))

    def told(self) -> str:
        """
        >>> Spread.of([0.7]).told(), Spread.of([0.7, 0.8]).told()
        ('0.7000 (1)', '0.7500 ± 0.0707 (2)')
        """
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.4f}"
        return f"{self.mean:.4f}{spread} ({self.n})"


def runs_of(section: Section, trial: Scored) -> list[Scored]:
    """Of a trial's configuration over seeds."""
    return [run for run in section.runs if run.chosen == trial.number]


def spread_of(section: Section, trial: Scored) -> Spread | None:
    """Over seeds; None where the configuration has no runs over them."""
    runs = runs_of(section, trial)
    return Spread.of([run.value for run in runs], range_of(runs)) if runs else None


def representatives(section: Section) -> list[Scored]:
    """What stands for each system at each size: the quota's best at each budget.

    Where there was no quota: the best trial of each system at each budget, or base rank.
    """
    if section.cells:
        return [cell.chosen for cell in section.cells if cell.chosen]
    keys = dict.fromkeys((t.system, t.budget, t.r) for t in section.trials)
    found = (section.best(_is(key)) for key in keys)
    return sorted(filter(None, found), key=lambda t: (t.parameters, t.system.casefold()))


def _is(key: tuple[str, int | None, int | None]) -> Callable[[Scored], bool]:
    return lambda t: (t.system, t.budget, t.r) == key


def budget_table(section: Section) -> Table:
    """Every system at each budget, by the best of its quota, and that one over seeds."""
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    for budget in section.budgets:
        cells = [cell for cell in section.cells if cell.budget == budget]
        names = [cell.system for cell in cells]
        absent = [name for name in CONTROLS if name not in names]
        lines = [(cell.system, cell) for cell in cells] + [(name, None) for name in absent]
        for system, cell in sorted(lines, key=lambda line: line[0].casefold()):
            strong += [len(rows)] if system == REFERENCE else []
            first = f"{budget:,}" if system == min(lines, key=_name)[0] else ""
            rows.append((first, system, *_cell_row(section, cell)))
    unbudgeted = [t for t in section.trials if t.budget is None]
    for system in dict.fromkeys(t.system for t in unbudgeted):
        best = section.best(lambda t, s=system: t.budget is None and t.system == s)  # type: ignore[misc]
        assert best is not None
        tries = f"{sum(t.system == system for t in unbudgeted)}, no quota"
        rows.append(("none", system, *_trial_row(section, best, f"{best.parameters:,}", tries)))
    return Table(
        "Systems at each budget",
        (*BUDGET_COLUMNS, section.metric.name, *SEED_COLUMNS, "time"),
        tuple(rows),
        NUMBERS,
        tuple(_budget_notes(section)),
        frozenset(strong),
    ).without_empty_columns()


def _name(line: tuple[str, Cell | None]) -> str:
    return line[0].casefold()


def _cell_row(section: Section, cell: Cell | None) -> tuple[str, ...]:
    if cell is None:
        return ("", "", "", "", "not in this study", "", "", "", "")
    failed = cell.effort - len(cell.tries)
    tries = f"{cell.effort} of {section.quota}" + (f", {failed} diverged" if failed else "")
    if cell.chosen is None:
        return ("", "", "", tries, "no complete try", "", "", "", "")
    away = f" ({100 * cell.deviation:+.0f} %)" if cell.misses_budget else ""
    parameters = f"{cell.chosen.parameters:,}{away}"
    return _trial_row(section, cell.chosen, parameters, tries)


def _trial_row(section: Section, t: Scored, parameters: str, tries: str) -> tuple[str, ...]:
    spread = spread_of(section, t)
    tests = [run.test_value for run in runs_of(section, t) if run.test_value is not None]
    interval = spread.interval if spread else None
    return (
        "–" if t.r is None else str(t.r),
        f"{t.config.training.learning_rate:.2g}",
        parameters,
        tries,
        f"{t.value:.4f}",
        spread.told() if spread else "",
        f"{interval.low:.4f}–{interval.high:.4f}" if interval else "",
        f"{fmean(tests):.4f}" if tests else "",
        _time(t.seconds),
    )


def _budget_notes(section: Section) -> Iterable[str]:
    if not section.trials:
        yield "No trial is complete yet."
        return
    if section.cells:
        yield (
            f"{section.metric.name}: the best of the quota, one seed each; tries: how many of the "
            "quota's trials of full length have ended; time: of that trial."
        )
        if any(cell.misses_budget for cell in section.cells):
            yield f"In brackets: how far a budget is missed, where by over {100 * TOLERANCE:g} %."
    if any(t.budget is None for t in section.trials) and section.cells:
        yield "Budget none: systems without a target; the best trial of each."
    if section.runs:
        yield "95 % interval: of the mean over seeds (Student's t); test: mean over the same runs."
    yield from baseline_notes(section)


def baseline_notes(section: Section) -> Iterable[str]:
    if section.baseline is not None:
        yield f"majority baseline: {section.baseline:.4f}"


def trials_table(section: Section) -> Table:
    """Every complete trial of the search, with its mark if it is on the front."""
    interval = " (95 % interval)" if any(t.interval for t in section.trials) else ""
    notes = [*baseline_notes(section)]
    if section.trials:
        notes.insert(0, "* on the front: every trial that is better has more adapter parameters")
    else:
        notes.insert(0, "No trial is complete yet.")
    notes += unscored_notes(section)
    return Table(
        "All trials",
        (*TRIAL_COLUMNS, f"{section.metric.name}{interval}", "time", "origin", "trial"),
        tuple(_compact_row(section, t) for t in section.trials),
        NUMBERS,
        tuple(notes),
        frozenset(i for i, t in enumerate(section.trials) if t.number in section.front),
        is_long=True,
    ).without_empty_columns()


def unscored_notes(section: Section) -> Iterable[str]:
    for t in section.unscored:
        yield f"not scored: trial {t.number}, {t.config.label}: {' '.join(t.error.split())}"


def _compact_row(section: Section, t: Scored) -> tuple[str, ...]:
    interval = f" ({t.interval.low:.3f}–{t.interval.high:.3f})" if t.interval else ""
    return (
        "*" if t.number in section.front else "",
        t.system,
        "–" if t.r is None else str(t.r),
        f"{t.config.training.learning_rate:.2g}",
        "" if t.budget is None else f"{t.budget:,}",
        f"{t.parameters:,}",
        f"{t.value:.4f}{interval}",
        _time(t.seconds),
        t.origin,
        str(t.number),
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
