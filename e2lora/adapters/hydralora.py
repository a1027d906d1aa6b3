"""HydraLoRA (Tian et al., 2024): one A and several heads B, weighted anew for every token.

``y = W x + s Σ_e softmax(W_g x)_e B_e A dropout(x)``. A (r × in) and the E heads (out × r each)
are shared by the layers of a group; the router W_g (E × in) is each layer's own, and sees x without
dropout, as in the authors' code. Their further loss, which balances the heads between known tasks,
is zero by default there, and isn't here.

What is added depends on x, so there are no merged weights and no plain LoRA of it. PEFT's layer of
LoRA computes it as a variant of its own, in which the heads lie side by side as one B (out × E r).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from e2lora.adapters.family import Ability, Request, inject, layers_of
from e2lora.adapters.lora import Lora, shapes_and_groups, tie
from e2lora.config import AdapterConfig
from e2lora.plan import SharingPlan

ROUTER = "lora_router"
"""The routers' place in PEFT's layer, beside ``lora_A`` and ``lora_B``."""

WHY_NOT_MERGED = (
    "a router weights its heads anew for every token, which no fixed weight can say; use the "
    "adapter beside its base, as `e2lora.load` puts it"
)


class HydraLora(Lora):
    """HydraLoRA, with one A and its heads per layer or per group."""

    key = "hydralora"
    initialisations = ("default",)
    scopes = ("interval",)
    lacks: ClassVar[Mapping[Ability, str]] = {
        "merge": WHY_NOT_MERGED,
        "peft": "PEFT alone has no router of heads; load the adapter by `e2lora.load`",
        "portable": "a router weights its heads anew for every token, which no A and B can say; "
        "load the adapter by `e2lora.load`",
    }

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Σ over groups r_k (in + E·out), and E·in for every layer."""
        heads, total = config.hydralora.heads, 0
        for in_features, out_features, groups in shapes_and_groups(plan):
            total += sum(group.r for group in groups) * (in_features + heads * out_features)
            total += sum(len(group.layers) for group in groups) * heads * in_features
        return total

    def build(self, model: Any, request: Request) -> Any:
        adapted = inject(model, request.plan, self.peft_config(model, request), request.name)
        for layer in layers_of(adapted, request.plan).values():
            _grow_heads(layer, request.name, request.config.hydralora.heads)
        tie(adapted, request)
        return adapted


class Routed:
    """What PEFT's layer calls a variant of LoRA: how it computes, and that it can't be merged."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **unused: Any
    ) -> Tensor:
        """``result`` and what the adapter adds; x is (… × in), they are (… × out)."""
        lower = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        logits = getattr(module, ROUTER)[active_adapter](x)
        shares = logits.softmax(-1, dtype=torch.float32).to(lower.dtype)
        weighted = (shares.unsqueeze(-1) * lower.unsqueeze(-2)).flatten(-2)  # … × E r
        added: Tensor = module.lora_B[active_adapter](weighted) * module.scaling[active_adapter]
        return result + added

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise ValueError(
            f"HydraLoRA can't be merged; got adapter {active_adapter!r}: {WHY_NOT_MERGED}."
        )

    merge_unsafe = unmerge = merge_safe

    @staticmethod
    def supports_lora_conversion() -> bool:
        return False


def _grow_heads(layer: Any, name: str, heads: int) -> None:
    """Make PEFT's B one of so many heads, at zero, and give the layer a router.

    The router starts as ``nn.Linear`` does, which is the authors' choice.
    """
    single = layer.lora_B[name]
    size = heads * single.in_features
    layer.lora_B[name] = nn.Linear(size, single.out_features, bias=False, device="meta")
    layer.lora_B[name].weight = nn.Parameter(single.weight.new_zeros(single.out_features, size))
    if not hasattr(layer, ROUTER):
        setattr(layer, ROUTER, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, ROUTER)
    router = nn.Linear(layer.in_features, heads, bias=False)
    getattr(layer, ROUTER)[name] = router.to(single.weight)
    layer.lora_variant[name] = Routed()
