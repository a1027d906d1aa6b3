"""LoRI (Zhang et al., 2025): random frozen A; B trained, in LoRI-S on its largest entries only.

LoRI-S is two trainings: a first one, LoRI-D, whose only purpose is the mask; and a second one that
starts where the first started, with B zero and an optimizer that knows nothing. Here both are
stages of one trial. The learning rate follows the trial's one schedule over both, times
``masked_lr_ratio`` in the second: few entries have to do what all did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from e2lora.adapters.family import Handle, Hooks, Request, inject, layers_of
from e2lora.adapters.lora import FrozenALora, tie
from e2lora.adapters.tensors import MaskedLinear, pack_bits, unpack_bits
from e2lora.config import AdapterConfig, LoriOptions, TrainConfig, TrialConfig


class Lori(FrozenALora):
    """LoRI-D, and LoRI-S with ``lori.mask_after``.

    The count is that of the first stage, r·So (B at interval scope: Σ r_k·out), which is what an
    optimizer must hold. Of these LoRI-S trains the share ``lori.keep`` in its second stage; the
    others are zero, and are not stored.
    """

    key = "lori"

    def require_trains(self, config: TrialConfig) -> None:
        super().require_trains(config)
        mask_after, training = config.adapter.lori.mask_after, config.training
        if mask_after is None:
            return
        if mask_after >= training.num_steps:
            raise ValueError(
                "LoRI-S needs steps after its mask: `lori.mask_after` must be below max_steps; got "
                f"{mask_after} and {training.num_steps}. Half of max_steps gives both stages the "
                "same."
            )
        if training.zero_stage == 3:
            raise ValueError(
                "LoRI-S masks whole tensors B, which ZeRO stage 3 partitions; got zero_stage=3. "
                "Use stage 2, or LoRI-D (no `lori.mask_after`)."
            )

    def left_to_the_loop(self, config: AdapterConfig) -> str:
        after = config.lori.mask_after
        return "" if after is None else f"B is to be masked after {after} steps"

    def build(self, model: Any, request: Request) -> Any:
        if request.config.lori.mask_after is None:
            return super().build(model, request)
        adapted = inject(model, request.plan, self.peft_config(model, request), request.name)
        for layer in layers_of(adapted, request.plan).values():
            layer.lora_B[request.name] = MaskedLinear(layer.lora_B[request.name])
        tie(adapted, request, freeze_a=True)  # after: so that slices are of masked tensors
        return adapted

    def hooks(
        self, adapted: Any, config: AdapterConfig, training: TrainConfig, handle: Handle
    ) -> Hooks:
        mask_after = config.lori.mask_after
        if mask_after is None:
            return Hooks()
        return LoriHooks(adapted, mask_after, config.lori, handle)

    def pack(self, tensors: dict[str, Tensor], adapted: Any, name: str) -> dict[str, Tensor]:
        """Of each B its unmasked entries, in order, and the mask, a bit per entry."""
        packed = dict(tensors)
        for b, module in _masked(adapted, name):
            packed[b] = tensors[b][module.mask.cpu()]
            packed[_mask_of(b)] = pack_bits(module.mask)
        return packed

    def unpack(
        self,
        stored: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        adapted: Any,
        name: str,
    ) -> dict[str, Tensor]:
        tensors = dict(stored)
        for b, module in _masked(adapted, name):
            if b not in stored or _mask_of(b) not in stored:
                continue  # a damaged folder: whoever compares names will say so
            mask = unpack_bits(tensors.pop(_mask_of(b)), shapes[b])
            tensors[b] = torch.zeros(shapes[b], dtype=stored[b].dtype)
            tensors[b][mask] = stored[b]
            module.mask.copy_(mask)
        return tensors


class LoriHooks(Hooks):
    """After step ``mask_after``: choose the mask, and start again with nothing else."""

    def __init__(self, adapted: Any, mask_after: int, options: LoriOptions, handle: Handle) -> None:
        self.mask_after, self.options, self.handle = mask_after, options, handle
        self.start = {
            name: parameter.detach().clone()
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad
        }
        self.modules = {
            f"{path}.weight": module
            for path, module in adapted.named_modules()
            if isinstance(module, MaskedLinear)
        }
        self.is_masked = False

    def after_step(self, step: int) -> None:
        if step != self.mask_after:
            return
        masks = largest([self.handle.value(name) for name in self.modules], self.options.keep)
        for module, mask in zip(self.modules.values(), masks, strict=True):
            module.mask.copy_(mask)
        for name, value in self.start.items():  # B at zero; a head as it was
            self.handle.assign(name, value)
        self.handle.restart_optimizer()
        self._go_on_masked()

    def _go_on_masked(self) -> None:
        self.is_masked = True
        self.handle.learning_rate_scale = self.options.masked_lr_ratio

    def state(self) -> dict[str, Tensor]:
        return {name: module.mask for name, module in self.modules.items() if self.is_masked}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, mask in state.items():
            self.modules[name].mask.copy_(mask)
        if state:
            self._go_on_masked()


def largest(tensors: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks of the entries that are among the ``share`` largest magnitudes of all tensors.

    Of equal ones at the limit the first are taken, in the order of tensors and entries; at least
    one entry is.
    """
    magnitudes = torch.cat([tensor.detach().float().cpu().abs().flatten() for tensor in tensors])
    number = max(1, round(share * len(magnitudes)))
    chosen = torch.zeros(len(magnitudes), dtype=torch.bool)
    chosen[magnitudes.argsort(descending=True, stable=True)[:number]] = True
    parts = chosen.split([tensor.numel() for tensor in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _masked(adapted: Any, name: str) -> Iterator[tuple[str, MaskedLinear]]:
    """The masked tensors of adapter ``name``, each once, by their stored names."""
    for path, module in adapted.get_base_model().named_modules():
        owner, _, last = path.rpartition(".")
        if isinstance(module, MaskedLinear) and last == name:
            yield f"{owner}.weight", module


def _mask_of(stored: str) -> str:
    return stored.removesuffix("weight") + "mask"
