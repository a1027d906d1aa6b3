"""Model + calibration batches → gradient moments of every target, with frozen weights.

The gradient of a linear weight is G = Σ_t δ_t x_tᵀ over tokens t, with x the input and δ the
gradient of the output. An autograd function put behind each target by a forward hook is the
identity on the output, saves x, and sees δ in backward: no weight needs ``requires_grad``.

Moments of a sum do not follow from the moments of its parts. So a target that fires once, on one
worker, is summed up by blocks of output rows and never held; otherwise a float32 accumulator per
target holds its own sum, and blocks are reduced over the workers before anything is squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e2lora.moments import LayerGradient, Moments, Target

BLOCK_ROWS = 256

LossSum = Callable[[Any, Any], Tensor]


class _Probe(torch.autograd.Function):
    """Identity on ``output`` that hands (x, δ) to ``record`` in backward.

    ``anchor`` requires grad, so that the graph reaches back to here though all else is frozen.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, record: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.record = record
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> tuple[Tensor, None, None, None]:
        (delta,) = deltas
        (x,) = ctx.saved_tensors
        ctx.record(x, delta)
        return delta, None, None, None


class _Sums:
    """Count, Σg, Σg², Σ|g| of one gradient, in float64."""

    def __init__(self) -> None:
        self.count, self.totals = 0, torch.zeros(3, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        wide = block.double()
        self.count += wide.numel()
        self.totals += torch.stack([wide.sum(), wide.square().sum(), wide.abs().sum()]).cpu()

    def moments(self) -> Moments:
        return Moments.from_sums(self.count, *self.totals.tolist())


class _Recorder:
    """Gathers what backward sees of every target, in the way the module docstring says."""

    def __init__(self, targets: Sequence[Target], fires_once: bool) -> None:
        self.targets = targets
        self.fires_once = fires_once
        self.forwards: dict[str, int] = {}
        self.sums: dict[str, _Sums] = {}
        self.accumulators: dict[str, Tensor] = {}

    def record(self, path: str, x: Tensor, delta: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        delta = delta.reshape(-1, delta.shape[-1]).float()
        if self.fires_once and self.forwards[path] == 1:
            sums = self.sums[path] = _Sums()
            for rows in delta.split(BLOCK_ROWS, dim=1):
                sums.add(rows.T @ x)
        elif path in self.accumulators:
            self.accumulators[path].addmm_(delta.T, x)
        else:
            self.accumulators[path] = delta.T @ x

    def finish(self, group: Any) -> list[LayerGradient]:
        """Moments in the order of the targets: the same order of collectives on every worker."""
        layers = []
        for target in self.targets:
            sums = self.sums.get(target.path) or self._reduced_sums(target, group)
            if sums.totals.isfinite().all():
                layers.append(LayerGradient(target=target, moments=sums.moments()))
        measured = {entry.target.path for entry in layers}
        broken = [target.path for target in self.targets if target.path not in measured]
        if broken:
            raise ValueError(
                f"every target needs a finite gradient; {len(broken)} got none: "
                f"{', '.join(broken[:5])}. Measure in float32, or calibrate on other samples."
            )
        return layers

    def _reduced_sums(self, target: Target, group: Any) -> _Sums:
        held = self.accumulators.pop(target.path, None)
        if held is None:  # not reached by this worker's batches; others may have a share
            held = torch.zeros(target.out_features, target.in_features)
        sums = _Sums()
        for block in held.split(BLOCK_ROWS):
            if group is not None:
                dist.all_reduce(block, group=group)
            sums.add(block)
        return sums


@contextmanager
def _hooked(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    anchor = torch.zeros((), requires_grad=True)

    def hook_for(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            recorder.forwards[path] = recorder.forwards.get(path, 0) + 1
            return _Probe.apply(output, inputs[0], anchor, lambda x, d: recorder.record(path, x, d))

        return hook

    handles = [
        model.get_submodule(target.path).register_forward_hook(hook_for(target.path))
        for target in recorder.targets
    ]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def measure_moments(
    model: nn.Module,
    targets: Sequence[Target],
    microbatches: Sequence[Any],
    loss_sum: LossSum,
    num_supervised: int,
    group: Any = None,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[list[LayerGradient], float, Literal["blocks", "accumulators"]]:
    """Moments of ∂(mean loss)/∂W for every target, exact for the sum over all microbatches.

    Args:
        microbatches: of this worker.
        loss_sum: (model, microbatch) → the *sum* of its sample (token) losses, a scalar.
        num_supervised: samples (tokens) of all microbatches of all workers; the loss is divided
            by it once, so the result depends on neither microbatch size nor number of workers.
        group: process group of all workers, or None for one.
        on_batch: called after each microbatch, to show that the worker lives.

    Returns:
        One entry per target, the mean loss, and the method used (see the module docstring).
    """
    recorder = _Recorder(targets, fires_once=group is None and len(microbatches) == 1)
    total = torch.zeros((), dtype=torch.float64)
    with _hooked(model, recorder), torch.enable_grad():
        for batch in microbatches:
            loss = loss_sum(model, batch) / num_supervised
            if loss.requires_grad:  # else it reaches no target: σ = 0, see require_usable
                loss.backward()
            total += loss.detach().double().cpu()
            on_batch()
    if group is not None:
        dist.all_reduce(total, group=group)
    method: Literal["blocks", "accumulators"] = (
        "accumulators" if recorder.accumulators or group is not None else "blocks"
    )
    return recorder.finish(group), float(total), method
