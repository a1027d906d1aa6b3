"""What an export computes, against what the adapter does: on a random batch, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from e2lora.models import in_float32

MUCH, NEARLY_ALL = 0.05, 0.9
"""Shares of what the adapter does: from which on it is told that they are lost, or refused."""


@dataclass(frozen=True)
class Change:
    """Between the outputs of two models on one batch."""

    largest: float
    root_mean_square: float

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> Change:
        change = found - expected
        return cls(float(change.abs().max()), float(change.square().mean().sqrt()))


@dataclass(frozen=True)
class Comparison:
    """``effect``: of the adapter on its base, whose head is the trained one; ``difference``:
    between what was written and the adapter.
    """

    effect: Change
    difference: Change

    @property
    def lost(self) -> float:
        """The share of the adapter's effect that isn't in what was written."""
        if not self.difference.root_mean_square:
            return 0.0
        return self.difference.root_mean_square / (self.effect.root_mean_square or float("nan"))


def random_batch(model: Any) -> dict[str, Tensor] | None:
    """Inputs of text, images or both, the same every time; None where it takes others."""
    generator = torch.Generator().manual_seed(0)
    config, inputs = model.config, {}
    takes = model.main_input_name
    vision = getattr(config, "vision_config", None) or (config if takes == "pixel_values" else None)
    if takes == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        inputs["input_ids"] = torch.randint(vocabulary, (4, 16), generator=generator)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :8]
    if vision is not None and hasattr(vision, "image_size"):
        size = vision.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        inputs["pixel_values"] = torch.randn(4, vision.num_channels, *sides, generator=generator)
    return inputs or None


def output_of(model: Any, batch: dict[str, Tensor] | None) -> Tensor:
    if batch is None:
        return torch.empty(0)
    with torch.no_grad(), _in_float32(model):
        return model(**batch)[0].double()


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """:func:`e2lora.models.in_float32`, and buffers too: frozen projections are some."""
    narrow = [(b, b.dtype) for b in model.buffers() if b.dtype in (torch.bfloat16, torch.half)]
    with in_float32(model):
        for buffer, _ in narrow:
            buffer.data = buffer.data.float()
        try:
            yield
        finally:
            for buffer, dtype in narrow:
                buffer.data = buffer.data.to(dtype)


def judge(comparison: Comparison, size: float, rounded: str, started: str) -> list[str]:
    """Returns warnings.

    Args:
        size: of the largest output.
        rounded: the type that weights of the export were rounded to.
        started: the type that weights were rounded to when the adapter took its start from them.

    Raises:
        ValueError: more differs than rounding explains, or as much as the adapter does.
    """
    difference, lost = comparison.difference, comparison.lost
    explained = _eps(rounded) ** 0.5 * size
    has_effect = comparison.effect.largest > _eps(started) ** (2 / 3) * size
    if not (has_effect and rounded != "float32") and not difference.largest <= explained:
        raise ValueError(
            "an export must compute what the adapter does; on a random batch its outputs differ "
            f"by up to {difference.largest:.2g}, where rounding of {rounded} explains "
            f"{explained:.2g}. Nothing was written. Please report it, with the adapter's "
            "e2lora.json."
        )
    if not has_effect:
        return []
    told = f"rounding to {rounded} loses {lost:.0%} of what the adapter does"
    if rounded != "float32":
        told += ": merge in float32 by --form merged --dtype float32"
    if not lost < NEARLY_ALL:
        raise ValueError(
            "an export must be nearer to the adapter than the base model is; on a random batch "
            f"{told}. Nothing was written."
        )
    return [told] if lost > MUCH else []


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps
