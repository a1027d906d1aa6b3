"""Whole gradients, where statistics are not enough: what LoRA-GA starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e2lora.gathering import gathered_as_needed
from e2lora.gradients.idle import Idle
from e2lora.gradients.probe import checkpointed, device_of, probed, undisturbed
from e2lora.gradients.recorder import of_all_workers
from e2lora.moments import Target


def sum_gradients(
    model: nn.Module,
    groups: Sequence[Sequence[Target]],
    microbatches: Sequence[Any],
    loss_sum: Callable[[Any, Any], Tensor],
    num_supervised: int,
    checkpointing: bool = False,
    group: Any = None,
    alive: Callable[[], None] = lambda: None,
    again: Any = None,
) -> dict[str, Tensor]:
    """∂(mean loss)/∂W summed over the targets of each group, with frozen weights.

    One float32 tensor (out × in) is held per group, where its first target's weight lies.

    Args:
        groups: targets of one shape each.
        microbatches: of this worker.
        loss_sum: (model, inputs) → the *sum* of its sample (token) losses, a scalar.
        num_supervised: samples (tokens) of all workers, by which the loss is divided once.
        group: process group of all workers, or None for one.
        alive: called often, to show that the worker lives.
        again: as for :func:`e2lora.gradients.measure_gradients`.

    Returns:
        Each target's path → the tensor of its group.

    Raises:
        ValueError: a gradient that is zero or not finite.
    """
    sums: dict[str, Tensor] = {}
    for members in groups:
        first = members[0]
        shape = (first.out_features, first.in_features)
        total = torch.zeros(shape, device=device_of(model.get_submodule(first.path)))
        sums |= {target.path: total for target in members}

    of_workers = of_all_workers([len(microbatches)], group)
    idle = Idle(again, of_workers, [len(microbatches)], model).inputs_of(0)
    deaf = False

    def record(path: str, x: Tensor, delta: Tensor) -> None:
        alive()
        if deaf:
            return
        total = sums[path]
        flat = (t.detach().reshape(-1, t.shape[-1]).to(total) for t in (delta, x))
        deltas, xs = flat
        total.addmm_(deltas.T, xs)

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(gathered_as_needed(model))
        if checkpointing:
            stack.enter_context(checkpointed(model, [t for ts in groups for t in ts]))
        backward = stack.enter_context(probed(model, list(sums), lambda path: alive(), record))
        for inputs in microbatches:
            backward(loss_sum(model, inputs) / num_supervised)
        deaf = True
        for inputs in idle:
            backward(loss_sum(model, inputs))
    for members in groups:
        total = sums[members[0].path]
        if group is not None:
            whole = total.cpu()
            dist.all_reduce(whole, group=group)
            total.copy_(whole)
        size = float(total.abs().sum())
        if not 0.0 < size < float("inf"):
            paths = [target.path for target in members]
            raise ValueError(
                "an adapter can start only from a gradient that is finite and not zero; that of "
                f"{paths} has the absolute sum {size:g}. Calibrate on other samples, or take it "
                "out of `target_modules`."
            )
    return sums
