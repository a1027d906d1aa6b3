"""The DeepSpeed engine of one trial: its configuration, its start, and its optimizer state.

DeepSpeed's own optimizer checkpoints are bound to the number of workers. An adapter's optimizer
state is small, so it is gathered to full tensors by name and scattered again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from e2lora.adapters import FAMILIES, is_head, trainable_parameters
from e2lora.adapters.family import Handle
from e2lora.config import AdapterConfig, TrainConfig

ADAM_STATE = ("exp_avg", "exp_avg_sq")


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


def deepspeed_config(training: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours alone."""
    share = training.num_workers * training.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": training.global_batch_size // share,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": {"stage": training.zero_stage},
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def learning_rate_factor(training: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at optimiser step ``step`` (from 0): warmup, then decay."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    span = training.max_steps - training.warmup_steps
    progress = (step - training.warmup_steps) / span
    if training.schedule == "linear":
        return 1.0 - progress
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def peak_learning_rate(
    name: str, model: Any, adapter: AdapterConfig, training: TrainConfig
) -> float:
    """Of a model's parameter by its name, before the schedule."""
    if is_head(name, model):
        return training.head_learning_rate or training.learning_rate
    family = FAMILIES[adapter.family]
    return training.learning_rate * family.learning_rate_ratio(name, adapter)


def adapter_buffers(model: Any) -> Iterator[Tensor]:
    """Frozen projections and the like, in PEFT's layers beside the base's own.

    In bf16 DeepSpeed (0.19) casts parameters only: right for a model's buffers, such as rotary
    frequencies, but what adapters multiply with their parameters must be of their type.
    """
    for layer in model.modules():
        if hasattr(layer, "adapter_layer_names"):
            for name, part in layer.named_children():
                if name != "base_layer":
                    yield from (b for b in part.buffers() if b.is_floating_point())


class Engine(Handle):
    """``deepspeed.initialize`` around an adapted model, one per trial."""

    def __init__(self, model: Any, adapter: AdapterConfig, training: TrainConfig) -> None:
        self.training = training
        self.parameters = trainable_parameters(model)
        by_rate: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            peak = peak_learning_rate(name, model, adapter, training)
            by_rate.setdefault((peak, is_head(name, model)), []).append(parameter)
        groups = [
            {"params": parameters, "lr": peak, "peak": peak, "head": head}
            for (peak, head), parameters in by_rate.items()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
        self._engine, *_ = import_deepspeed().initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(training),
            dist_init_required=False,
        )
        if training.precision == "bf16":
            for buffer in adapter_buffers(model):
                buffer.data = buffer.data.bfloat16()
        self._adam = optimizer

    @property
    def module(self) -> Any:
        return self._engine

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def backward(self, loss: Tensor) -> None:
        """Of one microbatch; DeepSpeed averages over microbatches and workers."""
        self._engine.backward(loss)

    def micro_step(self, step: int) -> None:
        """After each backward; the last one of a step updates, at the learning rate of ``step``."""
        factor = learning_rate_factor(self.training, step)
        for group in self._engine.optimizer.param_groups:
            scale = 1.0 if group["head"] else self.learning_rate_scale
            group["lr"] = group["peak"] * factor * scale
        self._engine.step()

    def gradient(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(self.parameters[name])
        if gradient is None:
            raise RuntimeError(f"{name} has no gradient after backward: does the loss reach it?")
        return gradient.detach().float().clone()

    def value(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.parameters[name]
        partitioned = self._partitioned(parameter)
        full = safe_get_full_fp32_param(parameter) if partitioned else parameter
        return full.detach().float().clone()

    def assign(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter = self.parameters[name]
        parameter.data.copy_(value)
        if self._partitioned(parameter):
            safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def restart_optimizer(self) -> None:
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()

    def gather(self) -> dict[str, Tensor]:
        """Full float32 parameters and Adam moments by name, on CPU. Collective: all must call."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_partitions()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if self._partitioned(parameter):
                full = safe_get_full_fp32_param(parameter)
                state = {k: safe_get_full_optimizer_state(parameter, k) for k in ADAM_STATE}
            else:
                full, none = parameter.detach(), torch.zeros_like(parameter)
                # a weight that the loss doesn't reach has no moments
                state = {k: self._adam.state[parameter].get(k, none) for k in ADAM_STATE}
            tensors[f"parameter/{name}"] = full
            tensors |= {f"{key}/{name}": state[key] for key in ADAM_STATE}
        tensors["adam_steps"] = next(s["step"] for s in self._adam.state.values() if s)
        return {key: value.detach().float().cpu().clone() for key, value in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`gather`, on any number of workers."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for group in self._adam.param_groups:
            for held in group["params"]:  # under ZeRO: this worker's flat partitions
                self._adam.state[held] = {
                    "step": tensors["adam_steps"].clone(),
                    **{key: torch.zeros_like(held) for key in ADAM_STATE},
                }
        self._link_partitions()
        for name, parameter in self.parameters.items():
            self.assign(name, tensors[f"parameter/{name}"])
            state = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ADAM_STATE}
            if self._partitioned(parameter):
                for key, value in state.items():
                    safe_set_full_optimizer_state(parameter, value, key)
            else:
                self._adam.state[parameter] |= state

    def _link_partitions(self) -> None:
        """Let ``safe_get/set_full_optimizer_state`` see Adam's moments of every parameter group.

        DeepSpeed (0.19) links them once, after the first group has stepped, when the others have
        no moments yet; so with two groups it must be told to link again.
        """
        zero = self._engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @staticmethod
    def _partitioned(parameter: Tensor) -> bool:
        return hasattr(parameter, "_hp_mapping")

    def close(self) -> None:
        self._engine.destroy()
