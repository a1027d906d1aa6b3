"""What each training step cost: time, tokens, memory, and the share of the device's peak.

The FLOPs of a token are those of the model, not of how it is run: two per weight of every matrix in
the forward pass, two more for the gradient of its input, and two for its own gradient where it is
trained; attention's scores and sums take 4·s·d a layer in forward and twice that in backward
(Chowdhery et al., 2022, appendix B). What activation checkpointing computes again, and padding, do
not count.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from e2lora.partitioned import numel_of, shape_of
from e2lora.tasks.images import sees_images, tokens_per_image, trunk_config

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "V100": 125,
    "T4": 65,
}
"""Dense half precision, from NVIDIA's data sheets; the first name that a device's name holds."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Of the device, where it is known: in bf16 or fp16, on the GPUs above."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    found = [peak for known, peak in PEAK_TFLOPS.items() if known in name]
    return found[0] * 1e12 if found else None


@dataclass(frozen=True)
class FlopsPerToken:
    """Of one training step: of the matrices, and of attention per token of a sequence's length."""

    matrices: float
    attention: float

    @classmethod
    def of(cls, model: Any) -> FlopsPerToken:
        sizes = {True: 0, False: 0}
        for module in model.modules():
            weight = module._parameters.get("weight")
            if (
                weight is not None
                and len(shape_of(weight)) > 1
                and not isinstance(module, nn.Embedding)
            ):
                sizes[weight.requires_grad] += numel_of(weight)
        trunk = trunk_config(model)
        layers = getattr(trunk, "num_hidden_layers", 0)
        width = getattr(trunk, "hidden_size", 0)
        return cls(4.0 * sizes[False] + 6.0 * sizes[True], 12.0 * layers * width)

    def at(self, mean_length: float) -> float:
        return self.matrices + self.attention * mean_length


class Meter:
    """Measures steps one after another.

    Args:
        num_workers: of the whole group, whose tokens are counted.
    """

    def __init__(self, model: Any, device: torch.device, precision: str, num_workers: int) -> None:
        self._device, self._num_workers = device, num_workers
        self._flops, self._peak = FlopsPerToken.of(model), peak_flops(device, precision)
        self._tokens_of_image = tokens_per_image(model.config) if sees_images(model) else 1
        self._memory = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.restart()

    def restart(self) -> None:
        """The next step begins now: what was done since the last one is not of training."""
        self._began = time.perf_counter()

    def read(self, num_tokens: int, num_rows: int) -> dict[str, float]:
        """Of the step that ends now, which had so many tokens and rows on all workers together."""
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        num_tokens *= self._tokens_of_image
        rate = num_tokens / seconds
        self._memory = max(self._memory, memory_gib(self._device))
        measured = {
            "seconds": seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_worker": rate / self._num_workers,
            "peak_memory_gib": self._memory,
        }
        if self._peak:
            flops = self._flops.at(num_tokens / num_rows)
            measured["mfu"] = rate / self._num_workers * flops / self._peak
        return measured


def memory_gib(device: torch.device) -> float:
    """What this worker holds: on a GPU its peak since the meter was made, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no such file outside Linux: the process's peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    return pages * resource.getpagesize() / 2**30
