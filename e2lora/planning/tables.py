"""Profiles and plans as tables for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from e2lora.adapters import counts_by_system
from e2lora.figures import short_names
from e2lora.moments import GradientProfile
from e2lora.plan import SharingPlan
from e2lora.text_table import text_table


def describe_profile(title: str, profile: GradientProfile) -> str:
    """What was measured, and the range of entropies per module type."""
    p = profile.provenance
    lines = [
        f"{title}: mean loss {p.mean_loss:.4f} ({p.num_samples} rows, {p.num_supervised:,} "
        f"supervised samples or tokens, seed {p.seed})",
        f"measured in {p.dtype} by {p.method}, {p.num_passes} pass(es), {p.num_workers} worker(s); "
        f"{len(profile.folds) or 1} fold(s)",
    ]
    rows, types = [], profile.by_module_type()
    names = short_names(list(types))
    for module_type, entries in types.items():
        entropies = [e.moments.entropy for e in entries if e.moments.std > 0]
        dead = sum(e.moments.std == 0 for e in entries)
        low, high = (f"{f(entropies):.2f}" if entropies else "-" for f in (min, max))
        first = entries[0].target
        shape = f"{first.out_features} x {first.in_features}"
        note = f"{dead} without gradient" if dead else ""
        rows.append([names[module_type], shape, str(len(entries)), low, high, note])
    head = ["module type", "out x in", "layers", "lowest entropy", "highest", ""]
    return "\n".join([*lines, text_table(head, rows, right=(2, 3, 4))])


def describe_plan(title: str, plan: SharingPlan) -> str:
    """Intervals, ranks and parameters per module type, against LoRA at the base rank."""
    rows, names = [], short_names(plan.module_types)
    shapes = {t.module_type: t.in_features + t.out_features for t in plan.targets}
    shortfalls = {b.module_type: b.shortfall for b in plan.budgets}
    for module_type in plan.module_types:
        groups, size = plan.groups_of(module_type), shapes[module_type]
        count = size * sum(group.r for group in groups)
        plain = size * plan.options.r * sum(len(group.layers) for group in groups)
        rows.append(
            [
                names[module_type],
                str(len(groups)),
                _wrapped([group.span for group in groups], 34),
                _wrapped([str(group.r) for group in groups], 24),
                f"{count:,}",
                f"{count / plain:.0%}",
                str(shortfalls.get(module_type, "")),
            ]
        )
    total = [
        "all",
        str(len(plan.groups)),
        "",
        "",
        f"{plan.parameters:,}",
        f"{plan.parameters / plan.lora_parameters:.0%}",
        "",
    ]
    head = ["module type", "groups", "layers", "ranks", "parameters", "of LoRA", "unspent"]
    lines = [f"{title}, r={plan.options.r}", text_table(head, [*rows, total], right=(1, 4, 5, 6))]
    told = [f"stability: {plan.stability.verdict}"] if plan.stability else []
    systems = [f"{name} {count:,}" for name, count in counts_by_system(plan).items()]
    told.append(f"trainable parameters with this plan: {', '.join(systems)}")
    told += [f"note: {note}" for note in plan.notes]
    return "\n".join(
        [
            *lines,
            *(textwrap.fill(x, 110, subsequent_indent="  ", break_on_hyphens=False) for x in told),
        ]
    )


def compare_plans(plans: Mapping[str, SharingPlan]) -> str:
    """One line per plan."""
    rows = []
    for label, plan in plans.items():
        found = plan.stability
        cuts = found if plan.options.needs_similarity else None
        rows.append(
            [
                label,
                str(len(plan.groups)),
                _range([group.r for group in plan.groups]),
                f"{plan.parameters:,}",
                f"{plan.parameters / plan.lora_parameters:.0%}",
                f"{cuts.jaccard:.2f} ({cuts.chance:.2f})" if cuts else "",
                f"{found.rank_difference:.1f}" if found else "",
            ]
        )
    head = ["plan", "groups", "ranks", "parameters", "of LoRA", "Jaccard (chance)", "mean |Δr|"]
    return text_table(head, rows, right=(1, 2, 3, 4, 5, 6))


def _wrapped(parts: Sequence[str], width: int) -> str:
    return "\n".join(textwrap.wrap(" ".join(parts), width, break_on_hyphens=False))


def _range(ranks: Sequence[int]) -> str:
    """
    >>> _range([8, 8]), _range([4, 13, 8])
    ('8', '4–13')
    """
    return f"{min(ranks)}–{max(ranks)}" if min(ranks) < max(ranks) else f"{ranks[0]}"
