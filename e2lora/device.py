"""What a device must be able to do before anything is loaded onto it."""

from __future__ import annotations

import shutil

import torch

from e2lora.config import ModelConfig, TrainConfig
from e2lora.partitioned import import_deepspeed
from e2lora.quantized import require_bitsandbytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By precision: of base weights, and of what is computed."""

FIRST_WITH_BF16 = 8  # compute capability: Ampere; older GPUs emulate it


def require_device_can(training: TrainConfig, model: ModelConfig, device: torch.device) -> None:
    """Refuse what the device or the installed packages can't do.

    Raises:
        ValueError: with the reason.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "a worker with `gpus_per_worker` above 0 must see a GPU; torch sees none. Install a "
            "build of torch for this GPU, or set gpus_per_worker=0."
        )
    if training.precision == "fp16":
        _require_fp16(device)
    if training.precision == "bf16":
        _require_bf16(device)
    if training.torch_compile:
        _require_compiler(device)
    if model.quantization:
        require_bitsandbytes()


def _require_fp16(device: torch.device) -> None:
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"fp16 needs a device that computes in it; {_named(device)} doesn't. Use "
            "precision='bf16', which needs no scaling of the loss, or 'fp32'."
        )


def _require_bf16(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < FIRST_WITH_BF16:
        raise ValueError(
            f"bf16 needs a GPU of compute capability {FIRST_WITH_BF16}.0 or more; "
            f"{_named(device)}. Use precision='fp16' or 'fp32'."
        )


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError(
            "torch_compile needs a C++ compiler on CPU; neither g++ nor clang++ is there. Install "
            "one, or set torch_compile=False."
        )


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return f"this {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
