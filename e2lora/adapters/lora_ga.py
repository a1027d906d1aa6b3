"""LoRA-GA (Wang et al., 2024): A and B start along the leading directions of the gradient.

With ``G ≈ U S Vᵀ`` of rank 2r, A₀ takes r rows of Vᵀ and B₀ r columns of U, so that the first step
of training goes where full fine-tuning would, as far as the rank can. A group starts from the sum
of its layers' gradients: that is the gradient of an update which they all share.

PEFT computes the pair. Its B₀ is scaled by the singular values of G too, so it is as small as the
gradient of the mean loss is, except with scale ``weight_svd``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from e2lora.adapters.family import Request, require_gradients
from e2lora.adapters.lora import Lora, shapes_and_groups
from e2lora.config import AdapterConfig
from e2lora.plan import SharingPlan


class LoraGa(Lora):
    """On an interval's summed gradient where layers share."""

    key = "lora_ga"
    initialisations = ("default",)
    scopes = ("interval",)
    needs_gradients = True
    drift: ClassVar[float] = 1e-5  # in float32

    def touches_base(self, config: AdapterConfig) -> bool:
        return True

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        super().require_fits(plan, config)
        for in_features, out_features, groups in shapes_and_groups(plan):
            for group in groups:
                if 2 * group.r > min(in_features, out_features):
                    raise ValueError(
                        "LoRA-GA starts from 2r directions of a gradient, so 2r must not exceed "
                        f"min(in, out); {group.module_type} ({out_features} x {in_features}) has "
                        f"r={group.r} in layers {list(group.layers)}. Lower r, or take it out of "
                        "`target_modules`."
                    )

    def build(self, model: Any, request: Request) -> Any:
        if request.initial is None:
            require_gradients(self.name, request)
        return super().build(model, request)

    def choose(self, request: Request, layer: Any, path: str) -> None:
        from peft import LoraGAConfig

        assert request.gradients is not None
        base = layer.get_base_layer()
        gradient = request.gradients[path].to(base.weight.device)
        base._peft_loraga_grad = gradient  # where PEFT looks for it, and takes it away
        layer.lora_ga_init(request.name, LoraGAConfig(**request.config.lora_ga.model_dump()))
