"""From scored trials to sentences: fronts, paired comparisons at equal base rank, and caveats.

A :class:`Section` is one model on one task; only trials of one section are compared. Nothing here
reads or writes a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from e2lora.config import (
    AdapterConfig,
    Objective,
    PlanConfig,
    TaskConfig,
    TextsConfig,
    TrialConfig,
    system_name,
)
from e2lora.statistics import (
    Interval,
    PairedTest,
    holm,
    is_binary,
    paired_test,
    pareto_front,
    proportion_interval,
)

REFERENCE = system_name(PlanConfig(topology="e2"), AdapterConfig(target_modules=("any",)))
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Scored:
    """A complete trial: its metric ``value`` and, where stored, the outcome of every row.

    Attributes:
        outcome: the metric that ``outcomes`` are of: another one where the value is no mean over
            rows, as a correlation.
    """

    number: int
    config: TrialConfig
    value: float
    parameters: int
    seconds: float
    outcomes: tuple[float, ...] | None = None
    outcome: str = ""

    @property
    def system(self) -> str:
        return self.config.system

    @property
    def r(self) -> int | None:
        return self.config.base_rank

    @cached_property
    def averages_outcomes(self) -> bool:
        """Whether the metric is the mean of the outcomes: only then a test of them speaks of it."""
        if not self.outcomes:
            return False
        mean = math.fsum(self.outcomes) / len(self.outcomes)
        return math.isclose(mean, self.value, rel_tol=1e-6, abs_tol=1e-6)

    @cached_property
    def interval(self) -> Interval | None:
        """95 % over the sampling of items, where the metric is a proportion of them."""
        if not self.outcomes or not self.averages_outcomes or not is_binary(self.outcomes):
            return None
        return proportion_interval(round(sum(self.outcomes)), len(self.outcomes))


@dataclass(frozen=True)
class Unscored:
    """A trial that ended without a score, and why."""

    number: int
    config: TrialConfig
    error: str


@dataclass(frozen=True)
class Section:
    """The trials of one model on one task, and the metric they are judged by."""

    model: str
    task: str
    metric: Objective
    trials: tuple[Scored, ...]
    unscored: tuple[Unscored, ...] = ()
    baseline: float | None = None

    @property
    def title(self) -> str:
        return f"{self.model} on {self.task}"

    @property
    def ranks(self) -> list[int]:
        """The base ranks there are."""
        return sorted({trial.r for trial in self.trials if trial.r is not None})

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
    def best_numbers(self) -> frozenset[int]:
        """Numbers of the best trial of each system and base rank."""
        found = (
            self.best(lambda t, cell=cell: (t.system, t.r) == cell)  # type: ignore[misc]
            for cell in {(t.system, t.r) for t in self.trials}
        )
        return frozenset(trial.number for trial in found if trial)


@dataclass(frozen=True)
class Comparison:
    """E²LoRA's best trial against another system's best at one base rank.

    Either ``test`` is there (its difference is E²LoRA minus the other), or ``refusal`` says why
    the two can't be paired.
    """

    reference: Scored
    other: Scored
    test: PairedTest | None = None
    refusal: str = ""
    adjusted_p: float = math.nan


def compare(section: Section) -> list[Comparison]:
    """Every other system against E²LoRA at each base rank that both have, p-values not adjusted.

    Full fine-tuning has no rank: it stands beside E²LoRA at each.
    """
    comparisons = []
    for r in section.ranks:
        reference = section.best(lambda t, r=r: (t.system, t.r) == (REFERENCE, r))  # type: ignore[misc]
        others = (
            t for t in section.trials if t.r in (r, None) and t.number in section.best_numbers
        )
        for other in sorted(others, key=lambda t: t.system.casefold()):
            if reference and other.system != REFERENCE:
                comparisons.append(_pair(reference, other))
    return comparisons


def _pair(reference: Scored, other: Scored) -> Comparison:
    a, b = reference.outcomes, other.outcomes
    if not a or not b:
        lacking = other if a else reference
        refusal = f"trial {lacking.number} has no outcomes per item"
        return Comparison(reference, other, refusal=refusal)
    if len(a) != len(b):
        refusal = f"the two were scored on {len(a)} and {len(b)} items"
        return Comparison(reference, other, refusal=refusal)
    if differing := _differing_rows(reference.config.task, other.config.task):
        refusal = f"their validation rows may differ (in {', '.join(differing)})"
        return Comparison(reference, other, refusal=refusal)
    return Comparison(reference, other, paired_test(a, b))


def _differing_rows(one: TaskConfig, other: TaskConfig) -> list[str]:
    """Options in which two tasks differ, of those that decide what is asked of a model."""
    if type(one) is not type(other):
        return ["kind"]
    # What a text is cut to changes a model's answers, not what is asked; sft cuts the answers
    # that are scored.
    cut = {"max_length"} if isinstance(one, TextsConfig) else None
    a_rows, b_rows = (task.model_dump(exclude=cut) for task in (one, other))
    return [key for key in a_rows if a_rows[key] != b_rows[key]]


def adjust(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's adjustment over all comparisons that were tested."""
    p_values = iter(holm([c.test.p_value for c in comparisons if c.test]))
    return [replace(c, adjusted_p=next(p_values)) if c.test else c for c in comparisons]


def write_verdict(
    sections: Sequence[Section], progress: str, interim: bool, notes: Sequence[str] = ()
) -> str:
    """What the trials show and what they don't, one statement per line.

    Lines that begin with ``#`` are headings, those with ``-`` items of a list.

    Args:
        progress: how many trials have ended.
        interim: whether more trials are planned.
        notes: on the data, that a reader must know.
    """
    compared = [compare(section) for section in sections]
    adjusted = iter(adjust([c for comparisons in compared for c in comparisons]))
    lines = [progress]
    if not any(section.trials for section in sections):
        return f"{progress}\nNo trial is complete yet: there is nothing to compare."
    tested = 0
    for section, comparisons in zip(sections, compared, strict=True):
        lines.append(f"# {section.title}")
        if not section.trials:
            lines.append("No trial is complete yet: there is nothing to compare.")
            continue
        lines += _front_lines(section)
        mine = [next(adjusted) for _ in comparisons]
        tested += sum(c.test is not None for c in mine)
        for r in section.ranks:
            lines += _rank_lines(section, r, [c for c in mine if c.reference.r == r])
    lines.append("# How to read this")
    lines += [f"- {line}" for line in (*_caveats(sections, tested, interim), *notes)]
    return "\n".join(lines)


def _front_lines(section: Section) -> Iterable[str]:
    front = sorted(
        (t for t in section.trials if t.number in section.front), key=lambda t: t.parameters
    )
    names = ", ".join(f"{t.config.label} ({t.parameters:,}: {t.value:.4f})" for t in front)
    better = "higher" if section.metric.direction == "maximize" else "lower"
    yield (
        f"Not dominated in {section.metric.name} ({better} is better) and adapter parameters, "
        f"by point estimates: {names}."
    )


def _rank_lines(section: Section, r: int, comparisons: Sequence[Comparison]) -> Iterable[str]:
    if not comparisons:
        has = any((t.system, t.r) == (REFERENCE, r) for t in section.trials)
        lacking = "no other system has" if has else f"{REFERENCE} has no"
        yield f"Base rank {r}: {lacking}{' a' if has else ''} complete trial; nothing is compared."
        return
    tried = Counter((t.system, t.r) for t in section.trials)

    def describe(t: Scored) -> str:
        best_of = f"best of {tried[t.system, t.r]}" if tried[t.system, t.r] > 1 else "1 trial"
        return f"{t.system} ({best_of}; {t.parameters:,} parameters; {t.value:.4f})"

    yield f"Base rank {r}: {describe(comparisons[0].reference)} against"
    for c in comparisons:
        if c.test is None:
            yield f"- {describe(c.other)}: not compared, since {c.refusal}."
            continue
        low, high = c.test.interval
        yield (
            f"- {describe(c.other)}: difference {c.test.difference:+.4f} (95 % interval {low:+.4f} "
            f"to {high:+.4f}, n = {c.test.n:,}), {c.test.method} p {_p(c.test.p_value)}, adjusted "
            f"p {_p(c.adjusted_p)}: {_finding(c, section.metric)}."
        )


def _finding(c: Comparison, metric: Objective) -> str:
    assert c.test is not None
    speaks = c.reference.averages_outcomes and c.other.averages_outcomes
    subject = "" if speaks else f" in {c.reference.outcome} ({metric.name} has no value per item)"
    if c.adjusted_p > SIGNIFICANCE:
        return f"no significant difference{subject}"
    if not speaks:
        side = "higher" if c.test.difference > 0 else "lower"
        return f"{REFERENCE} is significantly {side}{subject}"
    better = (c.test.difference > 0) == (metric.direction == "maximize")
    return f"{REFERENCE} is significantly {'better' if better else 'worse'}"


def _caveats(sections: Sequence[Section], tested: int, interim: bool) -> Iterable[str]:
    trials = [trial for section in sections for trial in section.trials]
    if tested:
        yield (
            f"A difference is {REFERENCE} minus the other system, on the same validation items. "
            f"P-values are adjusted by Holm's method over {tested} comparison(s), significance "
            f"level {SIGNIFICANCE}. Each interval is for its comparison alone, so it may leave out "
            "0 where the adjusted p-value finds nothing. No significant difference does not mean "
            "equal: the interval says what remains possible."
        )
    seeds = sorted({trial.config.seed for trial in trials})
    ran = f"one seed ({seeds[0]})" if len(seeds) == 1 else f"{len(seeds)} seeds, one run each,"
    yield (
        f"With {ran} the tests and intervals cover the sampling of validation items, not the "
        "variance between training runs: another seed may move every score."
    )
    counts = Counter(trial.system for trial in trials)
    numbers = ", ".join(f"{s} {counts[s]}" for s in sorted(counts, key=str.casefold))
    yield (
        "Each system enters with its best trial on the very rows it is then tested on, which "
        f"favours systems with more trials. Complete trials per system: {numbers}."
    )
    yield (
        "Systems at equal base rank mostly have different numbers of adapter parameters: equal "
        "rank is not equal size. The front compares by size, without regard to uncertainty."
    )
    if interim:
        yield (
            "This is an interim result: tests repeated while a study runs find too much, since "
            "the adjustment does not count the looks."
        )


def _p(value: float) -> str:
    """A p-value as a report prints it.

    >>> _p(0.0002), _p(0.0423)
    ('< 0.001', '= 0.042')
    """
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
