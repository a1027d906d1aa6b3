"""Which implementation of attention a model gets: the fastest one that is to be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)
FLASH = "flash_attention_2"


def available_attention(
    model_class: Any, device: torch.device, dtype: torch.dtype
) -> tuple[str, ...]:
    """Names of transformers' implementations, the fastest first.

    Args:
        model_class: that will be built, which says what it supports.
        dtype: of the weights.
    """
    from transformers.utils import is_flash_attn_2_available

    on_gpu = device.type == "cuda"
    offered = {
        FLASH: on_gpu
        and dtype in HALVES
        and getattr(model_class, "_supports_flash_attn", False)
        and is_flash_attn_2_available(),
        "sdpa": getattr(model_class, "_supports_sdpa", False),
        "eager": True,
        "flex_attention": on_gpu and getattr(model_class, "_supports_flex_attn", False),
    }
    return tuple(name for name, is_there in offered.items() if is_there)


def choose_attention(
    wanted: str | None, model_class: Any, device: torch.device, dtype: torch.dtype
) -> str:
    """``wanted``, or the fastest one.

    Raises:
        ValueError: ``wanted`` isn't to be had; the message lists what is.
    """
    there = available_attention(model_class, device, dtype)
    if wanted is None:
        return there[0]
    if wanted not in there:
        narrow = str(dtype).removeprefix("torch.")
        raise ValueError(
            "`attn_implementation` must be one that the model, the installed packages, the device "
            f"and the precision allow; got {wanted!r}, and for {model_class.__name__} on "
            f"{device.type} in {narrow} there is {', '.join(there)}. Name one of them, or None for "
            "the first."
        )
    return wanted


def class_to_build(auto_class: Any, model_config: Any) -> Any:
    """The model class that an ``Auto…`` class takes for a configuration; None: code of its own."""
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return auto_class  # a model's class itself
    found = mapping.get(type(model_config), None)
    return found[0] if isinstance(found, tuple | list) else found


@contextmanager
def attention_for_float32(model: nn.Module) -> Iterator[None]:
    """Flash attention computes in half precision only; for a while something else takes over."""
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if chosen != FLASH:
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # type: ignore
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)  # type: ignore
