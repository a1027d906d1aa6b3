"""Activation checkpointing: layers keep only their input, and run forward again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from e2lora.adapters import FAMILIES
from e2lora.config import AdapterConfig, TrainConfig
from e2lora.plan import SharingPlan


def require_checkpointable(
    plan: SharingPlan, adapter: AdapterConfig, training: TrainConfig
) -> None:
    """Refuse reentrant checkpointing of a tensor that several layers share.

    Raises:
        ValueError: with the reason.
    """
    shared = shared_tensors(plan, adapter)
    if training.activation_checkpointing == "reentrant" and shared:
        raise ValueError(
            "reentrant checkpointing runs a backward of its own in each layer, so a tensor shared "
            "by several layers would be reduced over the workers several times; here these share: "
            f"{shared}. Set activation_checkpointing='non_reentrant'."
        )


def shared_tensors(plan: SharingPlan, adapter: AdapterConfig) -> str:
    """Who shares, in words; "" if every layer has tensors of its own."""
    if told := FAMILIES[adapter.family].shared_anyway:
        return told
    scopes = {adapter.a_scope, adapter.b_scope}
    for group in plan.groups if "interval" in scopes else ():
        if len(group.layers) > 1:
            return f"layers {list(group.layers)} of {group.module_type}"
    for module_type in plan.module_types if "type" in scopes else ():
        layers = [layer for group in plan.groups_of(module_type) for layer in group.layers]
        if len(layers) > 1:
            return f"all layers of {module_type}"
    return ""


@contextmanager
def activation_checkpointed(model: Any, kind: str) -> Iterator[None]:
    """Of an adapted model while it trains.

    Args:
        kind: as ``TrainConfig.activation_checkpointing`` names it.

    Raises:
        ValueError: a model whose layers can't.
    """
    if kind == "none":
        yield
        return
    inner = model.get_base_model()
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise ValueError(
            "activation checkpointing needs layers that can run forward again; those of "
            f"{type(inner).__name__} can't. Set activation_checkpointing='none'."
        )
    inner.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    try:
        yield
    finally:
        inner.activation_checkpointing_disable()
        inner.disable_input_require_grads()
