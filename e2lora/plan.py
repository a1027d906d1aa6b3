"""From targets, options and (for E²) a gradient profile to a sharing plan: a pure function.

A plan says which layers of a module type form a group and at what rank. It is JSON, carries what
it was made from, and is checked against a model both ways before it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

from pydantic import Field

from e2lora.config import AdapterConfig, Frozen, PlanConfig
from e2lora.moments import GradientProfile, Moments, Provenance, Target, require_usable
from e2lora.partition import NEEDS_PROFILE, TOPOLOGIES
from e2lora.ranks import ALLOCATIONS, BUDGETS, allocate_ranks

PLAN_VERSION: Final = 1


class Group(Frozen):
    """Layers of one module type that share one adapter of rank ``r``."""

    module_type: str
    layers: tuple[int, ...] = Field(min_length=1)
    r: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)


class Budget(Frozen):
    """What one module type could spend and did: in units of the plan's budget option."""

    module_type: str
    available: int
    spent: int


class SharingPlan(Frozen):
    """The cheap artefact: ``plan.json``."""

    version: Literal[1] = 1
    options: PlanConfig
    profile_fingerprint: str | None = Field(description="None where no profile was needed")
    measured_on: Provenance | None = Field(default=None, description="the profile's provenance")
    targets: tuple[Target, ...]
    groups: tuple[Group, ...]
    budgets: tuple[Budget, ...] = ()

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
        targets: every weight to adapt, e.g. from :func:`e2lora.models.find_targets`.
        profile: needed by the topologies in ``NEEDS_PROFILE``, ignored by the others.

    Raises:
        ValueError: a rank above a weight's size, a block longer than its stack, or a profile
            that is missing, belongs to other targets or holds a dead gradient.
    """
    types: dict[str, list[Target]] = {}
    for target in targets:
        types.setdefault(target.module_type, []).append(target)

    needs_profile = options.topology in NEEDS_PROFILE
    moments = _moments_by_path(targets, profile, options.topology) if needs_profile else {}
    groups: list[Group] = []
    budgets: list[Budget] = []
    for module_type, members in types.items():
        members = sorted(members, key=lambda t: t.layer)
        max_rank = min(members[0].in_features, members[0].out_features)
        if options.r > max_rank:
            raise ValueError(
                f"the rank must not exceed min(in, out) of a weight; got r={options.r} for "
                f"{module_type} ({members[0].out_features} x {members[0].in_features}). "
                f"Use r <= {max_rank}, or take it out of `target_modules`."
            )
        layer_moments = [moments[t.path] for t in members] if needs_profile else None
        partition = TOPOLOGIES[options.topology](len(members), options, layer_moments)
        ranks = [options.r] * len(partition)
        if layer_moments is not None:
            available, costs = BUDGETS[options.budget]([len(i) for i in partition], options.r)
            entropies = [max(layer_moments[k].entropy for k in interval) for interval in partition]
            weights = ALLOCATIONS[options.allocation](entropies, options.beta)
            ranks = allocate_ranks(weights, costs, available, max_rank)
            spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
            budgets.append(Budget(module_type=module_type, available=available, spent=spent))
        for interval, r in zip(partition, ranks, strict=True):
            groups.append(
                Group(
                    module_type=module_type,
                    layers=tuple(members[k].layer for k in interval),
                    r=r,
                    lora_alpha=options.lora_alpha * r / options.r,
                )
            )
    return SharingPlan(
        options=options,
        profile_fingerprint=profile.fingerprint() if profile and needs_profile else None,
        measured_on=profile.provenance if profile and needs_profile else None,
        targets=tuple(targets),
        groups=tuple(groups),
        budgets=tuple(budgets),
    )


def _moments_by_path(
    targets: Sequence[Target], profile: GradientProfile | None, topology: str
) -> dict[str, Moments]:
    if profile is None:
        raise ValueError(
            f"topology {topology!r} partitions by gradients and needs a gradient profile; "
            "none was given. Measure one with `e2lora.profile.measure_profile`."
        )
    known = {entry.target: entry for entry in profile.layers}
    missing = [target.path for target in targets if target not in known]
    if missing:
        raise ValueError(
            "the profile must cover every target with the same shape; it lacks "
            f"{len(missing)}: {', '.join(missing[:5])}. Measure the profile again for this model "
            "and these `target_modules`."
        )
    require_usable(known[target] for target in targets)
    return {target.path: known[target].moments for target in targets}


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
