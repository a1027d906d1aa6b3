"""AdaLoRA (Zhang et al., 2023) by PEFT's implementation: it prunes ranks while it trains.

``y = W x + s · B (A ∘ E) x``: every group of the plan has its own A (init_r × in), E (init_r × 1)
and B (out × init_r), tied before PEFT's allocator is made, so that a shared tensor is scored and
budgeted once. The scale s is that of LoRA at the base rank (α/r, or α/√r), at every step and
whatever ranks remain: PEFT divides its own α by the initial rank, so it is given α·init_r/r.

PEFT's allocator reads ``p.grad`` after the optimizer's step, where DeepSpeed has removed it, so
hooks hold each gradient over the step. They take it before clipping: a rank's importance shall not
depend on the size of its step. PEFT's orthogonal regularisation, which it adds where a model
returns a loss, is the hooks' penalty.

In a loop of one's own PEFT's documented calls do the same: set
``model.peft_config[name].total_step``, train on the loss that the model returns for labels, and
call ``model.base_model.update_and_allocate(step)`` after the optimizer's step ``step`` (from 1),
before ``zero_grad``. There `tinit` and `tfinal` are 0 unless the configuration gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from e2lora.adapters.family import (
    DEFAULT_NAME,
    Factors,
    Family,
    Handle,
    Hooks,
    Request,
    common_options,
    inject,
    layers_of,
    share_first,
)
from e2lora.adapters.tensors import pack_bits, unpack_bits
from e2lora.config import AdaLoraOptions, AdapterConfig, TrainConfig, TrialConfig
from e2lora.plan import SharingPlan

TRIPLET = ("lora_A", "lora_E", "lora_B")
UNKNOWN_STEPS = 2**31
"""So far away that until the number of steps is set, no step is the last to prune, or after it."""

KEPT = "kept"
"""The end of the stored name of a mask of ranks, beside those of A, E and B."""


class AdaLora(Family):
    """The count is that of the start, Σ over groups init_r·(in + out + 1), which is what an
    optimizer must hold. In the end about r ranks per group are left, more in some and less in
    others: of the pruned ones E is zero, and nothing of them is stored.
    """

    key = "adalora"
    no_allocation = "it allocates its own, between all groups, while it trains"
    one_rank = "it is the average of those that it allocates"
    zero_stages = (0, 1, 2)
    why_not_other_stages = "its ranks are chosen by whole gradients, and stage 3 partitions them"

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        super().require_fits(plan, config)
        r, init_r = plan.groups[0].r, initial_rank(plan, config)
        if init_r <= r:
            raise ValueError(
                "AdaLoRA must start above the rank it prunes to; got init_ratio="
                f"{config.adalora.init_ratio:g} at r={r}, which rounds to {init_r}. Raise "
                "`adalora.init_ratio`."
            )
        for target in plan.targets:
            limit = min(target.in_features, target.out_features)
            if init_r > limit:
                raise ValueError(
                    "AdaLoRA's initial rank must not exceed min(in, out) of a weight; got "
                    f"init_r={init_r} (init_ratio={config.adalora.init_ratio:g} at r={r}) for "
                    f"{target.path} ({target.out_features} x {target.in_features}). Lower r, or "
                    "`adalora.init_ratio`."
                )

    def require_trains(self, config: TrialConfig) -> None:
        super().require_trains(config)
        max_steps = config.training.num_steps
        tinit, tfinal = schedule(config.adapter.adalora, max_steps)
        if tinit + tfinal >= max_steps:
            raise ValueError(
                "AdaLoRA prunes between the steps `tinit` and max_steps - `tfinal`, so their sum "
                f"must be below max_steps; got tinit={tinit}, tfinal={tfinal} and "
                f"max_steps={max_steps}. Lower them, or train longer."
            )
        if max_steps - tfinal < 2:
            raise ValueError(
                "AdaLoRA must see a gradient before its last pruning, after step max_steps - "
                f"`tfinal`, which must be at least 2; got {max_steps - tfinal} of max_steps="
                f"{max_steps}. Lower `adalora.tfinal`, or train longer."
            )

    def held_rank(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Of the tensors of every group, which stay as large to the end."""
        return initial_rank(plan, config)

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        sizes = {t.module_type: t.in_features + t.out_features + 1 for t in plan.targets}
        return self.held_rank(plan, config) * sum(sizes[g.module_type] for g in plan.groups)

    def left_to_the_loop(self, config: AdapterConfig) -> str:
        return "ranks are to be pruned after each step, as by PEFT's `update_and_allocate`"

    def build(self, model: Any, request: Request) -> Any:
        from peft.tuners.adalora.layer import RankAllocator

        options = request.config.adalora
        adapted = self.with_triplets(
            model,
            request,
            deltaT=options.delta_t,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orth_reg_weight,
            tinit=options.tinit or 0,
            tfinal=options.tfinal or 0,
        )
        tuner, name = adapted.base_model, request.name
        tuner.rankallocator = RankAllocator(tuner.model, adapted.peft_config[name], name)
        return adapted

    def with_triplets(self, model: Any, request: Request, **options: Any) -> Any:
        """PEFT's layers with an A, E and B for each group, at LoRA's scale at the base rank."""
        from peft import AdaLoraConfig

        plan, config = request.plan, request.config
        held, r = self.held_rank(plan, config), plan.groups[0].r
        root = r**0.5 if plan.options.use_rslora else r
        peft_config = AdaLoraConfig(
            **common_options(model, request),
            init_r=held,
            target_r=r,
            lora_alpha=plan.groups[0].lora_alpha * held / root,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            total_step=UNKNOWN_STEPS,  # PEFT wants a number; whoever trains knows it
            **options,
        )
        adapted = inject(model, plan, peft_config, request.name)
        tie(adapted, plan, request.name)
        return adapted

    def hooks(
        self, adapted: Any, config: AdapterConfig, training: TrainConfig, handle: Handle
    ) -> Hooks:
        peft_config = adapted.peft_config[DEFAULT_NAME]
        peft_config.total_step = training.num_steps
        peft_config.tinit, peft_config.tfinal = schedule(config.adalora, training.num_steps)
        return AdaLoraHooks(adapted, handle)

    def pack(self, tensors: dict[str, Tensor], adapted: Any, name: str) -> dict[str, Tensor]:
        """Of each group the ranks that it kept, and which they are."""
        packed = dict(tensors)
        for layer, kept in kept_ranks(adapted, name).items():
            a, e, b = (f"{layer}.{slot}" for slot in TRIPLET)
            if e not in tensors:  # of a layer that shares another's
                continue
            packed[f"{layer}.{KEPT}"] = pack_bits(kept)
            packed[a], packed[e] = tensors[a][kept], tensors[e][kept]
            packed[b] = tensors[b][:, kept].contiguous()
            if not kept.any():
                del packed[a], packed[e], packed[b]
        return packed

    def unpack(
        self,
        stored: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        adapted: Any,
        name: str,
    ) -> dict[str, Tensor]:
        tensors = {key: tensor for key, tensor in stored.items() if not key.endswith(f".{KEPT}")}
        pattern = {}
        for layer in [k.removesuffix(f".{KEPT}") for k in stored.keys() - tensors.keys()]:
            a, e, b = (f"{layer}.{slot}" for slot in TRIPLET)
            if not {a, e, b} <= shapes.keys():
                continue  # a damaged folder: whoever compares names will say so
            kept = pattern[layer] = unpack_bits(stored[f"{layer}.{KEPT}"], shapes[e][:1])
            for tensor, ranks in ((a, kept), (e, kept), (b, (slice(None), kept))):
                tensors[tensor] = torch.zeros(shapes[tensor])
                if tensor in stored:
                    tensors[tensor][ranks] = stored[tensor].float()
        if pattern:
            set_kept_ranks(adapted, name, pattern)
        return tensors

    def factors(self, layer: Any, name: str) -> Factors:
        """Of the ranks that are not zero; of one at least."""
        a, e, b = (getattr(layer, slot)[name] for slot in TRIPLET)
        kept = e.flatten() != 0
        kept[0] |= ~kept.any()
        scale = layer.scaling[name] / (float(layer.ranknum[name]) + 1e-5)
        return Factors((a * e)[kept], b[:, kept], scale)


class AdaLoraHooks(Hooks):
    """PEFT's allocator, fed with the whole batch's gradients; its scores are kept in float32."""

    def __init__(self, adapted: Any, handle: Handle) -> None:
        self.adapted, self.handle = adapted, handle
        self.config = adapted.peft_config[DEFAULT_NAME]
        self.allocator = adapted.base_model.rankallocator
        self.parameters: dict[str, Any] = {  # by PEFT's names, each shared one once
            name: parameter
            for name, parameter in adapted.base_model.model.named_parameters()
            if any(name.endswith(f".{slot}.{DEFAULT_NAME}") for slot in TRIPLET)
        }
        names = {parameter: name for name, parameter in adapted.named_parameters()}
        self.handle_names = {name: names[p] for name, p in self.parameters.items()}
        self.gradients: dict[str, Tensor] = {}
        zeros = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters.items()}
        self._set_scores(zeros, dict(zeros))

    def penalty(self) -> Tensor | None:
        """Mean distance of A Aᵀ and Bᵀ B from the identity, each shared tensor once."""
        if not self.config.orth_reg_weight:
            return None
        distances = []
        for name, p in self.parameters.items():
            if ".lora_E." not in name:
                gram = p @ p.T if ".lora_A." in name else p.T @ p
                identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                distances.append(torch.linalg.matrix_norm(gram - identity))
        mean: Tensor = torch.stack(distances).mean()
        return self.config.orth_reg_weight * mean

    def after_backward(self, step: int) -> None:
        if step < self.config.total_step - self.config.tfinal:  # those that PEFT scores
            self.gradients = {n: self.handle.gradient(of) for n, of in self.handle_names.items()}

    def after_step(self, step: int) -> None:
        values = {n: p.detach().clone() for n, p in self.parameters.items() if ".lora_E." in n}
        pattern = self.config.rank_pattern
        self._allocate(step)
        if self.config.rank_pattern is not pattern:
            kept = kept_ranks(self.adapted, DEFAULT_NAME)
            set_kept_ranks(self.adapted, DEFAULT_NAME, kept)
        for name, value in values.items():
            zeros = self.parameters[name] == 0
            if not torch.equal(self.parameters[name], value):  # the same on all workers
                master = self.handle.value(self.handle_names[name])
                self.handle.assign(self.handle_names[name], master.masked_fill(zeros, 0.0))

    def _allocate(self, step: int) -> None:
        """As PEFT documents it: after the optimizer's step, with the gradients still there."""
        before = {name: p.grad for name, p in self.parameters.items()}
        for name, gradient in self.gradients.items():
            self.parameters[name].grad = gradient.to(self.parameters[name].dtype)
        self.adapted.base_model.update_and_allocate(step)
        for name, gradient in before.items():
            self.parameters[name].grad = gradient
        self.gradients = {}

    def _set_scores(self, sensitivity: dict[str, Tensor], uncertainty: dict[str, Tensor]) -> None:
        """PEFT starts all three of a parameter anew where the first is missing."""
        self.allocator.ipt = {name: torch.zeros_like(t) for name, t in sensitivity.items()}
        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc = sensitivity, uncertainty

    def state(self) -> dict[str, Tensor]:
        parts = {
            "sensitivity": self.allocator.exp_avg_ipt,
            "uncertainty": self.allocator.exp_avg_unc,
            KEPT: kept_ranks(self.adapted, DEFAULT_NAME),
        }
        return {f"{part}/{name}": t for part, of in parts.items() for name, t in of.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"sensitivity": {}, "uncertainty": {}, KEPT: {}}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        device = next(iter(self.parameters.values())).device
        scores = [parts[part] for part in ("sensitivity", "uncertainty")]
        self._set_scores(*({n: t.to(device) for n, t in score.items()} for score in scores))
        if parts[KEPT]:
            set_kept_ranks(self.adapted, DEFAULT_NAME, parts[KEPT])


def initial_rank(plan: SharingPlan, config: AdapterConfig) -> int:
    return round(config.adalora.init_ratio * plan.groups[0].r)


def schedule(options: AdaLoraOptions, max_steps: int) -> tuple[int, int]:
    """Steps before pruning begins, and after it ended."""
    tinit = max_steps // 10 if options.tinit is None else options.tinit
    tfinal = max_steps // 2 if options.tfinal is None else options.tfinal
    return tinit, tfinal


def tie(adapted: Any, plan: SharingPlan, name: str) -> None:
    """Give the layers of each group the A, E and B of its first.

    And freeze the initial rank that PEFT (0.21) holds for the scale: on a base that is not in
    float32 it leaves it trainable.
    """
    layers = layers_of(adapted, plan)
    for layer in layers.values():
        layer.ranknum[name].requires_grad_(False)
    share_first(layers, plan, name, TRIPLET)


def kept_ranks(adapted: Any, name: str) -> dict[str, Tensor]:
    """Path of a layer → which of its ranks PEFT has not pruned; none before the first pruning."""
    pattern = adapted.peft_config[name].rank_pattern or {}  # saving takes ``name`` out of its keys
    return {
        key.removesuffix(f".{name}").removesuffix(".lora_E"): torch.tensor(kept)
        for key, kept in pattern.items()
    }


def set_kept_ranks(adapted: Any, name: str, kept: Mapping[str, Tensor]) -> None:
    """Tell PEFT, for every layer: by itself it notes the first of those that share a tensor."""
    suffix = f".lora_E.{name}"
    pattern: dict[str, list[bool]] = {}
    first: dict[Any, str] = {}
    for key, e in adapted.base_model.model.named_parameters(remove_duplicate=False):
        if key.endswith(suffix):
            layer = first.setdefault(e, key.removesuffix(suffix))
            pattern[key] = kept[layer].tolist()
    adapted.peft_config[name].rank_pattern = pattern
