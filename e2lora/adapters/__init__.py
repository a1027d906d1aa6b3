"""Plan + model → adapted model. One file per family; ``FAMILIES`` is the registry."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from e2lora.adapters.adalora import AdaLora
from e2lora.adapters.bslora import BsLora
from e2lora.adapters.family import DEFAULT_NAME, Family, Request, put_back
from e2lora.adapters.full import Full, FullyTrained
from e2lora.adapters.gora import Gora
from e2lora.adapters.hydralora import HydraLora
from e2lora.adapters.increlora import IncreLora
from e2lora.adapters.lora import Dora, Lora, LoraFa, LoraPlus
from e2lora.adapters.lora_ga import LoraGa
from e2lora.adapters.lori import Lori
from e2lora.adapters.ralora import RaLora
from e2lora.adapters.randlora import RandLora
from e2lora.adapters.rasa import Rasa
from e2lora.adapters.vera import Vera
from e2lora.config import AdapterConfig, PlanConfig, TrialConfig, system_name
from e2lora.partitioned import known_to_peft, numel_of
from e2lora.plan import SharingPlan, require_plan_fits
from e2lora.quantized import require_can_train_quantised
from e2lora.targets import find_targets
from e2lora.weights import dtype_of, weights_fingerprint

FAMILIES: dict[str, Family] = {
    family.key: family
    for family in (
        Lora(),
        Dora(),
        LoraPlus(),
        LoraFa(),
        Lori(),
        LoraGa(),
        Vera(),
        RandLora(),
        AdaLora(),
        Rasa(),
        HydraLora(),
        Gora(),
        IncreLora(),
        BsLora(),
        RaLora(),
        Full(),
    )
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
    in_loop: bool = False,
) -> Any:
    """Put adapters into ``model`` in place, as the plan says; returns the PEFT model around it.

    Shared tensors are one parameter. ``head`` modules are trained in full beside the adapter.
    Seed torch first: the initial A is random.

    Args:
        model: a transformers model, or a PEFT model that gets one more adapter.
        config: None: LoRA on the plan's targets.
        gradients: for families that start from them: see :class:`e2lora.adapters.family.Request`.
        initial: in their place, what another adapter of the same trial started from.
        in_loop: whether this project's training loop goes on from here, or nothing is trained;
            otherwise a family part of which lies there warns.

    Raises:
        ValueError: the plan doesn't fit the model, the family can't do what it asks, or the PEFT
            model can't take another adapter.
    """
    if not isinstance(plan, SharingPlan) or not isinstance(config, AdapterConfig | None):
        raise ValueError(
            "an adapter is made from a SharingPlan (of `build_plan`) and an AdapterConfig; got a "
            f"{type(plan).__name__} and a {type(config).__name__}."
        )
    config = config or AdapterConfig(target_modules=tuple(t.path for t in plan.targets))
    family = FAMILIES[config.family]
    if gradients is not None and not family.needs_gradients:
        raise ValueError(f"{family.name} starts from no gradients; got some. Leave them out.")
    _require_names(model, plan, head, adapter_name)
    left = family.left_to_the_loop(config)
    if left and not in_loop:
        warnings.warn(
            f"another training loop trains something else than {config.display_name}: {left}, "
            "which e2lora's own does (jobs/search.py).",
            stacklevel=2,
        )
    family.require_suits(plan.options, config)
    family.require_fits(plan, config)
    if hasattr(model, "get_base_model"):
        _require_room(model, adapter_name, config)
    require_plan_fits(plan, find_targets(model, config.target_modules))
    touched = bits_of(model, head) if family.touches_base(config) else None
    request = Request(plan, config, head, adapter_name, gradients, initial)
    is_bare = not hasattr(model, "get_base_model")
    try:
        with known_to_peft(model):
            adapted = family.build(model, request)
    except BaseException:
        if is_bare:  # on a PEFT model PEFT takes back what it did
            put_back(model)
        raise
    counted = count_parameters(adapted)[0]
    expected = count_adapter_parameters(plan, config)
    fits = expected in (None, counted) or (family.count_is_limit and counted < (expected or 0))
    assert fits, f"adapter has {counted} parameters, its plan {expected}"
    _keeper(adapted, adapter_name).e2lora = Origin(plan, config, tuple(head), touched)
    return adapted


def _require_names(model: Any, plan: SharingPlan, head: Sequence[str], adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            f"an adapter's name is part of module names, without a dot; got {adapter_name!r}."
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = {name for name, _ in inner.named_modules()}
    unknown = [] if isinstance(head, str) else [name for name in head if name not in modules]
    if isinstance(head, str) or unknown:
        top = sorted(name for name in modules if name and "." not in name)
        raise ValueError(
            f"`head` must be a sequence of module names of the model, such as {top}; got "
            f"{unknown or head!r}. Correct it."
        )
    adapted = sorted(set(head) & {target.path for target in plan.targets})
    if adapted:
        raise ValueError(
            f"a module is adapted or trained in full, not both; {adapted} are in `head` and in the "
            "plan. Take them out of one."
        )


@dataclass(frozen=True)
class Origin:
    """What an adapter in a model was made from; kept where PEFT keeps its configuration.

    ``touched_base`` is :func:`bits_of` the base before, where the adapter touches it; else None.
    """

    plan: SharingPlan
    config: AdapterConfig
    head: tuple[str, ...]
    touched_base: tuple[str, str] | None


def bits_of(model: Any, head: Sequence[str]) -> tuple[str, str]:
    """Fingerprint and type of the base weights, which the fingerprint depends on."""
    return weights_fingerprint(model, skip=head), dtype_of(model)


def origin_of(model: Any, adapter_name: str = DEFAULT_NAME) -> Origin:
    """What :func:`adapt` made this adapter from.

    Raises:
        ValueError: no such adapter, or one that was made in another way.
    """
    keeper = _keeper(model, adapter_name)
    origin = getattr(keeper, "e2lora", None)
    if not isinstance(origin, Origin):
        raise ValueError(
            f"an adapter must be one that `adapt` or `load` of e2lora put in; {adapter_name!r} is "
            f"none. Name another, or use the model's `save_pretrained`."
        )
    return origin


def _keeper(model: Any, adapter_name: str) -> Any:
    if isinstance(model, FullyTrained):
        return model
    return getattr(model, "peft_config", {}).get(adapter_name)


def _require_room(model: Any, adapter_name: str, config: AdapterConfig) -> None:
    """Whether a model with adapters can take one more."""
    if isinstance(model, FullyTrained):
        raise ValueError(
            "a fully trained model takes no adapter beside: it has no base weights any more. Load "
            "the base model anew, or adapt what `unload` returns."
        )
    if adapter_name in model.peft_config:
        raise ValueError(
            f"each adapter of a model has a name of its own; {adapter_name!r} is taken. Give "
            "another `adapter_name`, or `delete_adapter` the old one first."
        )
    others = [getattr(kept, "e2lora", None) for kept in model.peft_config.values()]
    for c in [config, *(other.config for other in others if other)]:
        if FAMILIES[c.family].touches_base(c):
            raise ValueError(
                "adapters of one model share its base weights, so none of them may change these; "
                f"{system_name(PlanConfig(), c)} does. Give it a model of its own."
            )


def count_adapter_parameters(plan: SharingPlan, config: AdapterConfig) -> int | None:
    """Trainable adapter parameters, each shared tensor once; a head is not counted.

    None for full fine-tuning: all that the model has.
    """
    return FAMILIES[config.family].count(plan, config)


def counts_by_system(plan: SharingPlan) -> dict[str, int]:
    """Trainable parameters of the systems that this plan can be used for, by their names."""
    counts = {}
    lora = AdapterConfig(target_modules=tuple(t.path for t in plan.targets))
    adapters = [{"family": "lora", "a_scope": "type"}, *({"family": key} for key in FAMILIES)]
    for config in (lora.model_copy(update=adapter) for adapter in adapters):
        family = FAMILIES[config.family]
        try:
            family.require_suits(plan.options, config)
            family.require_fits(plan, config)
        except ValueError:
            continue
        if (count := family.count(plan, config)) is not None:
            counts[system_name(plan.options, config)] = count
    return counts


def require_possible_trial(config: TrialConfig) -> None:
    """Refuse what the trial's family can't do, before anything is loaded.

    Raises:
        ValueError: with the reason.
    """
    family = FAMILIES[config.adapter.family]
    family.require_suits(config.plan, config.adapter)
    family.require_trains(config)
    require_can_train_quantised(config, family.touches_base(config.adapter))


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable (adapter, head) parameters, each shared tensor once."""
    parts = {False: 0, True: 0}
    for name, parameter in trainable_parameters(model).items():
        parts[is_head(name, model)] += numel_of(parameter)
    return parts[False], parts[True]


def is_head(parameter_name: str, model: Any = None) -> bool:
    """Whether a trainable parameter of an adapted model belongs to its head.

    Args:
        model: needed where it may be fully trained; PEFT says it in the parameter's name.
    """
    if isinstance(model, FullyTrained):
        return any(parameter_name.startswith(f"model.{module}.") for module in model.head)
    return ".modules_to_save." in parameter_name


def trainable_parameters(model: Any) -> dict[str, Any]:
    """Name → parameter, each shared tensor once, under the first of its names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
