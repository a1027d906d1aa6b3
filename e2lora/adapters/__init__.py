"""Plan + model → adapted model. One file per family; ``FAMILIES`` is the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from e2lora.adapters.family import DEFAULT_NAME, Family, Request
from e2lora.adapters.lora import Dora, Lora, LoraFa, LoraPlus
from e2lora.adapters.lori import Lori
from e2lora.config import AdapterConfig, TrialConfig
from e2lora.plan import SharingPlan, require_plan_fits
from e2lora.targets import find_targets

FAMILIES: dict[str, Family] = {
    family.key: family for family in (Lora(), Dora(), LoraPlus(), LoraFa(), Lori())
}


def adapt(
    model: Any,
    plan: SharingPlan,
    config: AdapterConfig | None = None,
    head: Sequence[str] = (),
    *,
    adapter_name: str = DEFAULT_NAME,
    gradients: Mapping[str, Tensor] | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> Any:
    """Put adapters into ``model`` in place, as the plan says; returns the PEFT model around it.

    Shared tensors are one parameter. ``head`` modules are trained in full beside the adapter.
    Seed torch first: the initial A is random.

    Args:
        model: a transformers model, or a PEFT model that gets one more adapter.
        config: None: LoRA on the plan's targets.
        gradients: for families that start from them: see :class:`e2lora.adapters.family.Request`.
        initial: in their place, what another adapter of the same trial started from.

    Raises:
        ValueError: the plan doesn't fit the model, or the family can't do what it asks.
    """
    config = config or AdapterConfig(target_modules=tuple(t.path for t in plan.targets))
    family = FAMILIES[config.family]
    family.require_suits(plan.options, config)
    family.require_fits(plan, config)
    require_plan_fits(plan, find_targets(model, config.target_modules))
    request = Request(plan, config, head, adapter_name, gradients, initial)
    adapted = family.build(model, request)
    counted = count_parameters(adapted)[0]
    expected = count_adapter_parameters(plan, config)
    assert counted == expected, f"adapter has {counted} parameters, its plan {expected}"
    return adapted


def count_adapter_parameters(plan: SharingPlan, config: AdapterConfig) -> int:
    """Trainable adapter parameters, each shared tensor once; a head is not counted."""
    return FAMILIES[config.family].count(plan, config)


def require_possible_trial(config: TrialConfig) -> None:
    """Refuse what the trial's family can't do, before anything is loaded.

    Raises:
        ValueError: with the reason.
    """
    family = FAMILIES[config.adapter.family]
    family.require_suits(config.plan, config.adapter)
    family.require_trains(config)


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable (adapter, head) parameters, each shared tensor once."""
    adapter = head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if is_head(name):
                head += parameter.numel()
            else:
                adapter += parameter.numel()
    return adapter, head


def is_head(parameter_name: str) -> bool:
    """Whether a trainable parameter of an adapted model belongs to its head."""
    return ".modules_to_save." in parameter_name


def trainable_parameters(model: Any) -> dict[str, Any]:
    """Name → parameter, each shared tensor once, under the first of its names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
