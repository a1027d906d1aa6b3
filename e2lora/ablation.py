"""E² as it is against E² with one thing changed: sharing, ranks, similarity, allocation."""

from __future__ import annotations

from e2lora.config import PlanConfig
from e2lora.scored import REFERENCE, Scored, Section
from e2lora.standings import NUMBERS, Spread, runs_of, spread_of
from e2lora.statistics import Interval, paired_test
from e2lora.tables import Table


def ablation_table(section: Section) -> Table | None:
    """E² as it is against E² with one thing changed; None where the study has no such thing.

    Only plain LoRA adapters count: another family is another system, no part of this one.
    """
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    variants = 0
    for size in sorted({_size(t) for t in section.trials if t.r is not None}):
        reference = _of_size(section, size, REFERENCE)
        if reference is None:
            continue
        names = dict.fromkeys(t.system for t in section.trials if _size(t) == size)
        found = [(_change(t), t) for t in (_of_size(section, size, name) for name in names) if t]
        changed = [(change, t) for change, t in found if change and t.system != REFERENCE]
        variants += sum(change != _NEITHER for change, _ in changed)
        strong.append(len(rows))
        for change, t in [("as it is", reference), *sorted(changed, key=lambda pair: pair[0])]:
            told = "" if t is reference else difference(section, t, reference)
            spread = spread_of(section, t)
            first = "" if rows and t is not reference else _size_told(size)
            score = spread.told() if spread else f"{t.value:.4f}"
            rows.append((first, change, t.system, f"{t.parameters:,}", score, told, t.origin))
    if not variants:
        return None
    notes = (
        f"Difference to {REFERENCE} at the same size, with its 95 % interval: over seeds "
        "(Student's t, paired by seed) where both have two runs or more, else over validation "
        "items of one seed. Not adjusted for their number: the verdict's are.",
        "Origin: only tries of the quota had equal effort.",
    )
    return Table(
        f"What each part of {REFERENCE} does",
        ("budget", "changed", "system", "parameters", section.metric.name, "difference", "origin"),
        tuple(rows),
        NUMBERS - {"difference"},
        notes,
        frozenset(strong),
    )


_NEITHER = "no sharing, equal ranks"


def _change(t: Scored) -> str:
    """What a variant has in place of E²'s own choice; "" for what is no variant of it.

    Of options that decide nothing in a plan (a similarity without cuts), nothing is said.
    """
    plan, adapter = t.config.plan, t.config.adapter
    plain = adapter.family == "lora" and adapter.a_scope == adapter.b_scope == "interval"
    if not plain or plan.topology not in ("e2", "none") or plan.use_rslora:
        return ""
    allocation, own = plan.rank_allocation, PlanConfig(topology="e2")
    if plan.topology == "none" and allocation == "uniform":
        return _NEITHER
    changes = ["no sharing"] if plan.topology == "none" else []
    if plan.topology == "e2" and plan.similarity != own.similarity:
        changes.append(f"similarity {plan.similarity}")
    if allocation == "uniform":
        changes.append("equal ranks")
    elif allocation != own.rank_allocation:
        changes.append(f"allocation {allocation}")
    elif plan.beta != own.beta:
        changes.append(f"beta {plan.beta:g}")
    if allocation != "uniform" and plan.budget != own.budget:
        changes.append(f"ranks by {plan.budget}")
    return ", ".join(changes)


def _size(t: Scored) -> tuple[int, int]:
    """What two systems must have in common: the budget, or without one the base rank."""
    return (t.budget, 0) if t.budget is not None else (0, t.r or 0)


def _size_told(size: tuple[int, int]) -> str:
    return f"{size[0]:,}" if size[0] else f"r={size[1]}"


def _of_size(section: Section, size: tuple[int, int], system: str) -> Scored | None:
    """The best of the system's quota, or else of its other trials."""

    def fits(t: Scored) -> bool:
        return t.system == system and _size(t) == size

    return section.best(lambda t: fits(t) and t.origin == "quota") or section.best(fits)


def difference(section: Section, t: Scored, reference: Scored) -> str:
    """Of ``t`` to the reference, with an interval where there is what it takes."""
    mine, theirs = (
        {run.config.seed: run.value for run in runs_of(section, trial)} for trial in (t, reference)
    )
    common = sorted(mine.keys() & theirs.keys())
    if len(common) > 1:
        found = Spread.of([mine[seed] - theirs[seed] for seed in common])
        assert found.interval is not None
        return _signed(found.mean, found.interval)
    a, b = t.outcomes, reference.outcomes
    if not a or not b or len(a) != len(b) or t.config.task != reference.config.task:
        return f"{t.value - reference.value:+.4f}"
    if t.averages_outcomes and reference.averages_outcomes:
        test = paired_test(a, b)
        return _signed(test.difference, test.interval)
    return f"{t.value - reference.value:+.4f}"


def _signed(value: float, interval: Interval) -> str:
    return f"{value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
