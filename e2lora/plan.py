"""From targets, options and (for E²) a gradient profile to a sharing plan: a pure function.

A plan says which layers of a module type form a group and at what rank. It is JSON, carries what
it was made from, and is checked against a model both ways before it is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from e2lora.config import Frozen, PlanConfig
from e2lora.moments import GradientProfile, Provenance, Target, require_usable
from e2lora.partition import TOPOLOGIES, Stack, explicit_groups, names_type
from e2lora.sharing import Shared, share
from e2lora.stability import Stability, compare_folds


class Group(Frozen):
    """Layers of one module type that share one adapter of rank ``r``."""

    module_type: str
    layers: tuple[int, ...] = Field(min_length=1)
    r: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)

    @property
    def span(self) -> str:
        """Its layers in words.

        >>> Group(module_type="q", layers=(0, 1, 2), r=1, lora_alpha=1.0).span
        '0-2'
        >>> Group(module_type="q", layers=(0, 2), r=1, lora_alpha=1.0).span
        '0,2'
        """
        first, last = self.layers[0], self.layers[-1]
        if len(self.layers) > 1 and self.layers == tuple(range(first, last + 1)):
            return f"{first}-{last}"
        return ",".join(map(str, self.layers))


class Budget(Frozen):
    """What one module type could spend, and did, in the units of the plan's budget option.

    ``shortfall`` is less than the next grant would have cost, unless every rank is at its limit.
    """

    module_type: str
    available: int
    spent: int
    shortfall: int


class SharingPlan(Frozen):
    """The cheap artefact: ``plan.json``."""

    version: Literal[2] = 2
    options: PlanConfig
    profile_fingerprint: str | None = Field(description="None where no profile was needed")
    measured_on: Provenance | None = Field(default=None, description="the profile's provenance")
    targets: tuple[Target, ...]
    groups: tuple[Group, ...]
    budgets: tuple[Budget, ...] = Field(default=(), description="where ranks were allocated")
    parameters: int = Field(description="of LoRA by this plan: per group r (in + out)")
    lora_parameters: int = Field(description="of plain LoRA at the base rank, for comparison")
    stability: Stability | None = Field(
        default=None, description="over the profile's folds; None where there are none to compare"
    )
    notes: tuple[str, ...] = Field(default=(), description="what a reader should know of it")

    @model_validator(mode="after")
    def _numbers_agree(self) -> SharingPlan:
        """Of a file that was edited: what stands twice must stand there alike."""
        limits = {t.module_type: min(t.in_features, t.out_features) for t in self.targets}
        for g in self.groups:
            if g.r > limits.get(g.module_type, g.r):
                raise ValueError(
                    f"a rank must not exceed min(in, out), {limits[g.module_type]} for "
                    f"{g.module_type}; got r={g.r}. Build the plan again."
                )
            if not math.isclose(g.lora_alpha, _alpha(self.options, g.r)):
                raise ValueError(
                    f"α must keep the scale of the base rank, {_alpha(self.options, g.r):g} at "
                    f"r={g.r}; got {g.lora_alpha:g} for {g.module_type}. Build the plan again."
                )
        counts = {
            "parameters": _count(self.targets, self.groups),
            "lora_parameters": _count_at(self.targets, self.options.r),
        }
        for name, count in counts.items():
            if getattr(self, name) != count:
                raise ValueError(
                    f"a plan's `{name}` must be those of its targets and groups, {count:,}; got "
                    f"{getattr(self, name):,}. Build the plan again."
                )
        return self

    def groups_of(self, module_type: str) -> list[Group]:
        return [group for group in self.groups if group.module_type == module_type]

    def group_of_target(self) -> dict[str, Group]:
        """Target path → its group."""
        owner = {
            (group.module_type, layer): group for group in self.groups for layer in group.layers
        }
        return {t.path: owner[t.module_type, t.layer] for t in self.targets}

    @property
    def module_types(self) -> list[str]:
        """In the order of the model."""
        return list(dict.fromkeys(target.module_type for target in self.targets))


def build_plan(
    targets: Sequence[Target], options: PlanConfig, profile: GradientProfile | None = None
) -> SharingPlan:
    """Partition each module type into groups and give each its rank.

    Args:
        targets: every weight to adapt, e.g. from :func:`e2lora.targets.find_targets`.
        profile: needed where ``options.needs_profile``, ignored otherwise.

    Raises:
        ValueError: what :func:`require_possible` refuses; a profile that is missing, belongs to
            other targets, holds a dead gradient, or doesn't suit similarity or allocation.
    """
    require_possible(targets, options)
    if not options.needs_profile:
        profile = None
    elif profile is None:
        raise ValueError(
            f"topology {options.topology!r} with allocation {options.rank_allocation!r} decides by "
            "gradients and needs a gradient profile; none was given. Measure one with "
            "`jobs/plan.py` or `e2lora.profile.measure_profile`."
        )
    else:
        profile.require_covers(targets)
        require_usable(zip(targets, profile.moments_of(targets), strict=True))
    types = _by_type(targets)
    shared = {
        name: share(_stack(members, profile), options, _max_rank(members))
        for name, members in types.items()
    }
    groups = [
        Group(
            module_type=name,
            layers=tuple(of_type.stack.layers[k] for k in positions),
            r=r,
            lora_alpha=_alpha(options, r),
        )
        for name, of_type in shared.items()
        for positions, r in zip(of_type.partition, of_type.ranks, strict=True)
    ]
    notes = [f"{name}: {of_type.note}" for name, of_type in shared.items() if of_type.note]
    if options.idle_options:
        notes.append(f"{' and '.join(options.idle_options)}: without effect on this plan")
    stability = None
    if profile and len(profile.folds) > 1:
        try:
            stability = _stability(shared, types, options, profile)
        except ValueError as error:
            notes.append(f"stability is not known, since a fold alone gives no plan: {error}")
    return SharingPlan(
        options=options,
        profile_fingerprint=profile.fingerprint() if profile else None,
        measured_on=profile.provenance if profile else None,
        targets=tuple(targets),
        groups=tuple(groups),
        budgets=tuple(
            Budget(
                module_type=name,
                available=spending.available,
                spent=spending.spent,
                shortfall=spending.available - spending.spent,
            )
            for name, of_type in shared.items()
            if (spending := of_type.spending)
        ),
        parameters=_count(targets, groups),
        lora_parameters=_count_at(targets, options.r),
        stability=stability,
        notes=tuple(notes),
    )


def require_possible(targets: Sequence[Target], options: PlanConfig) -> None:
    """Check all of a plan's options that can be checked without gradients.

    Raises:
        ValueError: a rank above a weight's size; a block, stride or number of intervals above the
            layers there are; explicit groups that don't hold every layer once.
    """
    types = _by_type(targets)
    idle = [
        group.module
        for group in options.groups or ()
        if not any(names_type(group.module, module_type) for module_type in types)
    ]
    if idle:
        raise ValueError(
            f"each of explicit `groups` must name a module type that is adapted; {idle} name none "
            f"of {list(types)}. Correct them, or `target_modules`."
        )
    for module_type, members in types.items():
        max_rank, first = _max_rank(members), members[0]
        stack = Stack(module_type, tuple(t.layer for t in members))
        asked = [options.r, *(g.r for g in explicit_groups(stack, options) if g.r is not None)]
        if max(asked) > max_rank:
            raise ValueError(
                f"the rank must not exceed min(in, out) of a weight; got r={max(asked)} for "
                f"{module_type} ({first.out_features} x {first.in_features}). "
                f"Use r <= {max_rank}, or take it out of `target_modules`."
            )
        if not options.needs_similarity:
            TOPOLOGIES[options.topology](stack, options)


def _count(targets: Sequence[Target], groups: Sequence[Group]) -> int:
    """LoRA parameters of groups: r (in + out) each."""
    sizes = {t.module_type: t.in_features + t.out_features for t in targets}
    return sum(group.r * sizes.get(group.module_type, 0) for group in groups)


def _count_at(targets: Sequence[Target], r: int) -> int:
    """LoRA parameters with an adapter of rank r for each target."""
    return sum(r * (t.in_features + t.out_features) for t in targets)


def _alpha(options: PlanConfig, r: int) -> float:
    """What keeps the adapter's scale that of the base rank."""
    return options.at_rank(r).lora_alpha


def _stability(
    whole: Mapping[str, Shared],
    types: Mapping[str, Sequence[Target]],
    options: PlanConfig,
    profile: GradientProfile,
) -> Stability:
    """The plan of all rows against those of each fold.

    Raises:
        ValueError: a fold has a dead gradient, or one that similarity or allocation refuse.
    """
    parts = []
    for number in range(len(profile.folds)):
        for targets in types.values():
            require_usable(zip(targets, profile.moments_of(targets, number), strict=True))
        parts.append(
            {
                name: share(_stack(t, profile, number), options, _max_rank(t)).per_layer()
                for name, t in types.items()
            }
        )
    return compare_folds(
        {name: of_type.per_layer() for name, of_type in whole.items()},
        parts,
        samples_per_fold=min(fold.num_samples for fold in profile.folds),
        r=options.r,
        cuts_vary=options.needs_similarity,
    )


def _stack(
    members: Sequence[Target], profile: GradientProfile | None, fold: int | None = None
) -> Stack:
    layers = tuple(target.layer for target in members)
    gradients = profile.gradients_of(members, fold) if profile else None
    return Stack(members[0].module_type, layers, gradients)


def _by_type(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Targets of each module type, in order of depth."""
    types: dict[str, list[Target]] = {target.module_type: [] for target in targets}
    for target in sorted(targets, key=lambda t: t.layer):
        types[target.module_type].append(target)
    return types


def _max_rank(members: Sequence[Target]) -> int:
    return min(members[0].in_features, members[0].out_features)


def require_plan_fits(plan: SharingPlan, targets: Sequence[Target]) -> None:
    """Check a plan against a model's targets both ways, shapes included.

    Raises:
        ValueError: naming what only one of the two has.
    """
    planned, present = set(plan.targets), set(targets)
    if planned != present:
        only_plan = sorted(t.path for t in planned - present)
        only_model = sorted(t.path for t in present - planned)
        raise ValueError(
            "a plan must name exactly the model's targets, with their shapes; "
            f"only in the plan: {only_plan[:5] or 'none'}; only in the model: "
            f"{only_model[:5] or 'none'} ({len(only_plan)} and {len(only_model)} in all). "
            "Build the plan for this model and these `target_modules`."
        )
    wanted = Counter((t.module_type, t.layer) for t in plan.targets)
    grouped = Counter((g.module_type, layer) for g in plan.groups for layer in g.layers)
    if wanted != grouped:
        wrong = sorted({*(wanted - grouped), *(grouped - wanted)})
        raise ValueError(
            "the groups of a plan must cover each of its layers exactly once; these are missing, "
            f"extra or covered twice: {wrong[:5]}. Rebuild the plan."
        )
