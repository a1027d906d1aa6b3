"""RaLoRA (Ye et al., 2026): blocks along the diagonal, as many as the gradient has dimensions for.

A group's adapter is n blocks of rank r, each from in/n inputs to out/n outputs: r (in + out)
parameters as LoRA's, whatever n, but rank n·r. With erank(G) the effective rank of the group's
gradient (Roy & Vetterli, 2007), the exponential of the entropy of its normalised singular values,

    n = 2^⌊log₂(erank(G) / r)⌋, at least 1, at most `max_blocks`, and a divisor of in and out.

In each block A is random and B zero; the scale is LoRA's at rank r. A group that layers share has
one n, by the sum of their gradients. What is trained are the blocks alone, one below the other: A
as (n·r × in/n) and B as (out × r). Only n needs gradients, so it is stored beside them.

The authors also allocate r by the importance of each layer, as GoRA does; that isn't here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from e2lora.adapters.family import Request, first_targets, layers_of, require_gradients
from e2lora.adapters.lora import Lora
from e2lora.adapters.tensors import Composed
from e2lora.moments import Target
from e2lora.partitioned import told_by_first
from e2lora.plan import SharingPlan

NUM_BLOCKS = "num_blocks"
"""The end of the stored name of a group's n, under the path of its first layer."""

ROUNDING = 1e-6
"""Of log₂ erank: equal singular values must not make less of a power of two by rounding."""


class BlockDiagonal(Composed):
    """A (n·r × in) or B (out × n·r) that is zero but for n blocks along its diagonal.

    Args:
        blocks: one below the other: (n·r × in/n) or (out × r).
        num_blocks: n.
    """

    def __init__(self, blocks: Tensor, num_blocks: int) -> None:
        super().__init__()
        self.blocks, self.num_blocks = nn.Parameter(blocks), num_blocks

    def whole(self) -> Tensor:
        return torch.block_diag(*self.blocks.chunk(self.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.num_blocks, -1))
        blocks = self.blocks.unflatten(0, (self.num_blocks, -1))
        return torch.einsum("...ni,noi->...no", parts, blocks).flatten(-2)


class RaLora(Lora):
    key = "ralora"
    initialisations = ("default",)
    scopes = ("interval",)
    no_allocation = "the gradients that it starts from decide its rank, by the number of its blocks"
    needs_gradients = True
    unread_by_peft: ClassVar[tuple[str, ...]] = (".blocks",)

    def build(self, model: Any, request: Request) -> Any:
        if request.initial is None:
            require_gradients(self.name, request)
        adapted = super().build(model, request)
        _split(adapted, request)
        return adapted

    def initial(self, adapted: Any, name: str) -> dict[str, Tensor]:
        """n of every group, under the path of its first layer."""
        return {
            f"{path.removesuffix(f'.lora_A.{name}')}.{NUM_BLOCKS}": torch.tensor(module.num_blocks)
            for path, module in adapted.get_base_model().named_modules()
            if isinstance(module, BlockDiagonal) and path.endswith(f".lora_A.{name}")
        }


def effective_rank(gradient: Tensor) -> float:
    """exp(−Σ p ln p) of the singular values over their sum, p.

    >>> round(effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))), 4)
    3.0

    Raises:
        ValueError: a gradient that is zero or not finite.
    """
    values = torch.linalg.svdvals(gradient.float()) if gradient.isfinite().all() else None
    if values is None or not values.any():
        raise ValueError(
            "RaLoRA counts the dimensions of a gradient, so it must be finite and not zero; got "
            f"one of mean {float(gradient.mean()):g}. Measure on other or on more samples."
        )
    shares = values.double() / values.double().sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def num_blocks(erank: float, r: int, target: Target, max_blocks: int) -> int:
    """n: the power of two that fits the effective rank, the sizes and the limit."""
    fitting = max(0, math.floor(math.log2(erank / r) + ROUNDING))
    sizes = math.gcd(target.in_features, target.out_features)
    dividing = (sizes & -sizes).bit_length() - 1
    return int(2 ** min(fitting, dividing, int(math.log2(max_blocks))))


def _split(adapted: Any, request: Request) -> None:
    """Make blocks of the A and B that PEFT made at rank r, and describe them as it would."""
    plan, name = request.plan, request.name
    layers, groups, first = layers_of(adapted, plan), plan.group_of_target(), first_targets(plan)
    config = adapted.peft_config[name]
    split: dict[Any, tuple[int, list[BlockDiagonal]]] = {}
    for path, group in groups.items():
        layer = layers[path]
        if group not in split:
            n = _chosen(first[path], group.r, layer, request)
            a, b = (getattr(layer, slot)[name].weight.detach() for slot in ("lora_A", "lora_B"))
            # a block's A is random as is that of a layer with in/n inputs
            a = (a * math.sqrt(n)).reshape(n * group.r, -1)
            split[group] = n, [BlockDiagonal(tensor, n) for tensor in (a, b)]
        n, modules = split[group]
        layer.lora_A[name], layer.lora_B[name] = modules
        growth = math.sqrt(n) if plan.options.use_rslora else n
        layer.r[name] *= n
        layer.lora_alpha[name] *= growth
    _describe(config, plan, {path: layers[path] for path in groups}, name)


def _chosen(target: Target, r: int, layer: Any, request: Request) -> int:
    """n of the group whose first target this is."""
    if request.initial is not None:
        return _kept(target, request.initial)
    assert request.gradients is not None
    base = layer.get_base_layer().weight
    erank = effective_rank(request.gradients[target.path].to(base.device))
    n = num_blocks(erank, r, target, request.config.ralora.max_blocks)
    return int(told_by_first(torch.tensor(n, device=base.device), base))


def _kept(target: Target, initial: Mapping[str, Tensor]) -> int:
    """n of an earlier adapter of the same plan."""
    kept = initial.get(f"{target.path}.{NUM_BLOCKS}")
    n = 0 if kept is None else int(kept)
    if n < 1 or target.in_features % n or target.out_features % n:
        raise ValueError(
            "the numbers of blocks that RaLoRA chose must be there to be taken again, and divide "
            f"in and out; for {target.path} ({target.out_features} x {target.in_features}) there "
            f"is {n or 'none'}. The folder or checkpoint is damaged: take another copy."
        )
    return n


def _describe(config: Any, plan: SharingPlan, layers: Mapping[str, Any], name: str) -> None:
    """PEFT's configuration of the same scales at ranks n·r."""
    config.rank_pattern = {f"^{re.escape(p)}": layer.r[name] for p, layer in layers.items()}
    config.alpha_pattern = {
        f"^{re.escape(p)}": layer.lora_alpha[name] for p, layer in layers.items()
    }
