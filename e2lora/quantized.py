"""Bases whose linear layers hold four bits per weight: QLoRA's NF4, by bitsandbytes.

Dettmers et al., 2023: the weights are stored in sixteen levels, their scales quantised once more,
and both forward and backward compute with what they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from e2lora.config import TrialConfig

BLOCK = 64  # weights that have one scale


def require_bitsandbytes() -> None:
    """
    Raises:
        ValueError: the package isn't there.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "quantization='nf4' needs the package bitsandbytes; it isn't installed. "
            "`pip install 'e2lora[qlora]'` on every node, or leave `quantization` out."
        )


def require_can_train_quantised(config: TrialConfig, touches_base: bool) -> None:
    """Refuse what can't be trained on four bits, before anything is loaded.

    Args:
        touches_base: whether the adapter's family changes the base weights.

    Raises:
        ValueError: with the reason.
    """
    if config.model.quantization is None:
        return
    if touches_base:
        start = config.adapter.init_lora_weights
        told = f"family {config.adapter.family!r}" + (f", {start!r}" if start != "default" else "")
        raise ValueError(
            "quantised weights are frozen: what trains or changes the base's weights can't be had "
            f"with quantization={config.model.quantization!r}; got {told}. Leave `quantization` "
            "out, or use family 'lora' with init_lora_weights='default'."
        )


def nf4(dtype: torch.dtype, left_out: Sequence[str] = ()) -> Any:
    """transformers' description of it, computing in ``dtype``; ``left_out`` stays as it is."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(left_out) or None,
    )


def settle(model: Any, head: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
    """After loading: plain layers for a fresh head, of which transformers makes quantised ones.

    Raises:
        ValueError: a layer that isn't computed right.
    """
    for name, module in list(model.named_modules()):
        in_head = any(name == part or name.startswith(f"{part}.") for part in head)
        if in_head and is_quantised(module):
            bias = module.bias is not None
            plain = nn.Linear(module.in_features, module.out_features, bias, device, dtype)
            model.set_submodule(name, plain)
        elif is_quantised(module) and device.type == "cpu" and module.in_features % BLOCK:
            # bitsandbytes (0.50) takes scales of other blocks there
            raise ValueError(
                f"on CPU quantised layers must take a multiple of {BLOCK} inputs; {name} takes "
                f"{module.in_features}. Use a GPU, or leave `quantization` out."
            )
    keep_as_stored(model)


def keep_as_stored(model: nn.Module) -> None:
    """Let evaluation change no weights.

    On CPUs with bf16 instructions bitsandbytes (0.50) repacks them in place when it first computes
    without gradients: then they compute something else than in training, and layers fail whose
    sizes aren't multiples of 32.
    """
    layers: list[Any] = [module for module in model.modules() if is_quantised(module)]
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def quantisation_of(model: Any) -> Literal["nf4"] | None:
    """What a loaded model says of itself, where it is what :func:`nf4` describes."""
    described: Any = getattr(model.config, "quantization_config", None)
    kind = getattr(described, "bnb_4bit_quant_type", None)
    doubled = getattr(described, "bnb_4bit_use_double_quant", False)
    return "nf4" if kind == "nf4" and doubled and described.load_in_4bit else None


def is_quantised(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit" and isinstance(module, nn.Linear)


def scales_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a quantised weight is multiplied with, by name; nothing of a plain one.

    Without them two weights of which one is twice the other look the same.
    """
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield from state.as_dict(packed=True).items()
