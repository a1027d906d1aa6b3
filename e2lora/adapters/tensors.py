"""What stands in the place of a LoRA layer's A or B when it is more than a matrix of its own.

Each looks to PEFT like the ``nn.Linear`` it replaces: ``weight``, forward, and one entry
``weight`` in a state dict, so all that PEFT does with adapters works on them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2lora.partitioned import shape_of
from e2lora.patience import patiently


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """As safetensors, which others may read as they may any file: its own writer lets nobody.

    Raises:
        OSError: the file can't be written.
    """
    patiently(lambda: _save(file, tensors, metadata))
    os.umask(mask := os.umask(0))  # which can only be read by setting it
    file.chmod(0o666 & ~mask)


def _save(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, metadata)
    except SafetensorError as error:
        if said := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(file)) from error
        raise


class Sliced(nn.Module):
    """The first ``r`` rows of a shared A, or columns of a shared B.

    The whole belongs to a layer of the largest rank, and is no submodule here: it is one parameter
    with one name. Forward goes through it as a module, so that what happens when it is called
    (ZeRO-3 gathers its weight) happens; what lies beyond ``r`` is left out.

    Args:
        whole: holds A (r_max × in) or B (out × r_max).
        dim: along which the rank lies, 0 for A and 1 for B.
    """

    bias = None

    def __init__(self, whole: nn.Module, r: int, dim: int) -> None:
        super().__init__()
        self._whole, self.r, self.dim = (whole,), r, dim  # in a tuple: not registered

    @property
    def whole(self) -> Any:
        return self._whole[0]

    @property
    def weight(self) -> Tensor:
        return self.whole.weight.narrow(self.dim, 0, self.r)

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 0:
            return self.whole(x)[..., : self.r]
        return self.whole(F.pad(x, (0, self.whole.in_features - self.r)))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As a layer of rank ``r`` by itself would."""
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is None:
            missing.append(f"{prefix}weight")
        elif given.shape != self.weight.shape:
            shapes = f"{tuple(given.shape)} given, {tuple(self.weight.shape)} wanted"
            errors.append(f"size mismatch for {prefix}weight: {shapes}")
        else:
            with torch.no_grad():
                self.weight.copy_(given)


class Composed(nn.Module):
    """A or B that follows from parameters of this module, which may stand in others, too.

    A state dict holds the parameters, from which it is loaded, and ``weight``, from which PEFT
    alone computes the same.
    """

    bias = None

    def whole(self) -> Tensor:
        """A (r × in) or B (out × r), from the parameters."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The whole; an empty tensor while its parts lie with all workers (ZeRO-3), where PEFT's
        layer asks for its type before it calls this module, which gathers them.
        """
        parameters = list(self.parameters(recurse=False))
        if any(shape_of(parameter) != tuple(parameter.shape) for parameter in parameters):
            return parameters[0]
        return self.whole()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any
    ) -> None:
        state_dict.pop(f"{prefix}weight", None)  # it follows from the parameters
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class FrozenLinear(nn.Module):
    """A random matrix that is never trained: a buffer, so that nothing can set it to be."""

    weight: Tensor
    bias = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def random_projection(r: int, in_features: int, seed: int) -> Tensor:
    """A as LoRA initialises it (Kaiming uniform, a = √5), the same on every device.

    Its values are such as bfloat16 can hold: they survive training in that type.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(in_features)
    a = torch.empty(r, in_features).uniform_(-bound, bound, generator=generator)
    return a.bfloat16().float()


def pack_bits(mask: Tensor) -> Tensor:
    """A mask as bytes, eight entries in each."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_bits`: a mask of this shape."""
    bits = np.unpackbits(packed.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


class MaskedLinear(nn.Linear):
    """B of LoRI-S: the gradient of masked entries is zero before anything sees it.

    A mask of ones until one is set. Adam without moments and weight decay leave a zero where it is,
    so entries that are zero when they are masked stay zero.
    """

    mask: Tensor

    def __init__(self, b: nn.Linear) -> None:
        super().__init__(b.in_features, b.out_features, bias=False, device="meta")
        self.weight = b.weight
        mask = torch.ones_like(b.weight, dtype=torch.bool)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Masked.apply(self.weight, self.mask))


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


class PreconditionedLinear(nn.Linear):
    """B of LoRA-FA: its gradient is multiplied by ``(A Aᵀ)⁻¹ / s²`` before anything sees it.

    So the step of B is the one whose product with A comes nearest to the full gradient's
    (LoRA-FA, Zhang et al., 2023, as PEFT's optimizer does it). As A is frozen this is a constant,
    linear map: accumulating and reducing gradients commute with it.
    """

    preconditioner: Tensor

    def __init__(self, b: nn.Linear, a: Tensor, scaling: float) -> None:
        super().__init__(b.in_features, b.out_features, bias=False, device="meta")
        self.weight = b.weight
        gram = a.double() @ a.double().T
        inverse = torch.linalg.pinv(gram + 1e-8 * torch.eye(len(gram), device=gram.device))
        preconditioner = (inverse / scaling**2).to(a.dtype)
        self.register_buffer("preconditioner", preconditioner, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Preconditioned.apply(self.weight, self.preconditioner))


class _Preconditioned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, preconditioner: Tensor) -> Tensor:
        ctx.save_for_backward(preconditioner)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (preconditioner,) = ctx.saved_tensors
        return gradient @ preconditioner, None
