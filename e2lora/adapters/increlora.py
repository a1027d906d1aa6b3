"""IncreLoRA (Zhang et al., 2023): starts at rank 1 and grows ranks where they matter, as it trains.

``y = W x + s · B (A ∘ E) x`` in AdaLoRA's layers of PEFT, every group of the plan with its own A, E
and B. An optimizer's tensors can't grow, so these have `max_ratio` · r ranks from the beginning
(within the smallest weight's size), all but the first of them zero in all three. Such a rank does
nothing, gets no gradient, no decay and no moments: it isn't there until the hooks give it values,
A and B ~ N(0, 0.02²) and E = 1e-5. So which ranks exist is told by the values alone.

Every `delta_t` steps the `top_h` groups whose score is highest grow by one rank, until there are r
on average. A group's sensitivity is the mean of |w · ∇w| over the entries of its ranks, smoothed
over steps, and its score that times the smoothed deviation from it. The authors take the entries of
the product B diag(E) A instead, for which a whole ∂L/∂W would have to be held for each target.

The scale s is LoRA's at the base rank (α/r, or α/√r) at every step, so that growth leaves what was
learned; the authors divide α by a group's present rank. Nor is the next rank trained ahead of its
time, and Adam's steps are counted from the trial's beginning for late ranks, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e2lora.adapters.adalora import (
    TRIPLET,
    AdaLora,
    set_kept_ranks,
)
from e2lora.adapters.family import (
    DEFAULT_NAME,
    Family,
    Handle,
    Hooks,
    Request,
    layers_of,
)
from e2lora.config import (
    AdapterConfig,
    IncreLoraOptions,
    TrainConfig,
    TrialConfig,
    fingerprint_of,
)
from e2lora.plan import SharingPlan

STD, FIRST_E = 0.02, 1e-5
"""Of a new rank: the deviation of its values in A and B, and its value in E."""

USUAL_DELTA_T, USUAL_TOP_H = 100, 3


class IncreLora(AdaLora):
    """The count is that of all ranks there may be, Σ over groups `max_ratio` · r (in + out + 1),
    which is what an optimizer must hold. In the end r per group exist on average, and these are
    what is stored.
    """

    key = "increlora"
    zero_stages = (0, 1, 2)

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        Family.require_fits(self, plan, config)

    def require_trains(self, config: TrialConfig) -> None:
        Family.require_trains(self, config)
        options, max_steps = config.adapter.increlora, config.training.num_steps
        tinit, tfinal, delta_t = schedule(options, max_steps)
        if tinit + delta_t + tfinal > max_steps:
            raise ValueError(
                "IncreLoRA grows every `delta_t` steps between `tinit` and max_steps - `tfinal`, "
                "so the sum of these three must not exceed max_steps; got "
                f"tinit={tinit}, delta_t={delta_t}, tfinal={tfinal} and max_steps={max_steps}. "
                "Lower them, or train longer."
            )

    def require_reaches(self, plan: SharingPlan, config: TrialConfig) -> None:
        options, max_steps = config.adapter.increlora, config.training.num_steps
        lacking = sum(group.r - 1 for group in plan.groups)
        growth = Growth.of(options, max_steps, lacking)
        if growth.top_h * growth.rounds < lacking:
            raise ValueError(
                f"IncreLoRA must reach r={plan.groups[0].r} on average, {lacking} more ranks in "
                f"{len(plan.groups)} groups; got `top_h`={growth.top_h}, which in "
                f"{growth.rounds} growths (every {growth.delta_t} steps of max_steps={max_steps}) "
                f"makes {growth.top_h * growth.rounds}. Raise `increlora.top_h` to "
                f"{math.ceil(lacking / growth.rounds)}, lower `delta_t`, or train longer."
            )

    def held_rank(self, plan: SharingPlan, config: AdapterConfig) -> int:
        return capacity(plan, config)

    def left_to_the_loop(self, config: AdapterConfig) -> str:
        return "all ranks but the first of each group are to grow on the way"

    def build(self, model: Any, request: Request) -> Any:
        penalty = request.config.increlora.orth_reg_weight
        adapted = self.with_triplets(model, request, orth_reg_weight=penalty)
        for layer in layers_of(adapted, request.plan).values():
            a, e, b = (getattr(layer, slot)[request.name].data for slot in TRIPLET)
            a[1:], e[1:], b[:, 1:] = 0.0, 0.0, 0.0
        return adapted

    def hooks(
        self, adapted: Any, config: AdapterConfig, training: TrainConfig, handle: Handle
    ) -> Hooks:
        r = adapted.peft_config[DEFAULT_NAME].target_r
        return IncreLoraHooks(adapted, config.increlora, r, training.num_steps, handle)

    def pack(self, tensors: dict[str, Tensor], adapted: Any, name: str) -> dict[str, Tensor]:
        """Of each group the ranks that exist, and which they are."""
        tell_peft(adapted, name)
        return super().pack(tensors, adapted, name)


class Growth(NamedTuple):
    """When ranks grow, and how many at a time."""

    tinit: int
    delta_t: int
    rounds: int
    top_h: int

    @classmethod
    def of(cls, options: IncreLoraOptions, max_steps: int, lacking: int) -> Growth:
        """
        Args:
            lacking: ranks of all groups together, from the start to the end.
        """
        tinit, tfinal, delta_t = schedule(options, max_steps)
        rounds = (max_steps - tfinal - tinit) // delta_t
        needed = math.ceil(lacking / rounds)
        return cls(tinit, delta_t, rounds, options.top_h or max(USUAL_TOP_H, needed))

    def grown(self, step: int) -> int | None:
        """How many ranks may have grown after ``step``; None: nothing grows there."""
        number, rest = divmod(step - self.tinit, self.delta_t)
        return None if rest or not 0 < number <= self.rounds else number * self.top_h


class IncreLoraHooks(Hooks):
    """Scores of groups from the whole batch's gradients, and growth after a step.

    Args:
        r: on average, in the end.
        max_steps: of the trial.
    """

    def __init__(
        self, adapted: Any, options: IncreLoraOptions, r: int, max_steps: int, handle: Handle
    ) -> None:
        self.adapted, self.options, self.handle = adapted, options, handle
        names = {parameter: name for name, parameter in adapted.named_parameters()}
        self.groups = list(triplets(adapted, DEFAULT_NAME).values())
        self.groups = list({id(group[0]): group for group in self.groups}.values())
        self.names = [[names[parameter] for parameter in group] for group in self.groups]
        self.target = r * len(self.groups)
        self.growth = Growth.of(options, max_steps, self.target - len(self.groups))
        # of what the trial's seed drew at first: the same on all workers, and where it goes on
        self.seed = fingerprint_of(self.groups[0][0][0].float().tolist())
        self.sensitivity = torch.zeros(len(self.groups), dtype=torch.float64)
        self.uncertainty = torch.zeros_like(self.sensitivity)
        self._look()

    def _look(self) -> None:
        """At the ranks that exist: the first ones of each group."""
        self.ranks = [int(existing(*group).sum()) for group in self.groups]

    def penalty(self) -> Tensor | None:
        """Mean distance of A Aᵀ and Bᵀ B from the identity, of the ranks that exist."""
        if not self.options.orth_reg_weight:
            return None
        distances = []
        for (a, _, b), r in zip(self.groups, self.ranks, strict=True):
            identity = torch.eye(r, dtype=a.dtype, device=a.device)
            for gram in (a[:r] @ a[:r].T, b[:, :r].T @ b[:, :r]):
                distances.append(torch.linalg.matrix_norm(gram - identity))
        mean: Tensor = torch.stack(distances).mean()
        return self.options.orth_reg_weight * mean

    def after_backward(self, step: int) -> None:
        if sum(self.ranks) >= self.target:
            return
        beta1, beta2 = self.options.beta1, self.options.beta2
        now = torch.tensor([self._sensitivity(k) for k in range(len(self.groups))]).double()
        self.sensitivity = beta1 * self.sensitivity + (1 - beta1) * now
        deviation = (now - self.sensitivity).abs()
        self.uncertainty = beta2 * self.uncertainty + (1 - beta2) * deviation

    def _sensitivity(self, k: int) -> float:
        """What is not there is zero, and so is what it adds to the sum."""
        sums = [
            (parameter.detach().float() * self.handle.gradient(name)).abs().sum()
            for name, parameter in zip(self.names[k], self.groups[k], strict=True)
        ]
        of_a_rank = sum(p.numel() for p in self.groups[k]) // len(self.groups[k][0])
        return float(sum(sums)) / (self.ranks[k] * of_a_rank)

    def after_step(self, step: int) -> None:
        grown = self.growth.grown(step)
        if grown is None or sum(self.ranks) >= self.target:
            return
        wanted = min(self.target, len(self.groups) + grown)
        ranks, most = list(self.ranks), len(self.groups[0][0])
        scores = (self.sensitivity * self.uncertainty).tolist()
        order = sorted(range(len(ranks)), key=lambda k: -scores[k])
        while sum(ranks) < wanted:  # once around, unless more are due than there are groups
            for k in order:
                if ranks[k] < most and sum(ranks) < wanted:
                    ranks[k] += 1
        for k, r in enumerate(ranks):
            if r > self.ranks[k]:
                self._grow(k, slice(self.ranks[k], r), step)
        self._look()
        tell_peft(self.adapted, DEFAULT_NAME)

    def _grow(self, k: int, new: slice, step: int) -> None:
        seed = int(fingerprint_of([self.seed, k, step]), 16) % 2**63
        generator = torch.Generator().manual_seed(seed)
        for slot, name in zip(TRIPLET, self.names[k], strict=True):
            value = self.handle.value(name)
            part = value[:, new] if slot == "lora_B" else value[new]
            drawn = STD * torch.randn(part.shape, generator=generator)
            part.copy_(torch.full_like(drawn, FIRST_E) if slot == "lora_E" else drawn)
            self.handle.assign(name, value)

    def state(self) -> dict[str, Tensor]:
        """The ranks are told by the parameters."""
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sensitivity, self.uncertainty = state["sensitivity"], state["uncertainty"]
        self._look()
        tell_peft(self.adapted, DEFAULT_NAME)


def capacity(plan: SharingPlan, config: AdapterConfig) -> int:
    """The most ranks that a group can have."""
    smallest = min(min(t.in_features, t.out_features) for t in plan.targets)
    return min(round(config.increlora.max_ratio * plan.groups[0].r), smallest)


def schedule(options: IncreLoraOptions, max_steps: int) -> tuple[int, int, int]:
    """Steps before growth begins, after it ended, and between two growths."""
    tinit = max(1, max_steps // 10) if options.tinit is None else options.tinit
    tfinal = max_steps // 2 if options.tfinal is None else options.tfinal
    few = max(1, (max_steps - tinit - tfinal) // 10)
    return tinit, tfinal, options.delta_t or min(USUAL_DELTA_T, few)


def triplets(adapted: Any, name: str) -> dict[str, tuple[Any, Any, Any]]:
    """Path of an adapted layer → its A, E and B."""
    a, e, b = TRIPLET
    return {
        path: (getattr(layer, a)[name], getattr(layer, e)[name], getattr(layer, b)[name])
        for path, layer in adapted.base_model.model.named_modules()
        if name in getattr(layer, e, {})
    }


def existing(a: Tensor, e: Tensor, b: Tensor) -> Tensor:
    """Which ranks have a value that isn't zero."""
    exists: Tensor = (a != 0).any(1) | (e != 0).any(1) | (b != 0).any(0)
    return exists


def tell_peft(adapted: Any, name: str) -> None:
    """Which ranks there are to save."""
    kept = {path: existing(*group) for path, group in triplets(adapted, name).items()}
    set_kept_ranks(adapted, name, kept)
