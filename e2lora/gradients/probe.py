"""The probe: how a backward pass is listened to, with nothing about the model changed.

An autograd function put behind each target by a forward hook is the identity on the output, saves
the input x, and sees the output's gradient δ in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
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
        # the same memory, but no view to autograd: some models go on in place
        return torch.ops.aten._unsafe_view.default(output, output.shape)

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> tuple[Tensor, None, None, None]:
        (delta,) = deltas
        (x,) = ctx.saved_tensors
        ctx.record(x, delta)
        return delta, None, None, None


@contextmanager
def probed(
    model: nn.Module, paths: Sequence[str], on_forward: Callable[[str], None], record: Record
) -> Iterator[Callable[[Tensor], None]]:
    """``record(path, x, δ)`` in backward of each module, ``on_forward(path)`` in its forward.

    Yields the backward pass: it goes no further than the targets, and gives no ``.grad`` to
    anything.
    """
    anchor = torch.zeros((), requires_grad=True)

    def hook_for(path: str) -> Callable[..., Tensor]:
        def hook(
            module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor
        ) -> Tensor:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"a target must map one tensor to one tensor; {path} returns a "
                    f"{type(output).__name__}. Take it out of `target_modules`."
                )
            on_forward(path)
            x = inputs[0] if inputs else next(iter(named.values()))
            return _Probe.apply(output, x, anchor, partial(record, path))

        return hook

    def backward(loss: Tensor) -> None:
        if loss.requires_grad:  # else it reaches no target: σ = 0, see require_usable
            torch.autograd.grad(loss, anchor, allow_unused=True)

    with ExitStack() as handles, torch.enable_grad():
        for path in paths:
            module = model.get_submodule(path)
            handle = module.register_forward_hook(hook_for(path), with_kwargs=True)
            handles.callback(handle.remove)
        yield backward


def device_of(module: nn.Module) -> torch.device:
    """Where its weight lies; quantised ones lie in buffers."""
    return next(chain(module.parameters(), module.buffers())).device


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without autocast or a cache of keys and values; then as it was."""
    training = [module for module in model.modules() if module.training]
    # parts of a model have configurations of their own, as the decoder of an encoder-decoder
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
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
