"""BSLoRA (Zhou et al., 2025): beside local ranks, some that a layer and some that the model shares.

``y = W x + s (B_loc A_loc + B_intra A_intra + B_inter A_inter) x``. The local pair has the plan's
ranks and is shared by its groups, as LoRA's; the intra-layer pair serves all targets of a layer,
and the inter-layer pair all targets there are. In each A is random and B zero. As in the authors'
code one scale serves all three (2 there, whatever the ranks); here it is the plan's α/r.

One pair for targets of different shapes is what ``bslora.shapes`` makes of it:

* ``slice``: it is as large as the largest of them, and each takes the middle.
* ``gate``: it is square in `share_size`; every target has gates of rank 1 of its own, from x to it
  and from it to y. What is added then has rank 1, however many ranks are shared.
* ``kronecker``: it is square in `share_size`, which divides all sizes; every target has a vector of
  its own for A and one for B, and takes the Kronecker products.

All of it is linear in x, so each target is LoRA of rank r_k + intra_r + inter_r. Dropout is on all
parts; the authors leave it out before shared parts that are extended.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from e2lora.adapters.family import Factors, Family, Request, common_options, inject, layers_of
from e2lora.adapters.lora import RANK_DIM, shapes_and_groups
from e2lora.adapters.tensors import Composed
from e2lora.config import AdapterConfig
from e2lora.moments import Target
from e2lora.plan import SharingPlan

SHARED = ("intra", "inter")
SHARE_SIZES = {"gate": 1024, "kronecker": 256}
"""The authors' in and out of what is shared, where it isn't sliced."""

OWN = ("weight", "sampler", "up", "down")
"""What the parameters of a part are called, behind its name."""


class Joined(Composed):
    """A or B: local ranks, those of the layer and those of the model, side by side.

    Args:
        local: A (r_k × in) or B (out × r_k).
        dim: along which the rank lies, 0 for A and 1 for B.
    """

    def __init__(self, local: nn.Parameter, dim: int) -> None:
        super().__init__()
        self.local_weight, self.dim = local, dim

    def join(self, part: str, shared: nn.Parameter, fitting: dict[str, nn.Parameter]) -> None:
        """Give it ranks of ``part``, and what of its own fits them to its size: a ``sampler``, or
        gates ``up`` and ``down``, whose product is (size there × in) or (out × size there).
        """
        self.register_parameter(f"{part}_weight", shared)
        for name, parameter in fitting.items():
            self.register_parameter(f"{part}_{name}", parameter)

    def whole(self) -> Tensor:
        return torch.cat([self.local_weight, *map(self._fitted, SHARED)], self.dim)

    def _fitted(self, part: str) -> Tensor:
        shared: Tensor = getattr(self, f"{part}_weight")
        if hasattr(self, f"{part}_sampler"):
            return torch.kron(getattr(self, f"{part}_sampler"), shared)
        if hasattr(self, f"{part}_up"):
            up, down = getattr(self, f"{part}_up"), getattr(self, f"{part}_down")
            return shared @ up @ down if self.dim == 0 else up @ (down @ shared)
        size = self.local_weight.shape[1 - self.dim]
        return shared.narrow(1 - self.dim, (shared.shape[1 - self.dim] - size) // 2, size)


class BsLora(Family):
    """BSLoRA, with local ranks per layer or per group."""

    key = "bslora"
    unread_by_peft: ClassVar[tuple[str, ...]] = (
        ".local_weight",
        *(f".{part}_{name}" for part in SHARED for name in OWN),
    )
    shared_anyway = "all targets of BSLoRA"

    def require_fits(self, plan: SharingPlan, config: AdapterConfig) -> None:
        super().require_fits(plan, config)
        size = share_size(config)
        for target in plan.targets if config.bslora.shapes == "kronecker" else ():
            if target.in_features % size or target.out_features % size:
                raise ValueError(
                    "a Kronecker extension repeats what is shared a whole number of times, so its "
                    f"size must divide in and out of every target; got {size}, and {target.path} "
                    f"is {target.out_features} x {target.in_features}. Set `bslora.share_size` to "
                    "a divisor of all, or shapes='slice'."
                )

    def count(self, plan: SharingPlan, config: AdapterConfig) -> int:
        """Σ_k r_k (in + out), Σ of r (in + out) over what is shared, and what fits it to each."""
        local = sum(
            group.r * (in_features + out_features)
            for in_features, out_features, groups in shapes_and_groups(plan)
            for group in groups
        )
        shared = sum(
            ranks_of(config)[part] * sum(sizes)
            for (part, *_), sizes in shared_sizes(plan, config).items()
        )
        return local + shared + sum(_fitting_count(target, config) for target in plan.targets)

    def build(self, model: Any, request: Request) -> Any:
        adapted = inject(model, request.plan, self.peft_config(model, request), request.name)
        _join(adapted, request)
        return adapted

    def peft_config(self, model: Any, request: Request) -> Any:
        """PEFT's configuration of the same function: LoRA of all the ranks, at the plan's scale."""
        from peft import LoraConfig

        options = request.plan.options
        scale = options.lora_alpha / options.r ** (0.5 if options.use_rslora else 1)
        shared = sum(ranks_of(request.config).values())
        ranks = {path: g.r + shared for path, g in request.plan.group_of_target().items()}
        r = options.r + shared
        pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
        return LoraConfig(
            **common_options(model, request),
            r=r,
            lora_alpha=scale * r,
            rank_pattern=pattern,
            alpha_pattern={path: scale * rank for path, rank in pattern.items()},
            lora_dropout=request.config.lora_dropout,
        )

    def factors(self, layer: Any, name: str) -> Factors:
        return Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def ranks_of(config: AdapterConfig) -> dict[str, int]:
    """Of what is shared."""
    return {"intra": config.bslora.intra_r, "inter": config.bslora.inter_r}


def share_size(config: AdapterConfig) -> int:
    """In and out of what is shared, where it isn't sliced; else 0."""
    given = config.bslora.share_size
    return SHARE_SIZES.get(config.bslora.shapes, 0) if given is None else given


def owners_of(target: Target) -> dict[str, tuple[Any, ...]]:
    """Who holds the shared pairs of a target: its layer in its stack, and the model."""
    stack, _, _ = target.module_type.partition("*")
    return {"intra": ("intra", stack, target.layer), "inter": ("inter",)}


def shared_sizes(
    plan: SharingPlan, config: AdapterConfig
) -> dict[tuple[Any, ...], tuple[int, int]]:
    """(in, out) of each shared pair, by its owner."""
    size = share_size(config)
    sizes: dict[tuple[Any, ...], tuple[int, int]] = {}
    for target in plan.targets:
        for owner in owners_of(target).values():
            widest = sizes.get(owner, (0, 0))
            largest = max(widest[0], target.in_features), max(widest[1], target.out_features)
            sizes[owner] = (size, size) if size else largest
    return sizes


def _fitting_count(target: Target, config: AdapterConfig) -> int:
    """Parameters that fit the shared pairs to one target."""
    size, both = share_size(config), target.in_features + target.out_features
    each = {"slice": 0, "gate": both + 2 * size, "kronecker": both // max(size, 1)}
    return len(SHARED) * each[config.bslora.shapes]


def _join(adapted: Any, request: Request) -> None:
    """Put what is shared in the place of PEFT's A and B, of which local ranks take the values."""
    plan, name, config = request.plan, request.name, request.config
    layers, groups = layers_of(adapted, plan), plan.group_of_target()
    sizes, ranks = shared_sizes(plan, config), ranks_of(config)
    held: dict[tuple[str, Any], nn.Parameter] = {}
    for target in plan.targets:
        layer, group = layers[target.path], groups[target.path]
        for slot, dim in RANK_DIM.items():
            modules = getattr(layer, f"lora_{slot}")
            like = modules[name].weight.detach()
            if (slot, group) not in held:
                local = like.narrow(dim, 0, group.r)
                held[slot, group] = nn.Parameter(local.clone(memory_format=torch.contiguous_format))
            joined = Joined(held[slot, group], dim)
            for part, owner in owners_of(target).items():
                r, size = ranks[part], sizes[owner][dim]
                if (slot, owner) not in held:
                    shared = _drawn(r, size, like) if slot == "A" else like.new_zeros(size, r)
                    held[slot, owner] = nn.Parameter(shared)
                fitting = _fitting(config.bslora.shapes, dim, size, like)
                joined.join(part, held[slot, owner], fitting)
            modules[name] = joined


def _fitting(shapes: str, dim: int, size: int, like: Tensor) -> dict[str, nn.Parameter]:
    """What fits a shared A (r × size) or B (size × r) to ``like``, an A (… × in) or B (out × …).

    All of it starts as A does, as weights of linear layers.
    """
    own = like.shape[1 - dim]
    drawn = {
        "slice": {},
        "kronecker": {"sampler": (own // size, 1) if dim else (1, own // size)},
        "gate": {"up": ((size, own)[dim], 1), "down": (1, (own, size)[dim])},
    }[shapes]
    return {name: nn.Parameter(_drawn(*shape, like)) for name, shape in drawn.items()}


def _drawn(out_features: int, in_features: int, like: Tensor) -> Tensor:
    """A linear layer's weight as LoRA starts A: Kaiming uniform, a = √5."""
    bound = in_features**-0.5
    return like.new_empty(out_features, in_features).uniform_(-bound, bound)
