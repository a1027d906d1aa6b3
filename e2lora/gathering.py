"""How a model whose weights are partitioned computes: each module's are gathered while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2lora.partitioned import is_part, is_partitioned, require_workers


class _FrugalLinear(torch.autograd.Function):
    """``F.linear`` that saves the weight itself, not a view of it.

    A view holds what was gathered from forward to backward; of the parameter, what it holds was
    given back in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (delta,) = gradients
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = delta.reshape(-1, delta.shape[-1])
        return (
            delta @ weight if for_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _frugal(linear: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = linear.weight, linear.bias
    if torch.is_grad_enabled() and x.dtype == weight.dtype:
        return _FrugalLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


@contextmanager
def frugal_linears(model: nn.Module) -> Iterator[None]:
    """A partitioned model's linear layers hold no weight from forward to backward.

    DeepSpeed would replace ``F.linear`` for the whole process, and leave it so.
    """
    linears = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
        and is_part(module.weight)
    ]
    for linear in linears:
        linear.__dict__["forward"] = partial(_frugal, linear)
    try:
        yield
    finally:
        for linear in linears:
            linear.__dict__.pop("forward", None)


@contextmanager
def gathered_as_needed(model: nn.Module) -> Iterator[None]:
    """Within, forward and backward of a partitioned model gather each module's weights in turn.

    As under an engine, but nothing is trained. Every forward and every backward is collective.
    """
    if not is_partitioned(model):
        yield
        return
    require_workers()
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    offload = DeepSpeedZeRoOffload(
        module=model,
        timers=None,
        ds_config=None,
        overlap_comm=False,
        prefetch_bucket_size=0,
        param_persistence_threshold=0,
    )

    def before(*_: Any) -> None:
        offload.release_backward_leftovers()
        offload.partition_all_parameters()
        _set_in_forward(model, True)

    def after(*_: Any) -> None:
        _set_in_forward(model, False)

    with ExitStack() as stack:
        stack.callback(leave, model)
        stack.callback(offload.destroy)
        stack.enter_context(frugal_linears(model))
        stack.callback(model.register_forward_pre_hook(before, prepend=True).remove)
        stack.callback(model.register_forward_hook(after, always_call=True).remove)
        yield


def _set_in_forward(model: nn.Module, value: bool) -> None:
    """Whether DeepSpeed gathers a weight that a module reads of another one."""
    for module in model.modules():
        module._parameters._in_forward = value  # type: ignore[attr-defined]


LEFT_ON_MODULES = (
    "_external_params",
    "_original_parameters",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "ds_external_parameters",
    "ds_grads_remaining",
    "ds_id",
    "ds_inflight_param_registry",
    "ds_recompute_parameters",
    "post_bwd_fn",
    "pre_bwd_fn",
)


def leave(model: nn.Module) -> None:
    """Take off a model what an engine that ended (DeepSpeed 0.19) leaves on it.

    Functions that would gather by the old engine, and hold it in memory; counts of a backward that
    never came; small weights that it had kept whole. The parameters stay partitioned.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    for handle in list(getattr(model, "ds_inflight_param_registry", {}).values()):
        handle.wait()  # what a forward that failed had asked for
    FWD_MODULE_STACK.clear()
    for module in model.modules():
        module._parameters = dict(module._parameters)
        for name in LEFT_ON_MODULES:
            module.__dict__.pop(name, None)
    for parameter in model.parameters():
        if not is_part(parameter):
            continue
        held: Any = parameter
        held.__dict__.pop("_z3_optimizer", None)
        held.ds_active_sub_modules.clear()
        held.ds_persist = held.is_external_param = False
        if held.ds_status.name == "AVAILABLE":
            held.partition()
