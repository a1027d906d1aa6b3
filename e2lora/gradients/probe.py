"""The probe: how a backward pass is listened to, with nothing about the model changed.

An autograd function put behind each target by a forward hook is the identity on the output, saves
the input x, and sees the output's gradient δ in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e2lora.moments import Target

Record = Callable[[str, Tensor, Tensor], None]


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


@contextmanager
def probed(
    model: nn.Module, paths: Sequence[str], on_forward: Callable[[str], None], record: Record
) -> Iterator[None]:
    """``record(path, x, δ)`` in backward of each module, ``on_forward(path)`` in its forward."""
    anchor = torch.zeros((), requires_grad=True)

    def hook_for(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            on_forward(path)
            return _Probe.apply(output, inputs[0], anchor, partial(record, path))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without a cache of keys and values; then as it was."""
    training = model.training
    # parts of a model have configurations of their own, as the decoder of an encoder-decoder
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for config in caching:
            config.use_cache = True


@contextmanager
def checkpointed(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Numbered layers keep only their input and run forward again in backward (non-reentrant).

    By hand, since transformers' own checkpointing works in training mode only, where dropout is on.
    """
    paths = {t.path[: _end_of_number(t)] for t in targets}
    layers = [model.get_submodule(path) for path in sorted(paths)]
    own = [layer.__dict__.get("forward") for layer in layers]  # other tools wrap forward too
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward


def _end_of_number(target: Target) -> int:
    """Where the layer's number ends in the target's path: ``*`` stands there in its type."""
    return target.module_type.index("*") + len(str(target.layer))
