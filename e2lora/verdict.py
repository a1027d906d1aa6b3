"""From scored trials to sentences: what to deploy, how systems compare at each budget, caveats.

Only trials of one section, one model on one task, are compared. Nothing here reads or writes a
file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from e2lora.comparisons import (
    SIGNIFICANCE,
    Choice,
    Comparison,
    adjust,
    cell_budgets,
    choose,
    compare,
    is_random,
    values_by_seed,
)
from e2lora.config import Objective
from e2lora.scored import REFERENCE, Scored, Section, Unscored
from e2lora.statistics import mean_and_sd
from e2lora.wording import described, named, p_told, size_of, spread_of

CONTROLS = {"random": "random partitions", "matched": "matched blocks"}
SEEDS_REMEDY = "run the chosen configurations over seeds (`--seeds 5`)"


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
    if not any(section.trials for section in sections):
        return f"{progress}\nNo trial is complete yet: there is nothing to compare."
    lines = [progress]
    compared = compare_all(sections)
    for section, comparisons in zip(sections, compared, strict=True):
        lines.append(f"# {section.title}")
        if not section.trials:
            lines.append("No trial is complete yet: there is nothing to compare.")
            continue
        lines += _conclusion(section, comparisons)
        lines.append(_front_line(section))
        for budget in cell_budgets(section):
            mine = [c for c in comparisons if c.a.budget == budget]
            lines += _budget_lines(section, budget, mine)
        lines += _control_lines(section)
    every = [c for comparisons in compared for c in comparisons]
    lines.append("# How to read this")
    lines += [f"- {line}" for line in (*_caveats(sections, every, interim), *notes)]
    return "\n".join(lines)


def compare_all(sections: Sequence[Section]) -> list[list[Comparison]]:
    """Those of each section, p-values adjusted over all of them."""
    compared = [compare(section) for section in sections]
    adjusted = iter(adjust([c for comparisons in compared for c in comparisons]))
    return [[next(adjusted) for _ in comparisons] for comparisons in compared]


# ---- the conclusion -----------------------------------------------------------------------------


def _conclusion(section: Section, comparisons: Sequence[Comparison]) -> Iterable[str]:
    if not section.cells:
        yield (
            "No system was tried at a budget by a quota, so none is compared: trials stand on the "
            "front only."
        )
        return
    over_seeds = [c for c in comparisons if c.test and not c.one_seed]
    single = [c for c in comparisons if c.test and c.one_seed]
    if over_seeds:
        summary = _summary(section, over_seeds)
        yield f"{REFERENCE} against others of its budget, over seeds: {summary}."
    if single:
        yield (
            f"Exploratory, of single trained models: {_summary(section, single)}. To learn of the "
            f"systems themselves, {SEEDS_REMEDY}."
        )
    refused = len(comparisons) - len(over_seeds) - len(single)
    if refused:
        yield f"{refused} comparison(s) could not be made; the reasons stand below."
    if choice := choose(section):
        yield _deployment(section, choice)


def _summary(section: Section, comparisons: Sequence[Comparison]) -> str:
    parts = []
    found = [c for c in comparisons if c.is_significant]
    if not all(c.speaks for c in found):
        parts.append(
            f"significant differences in {len(found)}, in another measure than "
            f"{section.metric.name}"
        )
        found = []
    for word, is_better in (("better", True), ("worse", False)):
        others = [named(c.b) for c in found if c.favours_a(section.metric) == is_better]
        if others:
            parts.append(f"significantly {word} than {', '.join(others)}")
    rest = sum(not c.is_significant for c in comparisons)
    if rest:
        parts.append(
            f"no significant difference in {'any of the' if not parts else 'the other'} {rest} "
            "comparison(s), which does not mean equal"
        )
    return "; ".join(parts)


def _deployment(section: Section, choice: Choice) -> str:
    cell, best, metric = choice.cell, choice.best, section.metric
    lead = "To deploy" if choice.over_seeds else "To deploy, with one trial each to go by"
    text = f"{lead}: {named(cell)}, {size_of(cell)}"
    measure = "mean" if choice.over_seeds else "score"
    against = choice.against_best
    if against is None:
        text += f": it has the best {measure} of {choice.num_cells} cell(s)"
        if choice.num_worse:
            text += f", and the {choice.num_worse} smaller one(s) test worse than it"
    else:
        assert against.test
        low, high = against.test.interval
        text += (
            f": the smallest of {choice.num_cells} cells that does not test worse than the one "
            f"with the best {measure}, {named(best)} ({size_of(best)}): difference "
            f"{against.test.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
        )
        if against.speaks:
            loss = max(0.0, -low if metric.direction == "maximize" else high)
            text += f", so it may cost up to {loss:.4f} in {metric.name}"
        else:
            text += _in_other_measure(against, metric)
    left_out = sum(not is_random(c) for c in section.cells) - choice.num_cells
    if left_out:
        text += f"; {left_out} cell(s) are left out, with a quota or runs that are not complete"
    if choice.num_untested:
        text += f"; {choice.num_untested} smaller one(s) could not be tested against the best"
    if choice.over_seeds:
        text += f". Its {metric.name}: {spread_of(cell, 'validation')}"
        if len(values_by_seed(cell, "test")) > 1:
            text += f"; on test rows, {spread_of(cell, 'test')}"
        return f"{text}."
    return f"{text}. How far another seed would move this is not known: {SEEDS_REMEDY} first."


# ---- front and comparisons -----------------------------------------------------------------------


def _front_line(section: Section) -> str:
    front = sorted(
        (t for t in section.trials if t.number in section.front), key=lambda t: t.parameters
    )
    better = "higher" if section.metric.direction == "maximize" else "lower"
    return (
        f"Not dominated in {section.metric.name} ({better} is better) and adapter parameters, by "
        f"point estimates of single trials: {', '.join(_on_front(section, t) for t in front)}."
    )


def _on_front(section: Section, trial: Scored) -> str:
    text = f"{trial.config.label} ({trial.parameters:,}: {trial.value:.4f}"
    values = [run.value for run in section.runs if run.chosen == trial.number]
    if len(values) > 1:
        mean, sd = mean_and_sd(values)
        text += f"; mean of {len(values)} runs {mean:.4f}, sd {sd:.4f}"
    return f"{text})"


def _budget_lines(
    section: Section, budget: int, comparisons: Sequence[Comparison]
) -> Iterable[str]:
    heading = f"Budget {budget:,} parameters"
    if not comparisons:
        has = any(cell.budget == budget and cell.system == REFERENCE for cell in section.cells)
        lacking = "no other system was tried" if has else f"{REFERENCE} was not tried"
        yield f"{heading}: {lacking}; nothing is compared."
        return
    reference = comparisons[0].a
    if reference.effort != section.quota:
        yield (
            f"{heading}: nothing is compared, since of a quota of {section.quota} tries "
            f"{reference.system} has had {reference.effort}."
        )
        return
    for over_seeds in (True, False):
        for rows in ("test", "validation"):
            mine = [
                c
                for c in comparisons
                if c.test and (not c.one_seed) == over_seeds and c.rows == rows
            ]
            if mine:
                of = f"{rows} rows" if over_seeds else "exploratory, one trial each"
                told = described(reference, not over_seeds, mine[0].rows)
                yield f"{heading}, {of}: {told} against"
                yield from (_compared(section, c) for c in mine)
    refused = [c for c in comparisons if not c.test]
    if refused:
        yield f"{heading}, {REFERENCE} not compared with"
        for c in refused:
            why = f" (nor over seeds, since {c.one_seed})" if c.one_seed else ""
            yield f"- {c.b.system}: {c.refusal}{why}."


def _compared(section: Section, c: Comparison) -> str:
    assert c.test
    low, high = c.test.interval
    sizes = f"{c.test.n:,} items"
    if not c.one_seed:
        sizes = f"{c.test.num_seeds} seeds x {sizes}"
    lacking = c.one_seed if section.runs else ""  # else it is the same for all, and said above
    why = f" Not over seeds, since {lacking}." if lacking else ""
    return (
        f"- {described(c.b, bool(c.one_seed), c.rows)}: difference "
        f"{c.test.difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, {sizes}), "
        f"{c.test.method} p {p_told(c.test.p_value)}, adjusted p {p_told(c.adjusted_p)}: "
        f"{_finding(c, section.metric)}.{why}"
    )


def _finding(c: Comparison, metric: Objective) -> str:
    assert c.test
    subject = f"this {REFERENCE} model" if c.one_seed else REFERENCE
    measure = "" if c.speaks else _in_other_measure(c, metric)
    if not c.is_significant:
        return f"no significant difference{measure}"
    if not c.speaks:
        side = "higher" if c.test.difference > 0 else "lower"
        return f"{subject} is significantly {side}{measure}"
    return f"{subject} is significantly {'better' if c.favours_a(metric) else 'worse'}"


def _in_other_measure(c: Comparison, metric: Objective) -> str:
    trial = c.a.chosen if c.one_seed else c.a.runs[0]
    measure = (trial.outcome if trial else "") or "its outcomes"
    return f" in {measure} ({metric.name} has no value per item)"


def _control_lines(section: Section) -> Iterable[str]:
    trials: list[Scored | Unscored] = [*section.trials, *section.unscored]
    for topology, name in CONTROLS.items():
        tried = {
            t.config.plan.target_parameters
            for t in trials
            if t.origin == "quota" and t.config.plan.topology == topology
        }
        lacking = [f"{budget:,}" for budget in cell_budgets(section) if budget not in tried]
        if lacking:
            yield (
                f"Control lacking: {name} (`{topology}`) at {', '.join(lacking)}. Without it a "
                f"difference may come from sharing as such, not from where {REFERENCE} cuts."
            )


# ---- caveats ------------------------------------------------------------------------------------


def _caveats(
    sections: Sequence[Section], comparisons: Sequence[Comparison], interim: bool
) -> Iterable[str]:
    tested = [c for c in comparisons if c.test]
    over_seeds = [c for c in tested if not c.one_seed]
    single = len(tested) - len(over_seeds)
    if tested:
        kinds = [f"{len(over_seeds)} over seeds"] * bool(over_seeds)
        kinds += [f"{single} of single trials"] * bool(single)
        yield (
            f"A difference is {REFERENCE} minus the other system, on the same items. P-values are "
            f"adjusted by Holm's method ({' and, apart, '.join(kinds)}), significance level "
            f"{SIGNIFICANCE}. Each interval is for its comparison alone, so it may leave out 0 "
            "where the adjusted p-value finds nothing. No significant difference does not mean "
            "equal: the interval says what remains possible."
        )
    if over_seeds:
        yield (
            "Over seeds, both systems are trained with the same seeds and scored on the same "
            "items; the interval covers other seeds and other items of the same kind. That of a "
            "mean over seeds covers other seeds only."
        )
    if single:
        yield (
            "A test of single trials covers the sampling of items, not the variance between "
            "training runs: it speaks of two trained models, and another seed may reverse it."
        )
    if any(section.cells for section in sections):
        yield (
            "Only systems whose whole quota was tried, over one grid, are compared; each stands "
            "by the best of it."
        )
    if any(c.rows == "validation" for c in over_seeds):
        yield (
            "Configurations were chosen by their scores on the validation rows that they are "
            "compared on. The runs over seeds are trained anew, but the means may be a little "
            "flattering: of all systems alike, their effort being equal."
        )
    if any(c.rows == "test" for c in over_seeds):
        yield "Comparisons on test rows are free of the choice: it was made on validation rows."
    if single:
        yield "The score of a best try is flattering: it was chosen on the rows it is tested on."
    if any(section.cells for section in sections):
        yield (
            "What to deploy follows a rule of thumb: tests against the best are not adjusted, "
            "since that would let worse systems pass; the best mean itself is likely a little "
            "high, being the highest of several."
        )
    yield (
        "The front compares by size, without regard to uncertainty. It has every full trial; those "
        "without a budget stand on it alone."
    )
    if interim:
        yield (
            "This is an interim result: tests repeated while a study runs find too much, since "
            "the adjustment does not count the looks."
        )
