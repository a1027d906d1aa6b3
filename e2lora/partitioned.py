"""Weights that are spread over all workers, as ZeRO stage 3 has them: each holds a part of each.

A parameter of such a model is empty until it is gathered; ``ds_shape``, ``ds_numel`` and
``ds_tensor`` (this worker's part, flat, filled up to equal lengths) tell what it is. Whatever
gathers is collective: all workers must do it, in one order. On a plain model everything here does
nothing, and DeepSpeed isn't imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from e2lora.config import GroupSpec


def import_deepspeed() -> Any:
    """DeepSpeed, made quiet and quick to start.

    Its first ZeRO engine imports an optimizer decorated with ``torch.compile``, which pulls in
    inductor (seconds), and on CPU it compiles an operator for shared memory (minutes); neither
    is used here.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    return deepspeed


# ---- loading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partitioning:
    """How a model is spread over the workers while it is loaded.

    Args:
        dtype: of its weights.
        offload: whether the parts lie in main memory, and not on the device that computes.
    """

    dtype: torch.dtype
    offload: bool = False

    @classmethod
    def of(cls, spec: GroupSpec, dtype: torch.dtype) -> Partitioning | None:
        """What a worker group needs; None below stage 3."""
        return cls(dtype, spec.offload_parameters) if spec.zero_stage == 3 else None

    def deepspeed_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": 3, "memory_efficient_linear": False}  # see frugal_linears
        if self.offload:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "fp16": {"enabled": self.dtype == torch.float16},
        }


@contextmanager
def partitioning_weights(how: Partitioning | None) -> Iterator[None]:
    """Within, ``from_pretrained`` spreads each parameter as soon as it is made.

    Weights are read by the first worker alone, module by module; safetensors are mapped into
    memory, so that no worker ever holds them all. Collective.
    """
    if how is None:
        yield
        return
    require_workers()
    with _told_to_transformers(how.deepspeed_config()):
        yield


def partition(model: nn.Module, how: Partitioning) -> None:
    """Spread the weights of a model that every worker has loaded. Collective."""
    require_workers()
    import_deepspeed().zero.Init(module=model, config_dict_or_path=how.deepspeed_config())


def require_workers() -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "weights are partitioned among the workers of a process group, and there is none. "
            "Call torch.distributed.init_process_group first."
        )
    deepspeed = import_deepspeed()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)


@contextmanager
def _told_to_transformers(config: dict[str, Any]) -> Iterator[None]:
    """transformers and PEFT ask a configuration of the whole process whether this is stage 3."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def known_to_peft(model: nn.Module) -> Iterator[None]:
    """Within, PEFT gathers what it reads of a partitioned model's weights."""
    if not is_partitioned(model):
        yield
        return
    import_deepspeed()
    with _told_to_transformers({"zero_optimization": {"stage": 3}}):
        yield


# ---- one parameter ----------------------------------------------------------------------------


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter of which each worker has a part."""
    return hasattr(tensor, "ds_tensor")


def is_partitioned(model: nn.Module) -> bool:
    return any(is_part(parameter) for parameter in model.parameters())


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Of the whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def numel_of(tensor: Any) -> int:
    """Of the whole."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def bytes_held(tensor: Any) -> int:
    """By this worker."""
    return int(tensor.ds_tensor.nbytes if is_part(tensor) else tensor.nbytes)


def own_part(parameter: Any) -> tuple[int, Tensor]:
    """Where this worker's part begins in the flat whole, and its entries without the filling."""
    held = parameter.ds_tensor.detach()
    first = min(held.numel() * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return first, held[: parameter.ds_numel - first]


def part_of(parameter: Any, value: Tensor) -> Tensor:
    """What of a whole value this worker holds: flat, and filled up with zeros."""
    size = parameter.ds_tensor.numel()
    world = dist.get_world_size(parameter.ds_process_group)
    flat = F.pad(value.detach().reshape(-1), (0, size * world - value.numel()))
    return flat.narrow(0, size * dist.get_rank(parameter.ds_process_group), size)


def recast(parameter: Any, dtype: torch.dtype) -> None:
    """Hold a parameter in another type, here and wherever parts of it are gathered."""
    parameter.data = parameter.data.to(dtype)
    if is_part(parameter):
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)


def move(model: Any, device: torch.device) -> None:
    """``model.to(device)``, and a partitioned model's parts with it.

    Where these lie in main memory by choice, and not where their model computes, all stays.
    """
    parts: list[Any] = [parameter for parameter in model.parameters() if is_part(parameter)]
    if any(part.ds_tensor.device != part.device for part in parts):
        return
    model.to(device)
    for part in parts:
        part.ds_tensor.data = part.ds_tensor.data.to(device)


@contextmanager
def gathered(parameters: Iterable[Any], write: bool = False) -> Iterator[None]:
    """Parameters are whole within. Collective.

    Args:
        write: keep what was written into them: by the first worker, for all.
    """
    parts = [parameter for parameter in parameters if is_part(parameter)]
    if not parts:
        yield
        return
    zero = import_deepspeed().zero
    with zero.GatheredParameters(parts, modifier_rank=0 if write else None):
        yield


def added_over_workers(tensor: Tensor, like: Any) -> Tensor:
    """The sum over all workers of a partitioned parameter ``like``. Collective."""
    total = tensor.to(like.device, copy=True)
    dist.all_reduce(total, group=like.ds_process_group)
    return total


def told_by_first(tensor: Tensor, like: Any) -> Tensor:
    """The first worker's tensor on every worker of a partitioned parameter ``like``; else itself.

    Collective.
    """
    if is_part(like):
        group = like.ds_process_group
        dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor
