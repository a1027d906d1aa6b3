"""The DeepSpeed engine of one trial: its configuration, its start, and its optimizer state.

DeepSpeed's own optimizer checkpoints are bound to the number of workers. An adapter's optimizer
state is small, so it is gathered to full tensors by name and scattered again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from e2lora.adapters import FAMILIES, is_head, trainable_parameters
from e2lora.adapters.family import Handle
from e2lora.config import AdapterConfig, TrainConfig
from e2lora.device import DTYPES
from e2lora.gathering import frugal_linears, leave
from e2lora.partitioned import gathered, import_deepspeed, is_part, is_partitioned, numel_of
from e2lora.training.states import MOMENTS, STATES

LARGEST_BUCKET = 500_000_000  # entries; DeepSpeed's default
LOSS_SCALE = "loss_scale/"
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def deepspeed_config(training: TrainConfig, num_trained: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, with what follows from the number of trained parameters.

    It makes a buffer for gradients as large as a whole model's, where an adapter has few.
    """
    config = training.deepspeed_config()
    derived: dict[str, Any] = {"reduce_bucket_size": max(1, min(LARGEST_BUCKET, num_trained))}
    if training.zero_stage == 3:
        derived["memory_efficient_linear"] = False  # frugal_linears does it
    zero = {**derived, **config["zero_optimization"]}
    for name in ("offload_optimizer", "offload_param"):
        if name in zero:
            zero[name] = {"pin_memory": torch.cuda.is_available(), **zero[name]}
    return {**config, "zero_optimization": zero}


def require_known_to_deepspeed(training: TrainConfig) -> None:
    """Refuse what a user adds for DeepSpeed and DeepSpeed would refuse when it starts.

    Raises:
        ValueError: naming the first key or value that it doesn't take.
    """
    if not training.deepspeed:
        return
    import_deepspeed()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = training.deepspeed_config()
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for key in models.keys() & training.deepspeed.keys():
        try:
            models[key](**config[key])
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, (key, *wrong["loc"])))
            raise ValueError(
                f"`deepspeed` must hold what DeepSpeed takes; {place} is refused: {wrong['msg']}; "
                f"got {wrong['input']!r}. Correct or remove it."
            ) from error


def learning_rate_factor(training: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at optimiser step ``step`` (from 0): warmup, then decay."""
    if step < training.num_warmup_steps:
        return (step + 1) / training.num_warmup_steps
    span = training.num_steps - training.num_warmup_steps
    progress = (step - training.num_warmup_steps) / span
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
    """``deepspeed.initialize`` around an adapted model, one per trial.

    At stage 3 whatever of the model isn't partitioned yet is now; its base stays so.

    Raises:
        ValueError: a partitioned model at another stage, a precision that the device lacks.
    """

    def __init__(self, model: Any, adapter: AdapterConfig, training: TrainConfig) -> None:
        self.training, self._model = training, model
        if training.zero_stage != 3 and is_partitioned(model):
            raise ValueError(
                "a model whose weights are partitioned is trained at ZeRO stage 3; got "
                f"zero_stage={training.zero_stage}. Load it without `partitioning`, or use stage 3."
            )
        _require_precision(training.precision)
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
        num_trained = sum(map(numel_of, self.parameters.values()))
        dtype = DTYPES[training.precision]
        if training.zero_stage == 3 and is_partitioned(model):
            _cast_adapter(model, dtype)
        self._engine, *_ = import_deepspeed().initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(training, num_trained),
            dist_init_required=False,
        )
        if training.precision != "fp32":
            for buffer in adapter_buffers(model):
                buffer.data = buffer.data.to(dtype)
        self._adam = optimizer
        self._states = STATES[training.zero_stage](self._engine, optimizer)
        self._norm = 0.0
        self._held = ExitStack()
        if training.zero_stage == 3:
            self._held.enter_context(frugal_linears(model))

    @property
    def module(self) -> Any:
        return self._engine

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    # ---- steps --------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Of one microbatch; DeepSpeed averages over microbatches and workers."""
        self._engine.backward(loss)

    def micro_step(self, step: int) -> None:
        """After each backward; the last one of a step updates, at the learning rate of ``step``."""
        factor = learning_rate_factor(self.training, step)
        for group in self._engine.optimizer.param_groups:
            scale = 1.0 if group["head"] else self.learning_rate_scale
            group["lr"] = group["peak"] * factor * scale
        if self.training.zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            self._norm = self._whole_norm()
        self._engine.step()

    def gradient_norm(self) -> float:
        """Of all gradients of the last step, of all workers, before clipping."""
        if self.training.zero_stage == 0:
            return self._norm
        return float(self._engine.get_global_grad_norm())

    def _whole_norm(self) -> float:
        """Where DeepSpeed doesn't tell; the gradients are whole, and gone after the step."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing, since gradients overflowed."""
        return not self._engine.was_step_applied()

    # ---- what a family's hooks see ------------------------------------------------------------

    def gradient(self, name: str) -> Tensor:
        gradient = self._states.gradient(self.parameters[name])
        if gradient is None:
            raise RuntimeError(f"{name} has no gradient after backward: does the loss reach it?")
        scale = getattr(self._engine.optimizer, "loss_scale", 1.0)  # of fp16
        return gradient.detach().float() / scale

    def value(self, name: str) -> Tensor:
        return self._states.value(self.parameters[name]).detach().float().clone()

    def assign(self, name: str, value: Tensor) -> None:
        self._states.set_value(self.parameters[name], value)

    def restart_optimizer(self) -> None:
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()

    # ---- checkpoints --------------------------------------------------------------------------

    def gather(self) -> dict[str, Tensor]:
        """Full float32 parameters and Adam moments by name, on CPU. Collective: all must call."""
        tensors: dict[str, Tensor] = {"adam_steps": self._states.steps(), **self._loss_scale()}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = _on_cpu(self._states.value(parameter))
            for key in MOMENTS:
                tensors[f"{key}/{name}"] = _on_cpu(self._states.moment(parameter, key))
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`gather`, on any number of workers and at any stage. Collective."""
        self._states.begin(tensors["adam_steps"])
        for key in self._loss_scale().keys() & tensors.keys():
            name = key.removeprefix(LOSS_SCALE)
            kind = type(getattr(self._engine.optimizer.loss_scaler, name))
            setattr(self._engine.optimizer.loss_scaler, name, kind(tensors[key].item()))
        for name, parameter in self.parameters.items():
            self.assign(name, tensors[f"parameter/{name}"])
            for key in MOMENTS:
                self._states.set_moment(parameter, key, tensors[f"{key}/{name}"])

    def _loss_scale(self) -> dict[str, Tensor]:
        """Of fp16, where it adapts itself: how far it is, and what it waits for."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return {}
        return {f"{LOSS_SCALE}{n}": torch.tensor(float(getattr(scaler, n))) for n in SCALER_STATE}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Trained parameters are whole on every worker within, to be read. Collective."""
        with gathered(self.parameters.values()):
            yield

    def close(self) -> None:
        """Leave the model without an engine. Collective at stage 3, and harmless twice."""
        self._held.close()
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            hook.remove()
        self._engine.destroy()
        if self.training.zero_stage == 3:
            leave(self._model)


def _require_precision(precision: str) -> None:
    accelerator = import_deepspeed().accelerator.get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ValueError(
            "float16 needs a device that computes in it; "
            f"{accelerator.device_name()} doesn't. Use precision='bf16' or 'fp32'."
        )


def _cast_adapter(model: Any, dtype: torch.dtype) -> None:
    """What isn't partitioned, in the type that training computes in.

    DeepSpeed (0.19) does it where all of a model is plain, and not where its base is partitioned.
    """
    for parameter in model.parameters():
        if not is_part(parameter) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
