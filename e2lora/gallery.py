"""Which pictures a report shows of a section, and from what they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2lora.config import PlanConfig
from e2lora.curves import (
    Curve,
    Size,
    draw_importances,
    draw_learning_rates,
    draw_sizes,
    draw_standings,
)
from e2lora.figures import draw_ranks, draw_similarity
from e2lora.front import Point, draw_front, styles_of
from e2lora.importance import Importances, importances
from e2lora.moments import GradientProfile
from e2lora.plan import SharingPlan, build_plan
from e2lora.records import StudyFolder
from e2lora.scored import REFERENCE, Scored, Section
from e2lora.sensitivity import Sweep, sweeps
from e2lora.standings import representatives, runs_of, spread_of
from e2lora.statistics import pareto_front
from e2lora.tables import Picture

NAMES = ("pareto", "systems", "size", "learning-rate", "importance", "plans", "similarity")
MOST_PLANS = 3  # beside one another


def draw_all(
    folder: StudyFolder, section: Section, params: Mapping[int, Mapping[str, Any]], suffix: str
) -> dict[str, Picture | str]:
    """Name → the picture, if it can be drawn now; or why one that a reader may expect can't.

    Args:
        params: suggestions of each trial, by number.
        suffix: of the files' names.
    """
    shown: dict[str, Picture | str] = {}

    def place(name: str, caption: str) -> Path:
        assert name in NAMES
        file = folder.report / f"{name}{suffix}.png"
        shown[name] = Picture(file, caption)
        return file

    metric, title = section.metric.name, section.title
    if section.trials:
        others = sorted({t.system for t in section.trials} - {REFERENCE}, key=str.casefold)
        styles = styles_of([REFERENCE, *others])
        points, bars = points_of(section)
        file = place("pareto", f"Pareto front: {metric} against adapter size; bars: {bars}.")
        draw_front(file, points, styles, metric, title, section.baseline, bars)
        every = {name: lines_of(section, name) for name in (REFERENCE, *others)}
        lines = {name: line for name, line in every.items() if len(line) > 1}
        if not lines and len(others) > 1:
            file = place("systems", f"{metric} of each system, the best first; bars: {bars}.")
            standings = standings_of(section, every)
            draw_standings(file, standings, styles, metric, title, section.baseline)
        if lines:
            file = place(
                "size", f"{metric} over adapter size, each system by its best; bars: {bars}."
            )
            draw_sizes(file, lines, styles, metric, title)
        if found := sweeps(section):
            file = place("learning-rate", f"{metric} at each learning rate, one seed.")
            draw_learning_rates(file, curves_of(section, found), metric, title)
        decided = importances_of(section, params)
        if decided.refusal:
            shown["importance"] = f"Importance of the suggestions is not shown: {decided.refusal}."
        else:
            draw_importances(
                place("importance", f"How much of {metric} each suggestion decides."),
                decided,
                metric,
                title,
            )
    plans = winning_plans(folder, section)
    if plans:
        file = place("plans", "Who shares, and at what rank: the best of E²LoRA at its budgets.")
        draw_ranks(file, plans, title)
    first = next(iter(plans.values()), None)
    profile = _profile_of(folder, section, first.profile_fingerprint if first else None)
    if profile:
        file = place("similarity", "How alike the layers' gradients are; boxes: who shares.")
        draw_similarity(file, profile, {"": first or _plan_of(profile)}, title)
    return shown


def points_of(section: Section) -> tuple[list[Point], str]:
    """For the picture of the front, and what its bars are.

    Where configurations were run over seeds, their means are what counts, and the single runs of
    the search stand small behind them: a mean beside the best of many tries would look worse than
    it is.
    """
    chosen = [t for t in section.trials if runs_of(section, t)]
    over_seeds = len(chosen) > 1
    big = chosen if over_seeds else representatives(section)
    numbers = {t.number for t in big}
    values = [_shown(section, t, over_seeds) for t in big]
    kept = pareto_front(
        [(size.value, size.parameters) for size in values], (section.metric.direction, "minimize")
    )
    front = {big[place].number for place in kept}
    points = [
        Point(
            t.number,
            t.system,
            t.r,
            t.parameters,
            size.value,
            size.interval,
            True,
            t.number in front,
        )
        for t, size in zip(big, values, strict=True)
    ]
    points += [
        Point(t.number, t.system, t.r, t.parameters, t.value, None, False, False)
        for t in section.trials
        if over_seeds or t.number not in numbers
    ]
    return points, "95 % intervals over " + ("seeds" if over_seeds else "validation items")


def _shown(section: Section, t: Scored, over_seeds: bool) -> Size:
    spread = spread_of(section, t) if over_seeds else None
    if spread is None:
        return Size(t.parameters, t.value, t.interval)
    return Size(t.parameters, spread.mean, spread.interval)


def lines_of(section: Section, system: str) -> list[Size]:
    """A system's sizes from small to large, as the front shows them."""
    over_seeds = sum(bool(runs_of(section, t)) for t in section.trials) > 1
    mine = [t for t in representatives(section) if t.system == system]
    if over_seeds:
        mine = [t for t in mine if runs_of(section, t)]
    return sorted((_shown(section, t, over_seeds) for t in mine), key=lambda size: size.parameters)


def standings_of(section: Section, lines: Mapping[str, Sequence[Size]]) -> dict[str, Size]:
    """The one size of each system that has one, the best value first."""
    falling = section.metric.direction == "maximize"
    only = [(name, line[0]) for name, line in lines.items() if line]
    return dict(sorted(only, key=lambda entry: entry[1].value, reverse=falling))


def curves_of(section: Section, found: Sequence[Sweep]) -> dict[str, list[Curve]]:
    """A system's sweeps, and beside each the sampler's trials of the same system and size."""
    panels: dict[str, list[Curve]] = {}
    for sweep in found:
        on_grid = {t.number for t in sweep.complete.values()}
        points = [(rate, t.value) for rate, t in sweep.complete.items()]
        one = next(iter(sweep.complete.values()))
        others = [
            (t.config.training.learning_rate, t.value)
            for t in section.trials
            if (t.system, t.budget) == (one.system, one.budget) and t.number not in on_grid
            if t.budget is not None or t.r == one.r
        ]
        panels.setdefault(sweep.system, []).append(Curve(sweep.size, points, others))
    return panels


def importances_of(section: Section, params: Mapping[int, Mapping[str, Any]]) -> Importances:
    """Over the complete trials whose suggestions were recorded."""
    told = [t for t in section.trials if params.get(t.number)]
    return importances([params[t.number] for t in told], [t.value for t in told])


def winning_plans(folder: StudyFolder, section: Section) -> dict[str, SharingPlan]:
    """Of E²LoRA at each budget, by label; without budgets: of the best trial that has its topology.

    At more than ``MOST_PLANS`` budgets the smallest, the largest and some between.
    """
    winners = {f"{c.budget:,}": c.chosen for c in section.cells if c.system == REFERENCE}
    if not any(winners.values()):
        best = section.best(lambda t: t.config.plan.topology == "e2")
        winners = {best.config.label: best} if best else {}
    found = {
        f"{label} (trial {winner.number})": trial.plan()
        for label, winner in winners.items()
        if winner and (trial := folder.trial(winner.number)).plan_file.exists()
    }
    if len(found) <= MOST_PLANS:
        return found
    labels = list(found)
    places = [round(k * (len(labels) - 1) / (MOST_PLANS - 1)) for k in range(MOST_PLANS)]
    return {labels[place]: found[labels[place]] for place in places}


def _profile_of(
    folder: StudyFolder, section: Section, fingerprint: str | None
) -> GradientProfile | None:
    """The profile that the shown plan was made from; before there is one, one of this model."""
    for file in sorted(folder.profiles.glob("*.json")):
        profile = GradientProfile.model_validate_json(file.read_text(encoding="utf-8"))
        provenance = (profile.provenance.model, profile.provenance.task)
        if fingerprint in (None, profile.fingerprint()) and (
            fingerprint or provenance == (section.model, section.task)
        ):
            return profile
    return None


def _plan_of(profile: GradientProfile) -> SharingPlan:
    """Where E² would cut, whatever the rank."""
    targets = [entry.target for entry in profile.layers]
    return build_plan(targets, PlanConfig(topology="e2", r=1), profile)
