"""Plan + model → adapted model. One file per family; ``FAMILIES`` is the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from e2lora.adapters.lora import adapt_lora
from e2lora.config import AdapterConfig
from e2lora.plan import SharingPlan, count_adapter_parameters, require_plan_fits
from e2lora.targets import find_targets

FAMILIES: dict[str, Callable[[Any, SharingPlan, AdapterConfig, Sequence[str]], Any]] = {
    "lora": adapt_lora,
}


def adapt(model: Any, plan: SharingPlan, config: AdapterConfig, head: Sequence[str] = ()) -> Any:
    """Put adapters into ``model`` in place, as the plan says; returns the PEFT model around it.

    Shared tensors are one parameter. ``head`` modules are trained in full beside the adapter.
    Seed torch first: the initial A is random.

    Raises:
        ValueError: the plan doesn't fit the model, or the family can't do what it asks.
    """
    require_plan_fits(plan, find_targets(model, config.target_modules))
    adapted = FAMILIES[config.family](model, plan, config, head)
    counted, expected = count_parameters(adapted)[0], count_adapter_parameters(plan, config)
    assert counted == expected, f"adapter has {counted} parameters, its plan {expected}"
    return adapted


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
