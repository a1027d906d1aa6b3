"""Adapters that start at a value, not at zero: what they start from is taken out of the base.

PiSSA, OLoRA and LoRA-GA choose A₀ and B₀ and put ``W − s·B₀A₀`` in the place of W, so that nothing
changes before training. PEFT chooses; here the product is taken out of every layer that shares the
pair, as it is after rounding to the weights' type, so that the same pair does the same again.

A₀ and B₀ are kept beside A and B. On the *original* W such an adapter is LoRA of rank 2r, with
[A; A₀] and [B, −B₀]: that is its state dict, and what PEFT's configuration describes. So what
``save_pretrained`` writes is right on a base that was never touched. With the adapter disabled or
unloaded, what remains is ``W − s·B₀A₀``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from e2lora.adapters.family import Request, base_layer, layers_of
from e2lora.partitioned import gathered, told_by_first
from e2lora.plan import SharingPlan
from e2lora.targets import is_transposed

PAIR = ("lora_A", "lora_B")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Started(nn.Linear):
    """A or B that started at ``initial``; its state dict holds [A; A₀] or [B, −B₀].

    Args:
        initial: A₀ (r × in) or B₀ (out × r).
        dim: along which the rank lies, 0 for A and 1 for B.
    """

    initial: Tensor

    def __init__(self, initial: Tensor, dim: int) -> None:
        out_features, in_features = initial.shape
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(initial.clone())
        self.register_buffer("initial", initial, persistent=False)
        self.dim = dim

    @property
    def on_original(self) -> Tensor:
        """The factor (rank 2r) on a base that was never touched."""
        return torch.cat([self.weight, self._taken], self.dim)

    @property
    def _taken(self) -> Tensor:
        return self.initial if self.dim == 0 else -self.initial

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        whole = self.on_original
        destination[f"{prefix}weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        name = f"{prefix}weight"
        given, wanted = state_dict.get(name), self.on_original
        if given is None:
            missing.append(name)
        elif given.shape != wanted.shape:
            shapes = f"{tuple(given.shape)} given, {tuple(wanted.shape)} wanted"
            errors.append(f"size mismatch for {name}: {shapes}")
        else:
            weight, taken = given.chunk(2, self.dim)
            if not torch.equal(taken.to(self._taken), self._taken):
                errors.append(f"{name} started elsewhere: what it took from the base differs")
                return
            with torch.no_grad():
                self.weight.copy_(weight)


def start(adapted: Any, request: Request, choose: Callable[[Any, str], None]) -> None:
    """Give the layers of each group their A and B, and take B₀A₀ out of the weight of each.

    Args:
        choose: (layer, path) → sets A and B of PEFT's layer from its weight, which lies as
            (out × in) in every kind of module, and is a copy.

    Raises:
        ValueError: an initial pair that isn't there.
    """
    layers, name = layers_of(adapted, request.plan), request.name
    sharers: dict[Any, list[str]] = {}
    for path, group in request.plan.group_of_target().items():
        sharers.setdefault(group, []).append(path)
    pairs = [  # all of them, before any weight is changed: what fails leaves them as they were
        _chosen(layers[paths[0]], paths[0], name, choose)
        if request.initial is None
        else _kept(layers[paths[0]], paths, name, request.initial)
        for paths in sharers.values()
    ]
    for paths, pair in zip(sharers.values(), pairs, strict=True):
        started = [Started(tensor, dim) for dim, tensor in enumerate(pair)]
        for path in paths:
            for slot, module in zip(PAIR, started, strict=True):
                getattr(layers[path], slot)[name] = module
            _take_out(layers[path], name, *pair)
    _describe_on_original(adapted.peft_config[name])


def initial_tensors(adapted: Any, name: str) -> dict[str, Tensor]:
    """A₀ and B₀ of every group, under the path of its first layer."""
    return {
        path.removesuffix(f".{name}"): module.initial
        for path, module in adapted.get_base_model().named_modules()
        if isinstance(module, Started) and path.endswith(f".{name}")
    }


def require_floats(model: Any, plan: SharingPlan) -> None:
    """Weights that something can be taken out of.

    Raises:
        ValueError: others, as quantised ones are.
    """
    for target in plan.targets:
        dtype = base_layer(model, target.path).weight.dtype
        if dtype not in FLOATS:
            raise ValueError(
                "an adapter that starts at a value changes the weights of its base, so they must "
                f"be float32, bfloat16 or float16; {target.path} holds {dtype}. Load the model "
                "without quantisation, or use family 'lora' with init_lora_weights='default'."
            )


def _chosen(layer: Any, path: str, name: str, choose: Callable[[Any, str], None]) -> list[Tensor]:
    """A₀ and B₀ as PEFT chooses them, in float32, rounded to the type of the weights.

    Of a partitioned weight they are those of the first worker: singular vectors may differ.
    """
    weight = layer.get_base_layer().weight
    with gathered([weight]), _copied_weight(layer), torch.no_grad():
        choose(layer, path)
    tensors = [getattr(layer, slot)[name].weight.detach() for slot in PAIR]
    rounded = (tensor.to(weight.dtype).float().contiguous() for tensor in tensors)
    return [told_by_first(tensor, weight) for tensor in rounded]


@contextmanager
def _copied_weight(layer: Any) -> Iterator[None]:
    """A copy in the place of the base weight, (out × in): PEFT changes it in ways of its own.

    Of its initialisations OLoRA takes no account of weights that lie transposed, nor LoRA-GA of
    their number of rows.
    """
    base = layer.get_base_layer()
    held, lies_transposed = base.weight.data, layer.fan_in_fan_out
    base.weight.data = (held.T if is_transposed(base) else held).clone()
    layer.fan_in_fan_out = False
    try:
        yield
    finally:
        base.weight.data, layer.fan_in_fan_out = held, lies_transposed


def _kept(
    layer: Any, paths: Sequence[str], name: str, initial: Mapping[str, Tensor]
) -> list[Tensor]:
    """A₀ and B₀ of an earlier adapter, stored under the path of one of the layers."""
    pair = []
    for slot in PAIR:
        stored = next((initial[k] for p in paths if (k := f"{p}.{slot}") in initial), None)
        own = getattr(layer, slot)[name].weight
        if stored is None or stored.shape != own.shape:
            found = "nothing" if stored is None else f"a tensor {tuple(stored.shape)}"
            raise ValueError(
                "what an adapter took from its base must be there to be taken again; "
                f"{paths[0]}.{slot} {tuple(own.shape)} finds {found}. The folder or checkpoint is "
                "damaged: take another copy."
            )
        pair.append(stored.detach().to(own.device, torch.float32, copy=True))
    return pair


@torch.no_grad()
def _take_out(layer: Any, name: str, a: Tensor, b: Tensor) -> None:
    """``W − s·B₀A₀``, computed in float32 as LoRA-GA does in PEFT."""
    base = layer.get_base_layer()
    part = layer.scaling[name] * (b @ a)
    with gathered([base.weight], write=True):
        base.weight.copy_(base.weight.float() - (part.T if is_transposed(base) else part))


def _describe_on_original(config: Any) -> None:
    """PEFT's configuration of the same scale at twice the ranks."""
    growth = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= growth
    config.rank_pattern = {path: 2 * r for path, r in config.rank_pattern.items()}
    config.alpha_pattern = {path: growth * alpha for path, alpha in config.alpha_pattern.items()}
