"""From targets, options and (for E²) a gradient profile to a sharing plan: a pure function.

A plan says which layers of a module type form a group and at what rank. It is JSON, carries what
it was made from, and is checked against a model both ways before it is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from pydantic import Field, model_validator

from e2lora.config import AdapterConfig, Frozen, PlanConfig
from e2lora.moments import (
    GradientProfile,
    LayerGradient,
    Provenance,
    Target,
    TypeGradients,
    require_usable,
)
from e2lora.partition import TOPOLOGIES, Partition, Stack, explicit_groups, names_type
from e2lora.ranks import ALLOCATIONS, BUDGETS, NEGLIGIBLE_SPREAD, allocate_ranks
from e2lora.stability import Stability, TypeSharing, compare_folds

PLAN_VERSION: Final = 2


class Group(Frozen):
    """Layers of one module type that share one adapter of rank ``r``."""

    module_type: str
    layers: tuple[int, ...] = Field(min_length=1)
    r: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)


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
        known = {entry.target: entry for entry in profile.layers}
        require_usable(known[target] for target in targets)
    groups: list[Group] = []
    budgets: list[Budget] = []
    notes: list[str] = []
    for module_type, members in _by_type(targets).items():
        gradients = profile.gradients_of(members) if profile else None
        stack = Stack(module_type, tuple(t.layer for t in members), gradients)
        shared = _share(stack, options, _max_rank(members))
        budgets += [shared.budget] if shared.budget else []
        notes += [f"{module_type}: {shared.note}"] if shared.note else []
        groups += [
            Group(
                module_type=module_type,
                layers=tuple(stack.layers[k] for k in positions),
                r=r,
                lora_alpha=_alpha(options, r),
            )
            for positions, r in zip(shared.partition, shared.ranks, strict=True)
        ]
    stability = None
    if profile and len(profile.folds) > 1:
        try:
            stability = _stability(targets, options, profile)
        except ValueError as error:
            notes.append(f"stability is not known, since a fold alone gives no plan: {error}")
    return SharingPlan(
        options=options,
        profile_fingerprint=profile.fingerprint() if profile else None,
        measured_on=profile.provenance if profile else None,
        targets=tuple(targets),
        groups=tuple(groups),
        budgets=tuple(budgets),
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


class _Shared(NamedTuple):
    """One module type: positions that share, their ranks, what was spent, and what to note."""

    partition: Partition
    ranks: list[int]
    budget: Budget | None = None
    note: str = ""


def _share(stack: Stack, options: PlanConfig, max_rank: int) -> _Shared:
    partition = TOPOLOGIES[options.topology](stack, options)
    if options.rank_allocation == "uniform":
        own = [group.r for group in explicit_groups(stack, options)] or [None] * len(partition)
        return _Shared(partition, [r or options.r for r in own])
    assert stack.gradients is not None  # build_plan asks for a profile first
    entropies = stack.gradients.entropies
    highest = [max(entropies[k] for k in positions) for positions in partition]
    weights = ALLOCATIONS[options.rank_allocation](highest, min(entropies), options.beta)
    available, costs = BUDGETS[options.budget]([len(part) for part in partition], options.r)
    ranks = allocate_ranks(weights, costs, available, max_rank)
    spent = sum(cost * r for cost, r in zip(costs, ranks, strict=True))
    note = ""
    spread = max(highest) - min(highest)
    if options.rank_allocation == "softmax" and 0 < spread < NEGLIGIBLE_SPREAD:
        note = (
            f"the entropies of its intervals lie within {spread:.1g} nats, yet allocation "
            "'softmax' spreads their weights by e²; 'entropy_power' would not."
        )
    budget = Budget(
        module_type=stack.module_type,
        available=available,
        spent=spent,
        shortfall=available - spent,
    )
    return _Shared(partition, ranks, budget, note)


def _count(targets: Sequence[Target], groups: Sequence[Group]) -> int:
    """LoRA parameters of groups: r (in + out) each."""
    sizes = {t.module_type: t.in_features + t.out_features for t in targets}
    return sum(group.r * sizes.get(group.module_type, 0) for group in groups)


def _count_at(targets: Sequence[Target], r: int) -> int:
    """LoRA parameters with an adapter of rank r for each target."""
    return sum(r * (t.in_features + t.out_features) for t in targets)


def _alpha(options: PlanConfig, r: int) -> float:
    """What keeps the adapter's scale that of the base rank: α/r, or α/√r under rsLoRA."""
    ratio = r / options.r
    return options.lora_alpha * (math.sqrt(ratio) if options.use_rslora else ratio)


def _stability(
    targets: Sequence[Target], options: PlanConfig, profile: GradientProfile
) -> Stability:
    adapted, folds = set(targets), range(len(profile.folds))
    for fold in profile.folds:
        require_usable(
            LayerGradient(target=entry.target, moments=moments)
            for entry, moments in zip(profile.layers, fold.moments, strict=True)
            if entry.target in adapted
        )
    whole, *parts = (
        {
            name: _sharing(members, options, profile.gradients_of(members, fold))
            for name, members in _by_type(targets).items()
        }
        for fold in (None, *folds)
    )
    return compare_folds(
        whole,
        parts,
        samples_per_fold=min(fold.num_samples for fold in profile.folds),
        r=options.r,
        cuts_vary=options.needs_similarity,
    )


def _sharing(
    members: Sequence[Target], options: PlanConfig, gradients: TypeGradients
) -> TypeSharing:
    layers = tuple(target.layer for target in members)
    stack = Stack(members[0].module_type, layers, gradients)
    partition, ranks, *_ = _share(stack, options, _max_rank(members))
    group_of = {k: number for number, positions in enumerate(partition) for k in positions}
    order = range(len(layers))
    return TypeSharing(
        layers,
        tuple(group_of[k] for k in order),
        tuple(ranks[group_of[k]] for k in order),
    )


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


def count_adapter_parameters(plan: SharingPlan, adapter: AdapterConfig) -> int:
    """Trainable adapter parameters, each shared tensor once; a head is not counted.

    Per group r(in + out); with A at type scope, A counts once per module type.
    """
    shapes = {t.module_type: (t.in_features, t.out_features) for t in plan.targets}
    total = 0
    for module_type in plan.module_types:
        in_features, out_features = shapes[module_type]
        ranks = [group.r for group in plan.groups_of(module_type)]
        total += out_features * sum(ranks)
        total += in_features * (max(ranks) if adapter.a_scope == "type" else sum(ranks))
    return total
