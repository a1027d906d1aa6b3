"""A model's own weights, below whatever adapters lie on them, and the name of their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from e2lora.partitioned import added_over_workers, is_part, numel_of, own_part, shape_of
from e2lora.quantized import scales_of


def own_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and what else a checkpoint holds: quantised weights lie in buffers.

    Of a model with adapters these are the weights below them, by their names in the bare model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrapped, kept = wrapped_modules(inner), inner.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in inner.named_buffers() if name in kept)
    for name, tensor in chain(inner.named_parameters(), buffers):
        bare = []
        for depth, part in enumerate(parts := name.split(".")):
            below = wrapped.get(".".join(parts[:depth]))
            if below is None:
                bare.append(part)
            elif part != below:
                break
        else:
            yield ".".join(bare), tensor
            yield from ((".".join([*bare, part]), scale) for part, scale in scales_of(tensor))


def dtype_of(model: Any) -> str:
    """Of the base weights, e.g. ``bfloat16``."""
    floating = (t.dtype for _, t in own_weights(model) if t.is_floating_point())
    return str(next(floating)).removeprefix("torch.")


def wrapped_modules(model: nn.Module) -> dict[str, str]:
    """Path of each module that PEFT put around one of the model → the name of that one in it."""
    return {
        path: below
        for path, module in model.named_modules()
        for below in ("base_layer", "original_module")
        if below in dict(module.named_children())
    }


FINGERPRINT_CHUNK = 2**20
FINGERPRINT_FACTOR = 0x1E3779B97F4A7C15  # odd, so that no bit of a product is lost


def weights_fingerprint(model: nn.Module, skip: Sequence[str] = ()) -> str:
    """Sixteen hex digits of all weights' names, shapes and bits, those of ``skip`` left out.

    The bits enter by chunks, as a sum of words with a factor of its own for each place, on the
    device where they lie: any changed, swapped or moved weight shows. Of partitioned weights each
    worker adds up its parts, so the sums, and the fingerprint, are those of the plain model.
    Collective for these.
    """
    factors: dict[torch.device, torch.Tensor] = {}
    kept = [
        (name, tensor)
        for name, tensor in own_weights(model)
        if not any(name == module or name.startswith(f"{module}.") for module in skip)
    ]
    sums = [_chunk_sums(tensor, factors) for _, tensor in kept]
    partial = [number for number, (_, tensor) in enumerate(kept) if is_part(tensor)]
    if partial:
        lengths = [len(sums[number]) for number in partial]
        whole = added_over_workers(torch.cat([sums[n] for n in partial]), kept[partial[0]][1])
        for number, total in zip(partial, whole.split(lengths), strict=True):
            sums[number] = total
    digest = hashlib.sha256()
    for (name, tensor), totals in zip(kept, sums, strict=True):
        digest.update(f"{name} {shape_of(tensor)} {tensor.dtype}\n".encode())
        digest.update("".join(f"{total}\n" for total in totals.tolist()).encode())
    return digest.hexdigest()[:16]


WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _chunk_sums(tensor: torch.Tensor, factors: dict[torch.device, torch.Tensor]) -> torch.Tensor:
    """Modulo 2**64, of what of a tensor this worker holds: a number for each chunk of the whole."""
    first, held = own_part(tensor) if is_part(tensor) else (0, tensor.detach().flatten())
    device = held.device
    if device not in factors:
        places = torch.arange(FINGERPRINT_CHUNK, device=device)
        factors[device] = (2 * places + 1) * FINGERPRINT_FACTOR
    num_chunks = max(1, -(-numel_of(tensor) // FINGERPRINT_CHUNK))
    sums = torch.zeros(num_chunks, dtype=torch.int64, device=device)
    bits, begin = held.contiguous().view(WORDS[held.element_size()]), 0
    while begin < len(bits):
        number, place = divmod(first + begin, FINGERPRINT_CHUNK)
        chunk = bits[begin : begin + FINGERPRINT_CHUNK - place]
        sums[number] = (chunk.long() * factors[device][place : place + len(chunk)]).sum()
        begin += len(chunk)
    return sums
