"""LoRA through PEFT, with the tensors of each group of the plan tied (method: E²LoRA).

``y = W x + (α/r) B A x``. PEFT builds one A and one B per layer at the plan's ranks; then every
layer of a group is given the group's own modules, so that a shared tensor *is* one parameter.
Tie before an optimizer exists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from e2lora.config import AdapterConfig
from e2lora.plan import SharingPlan
from e2lora.targets import is_transposed

ADAPTER = "default"


def adapt_lora(model: Any, plan: SharingPlan, config: AdapterConfig, head: Sequence[str]) -> Any:
    """LoRA, all-shared, blocks, ShareLoRA-A and E²LoRA: see :func:`e2lora.adapters.adapt`."""
    from peft import get_peft_model

    if config.a_scope == "type":
        _require_one_rank_per_type(plan)
    adapted = get_peft_model(model, peft_config(model, plan, config, head), ADAPTER)
    injected = {
        name for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())
    }
    planned = {target.path for target in plan.targets}
    assert injected == planned, f"PEFT adapted {injected ^ planned} unlike the plan"
    tie(model, plan, config)
    return adapted


def peft_config(model: Any, plan: SharingPlan, config: AdapterConfig, head: Sequence[str]) -> Any:
    """PEFT's configuration of the same function, without the tying.

    ``alpha_pattern`` goes with ``rank_pattern``: PEFT divides each α by the layer's own rank.
    """
    from peft import LoraConfig

    options = plan.options
    groups = plan.group_of_target()
    own_rank = {path: group for path, group in groups.items() if group.r != options.r}
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    return LoraConfig(
        task_type="SEQ_CLS" if is_classifier and head else None,  # it trains the classifier
        r=options.r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        use_rslora=options.use_rslora,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=any(is_transposed(model.get_submodule(path)) for path in groups),
        target_modules=list(groups),
        rank_pattern={f"^{re.escape(path)}": group.r for path, group in own_rank.items()},
        alpha_pattern={f"^{re.escape(path)}": g.lora_alpha for path, g in own_rank.items()},
        modules_to_save=list(head) or None,
    )


def tie(model: Any, plan: SharingPlan, config: AdapterConfig) -> None:
    """Let all layers of a group use the modules of its first layer (A: of its type, if so)."""
    first_a: dict[Any, Any] = {}
    first_b: dict[Any, Any] = {}
    for path, group in plan.group_of_target().items():
        layer = model.get_submodule(path)
        a_owner = group.module_type if config.a_scope == "type" else group
        layer.lora_A[ADAPTER] = first_a.setdefault(a_owner, layer.lora_A[ADAPTER])
        layer.lora_B[ADAPTER] = first_b.setdefault(group, layer.lora_B[ADAPTER])


def _require_one_rank_per_type(plan: SharingPlan) -> None:
    for module_type in plan.module_types:
        ranks = sorted({group.r for group in plan.groups_of(module_type)})
        if len(ranks) > 1:
            raise ValueError(
                f"A at type scope needs one rank per module type; {module_type} has {ranks}. Use "
                "a topology with equal ranks (none, all, blocks), or a_scope='interval'."
            )
