"""What a gradient profile will cost, known from shapes and row lengths: no weights are touched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from e2lora.config import CalibrationConfig, PlanConfig
from e2lora.gradients import held_bytes, split_by_size
from e2lora.moments import Target
from e2lora.plan import build_plan
from e2lora.profile import calibration_rounds
from e2lora.tasks import Features
from e2lora.tasks.images import tokens_per_image, trunk_config

BYTES = 4  # of a float32
PROCESS_BYTES = 600 * 2**20  # Python with torch and transformers


@dataclass(frozen=True)
class ProfileCost:
    """Per worker. ``memory`` says what takes how many bytes, activations and logits roughly;
    ``flops`` leave out what attention adds quadratically in the row length.
    """

    tokens: int
    padded_tokens: int
    num_microbatches: int
    memory: dict[str, float]
    spilled_bytes: int
    num_passes: int
    flops: float

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    def seconds(self, flops_per_second: float) -> float:
        return self.flops / flops_per_second


def profile_cost(
    structure: nn.Module,
    targets: Sequence[Target],
    folds: Sequence[Sequence[Features]],
    calibration: CalibrationConfig,
    world: int = 1,
) -> ProfileCost:
    """Cost of :func:`e2lora.profile.measure_profile`.

    Args:
        structure: the model, weights not needed (meta device).
        folds: tokenised calibration rows.
    """
    of_workers = [calibration_rounds(folds, calibration, rank, world) for rank in range(world)]
    of_image = tokens_per_image(structure.config)
    microbatches = [[len(shares) for _, shares in rounds] for rounds in of_workers]
    shapes = [
        [len(row["input_ids"]) if "input_ids" in row else of_image for row in rows]
        for _, shares in of_workers[0]
        for rows, _ in shares
    ]
    padded = [len(lengths) * max(lengths) for lengths in shapes]
    held = held_bytes(targets, microbatches)
    passes = split_by_size(targets, held, calibration.max_held_gib * 2**30)
    weights = {id(p): p.numel() for p in structure.parameters()}
    matrices = sum(m.in_features * m.out_features for m in _linears(structure))
    sizes = [t.in_features * t.out_features for t in targets]
    plain = 4.0 * matrices * sum(padded)
    return ProfileCost(
        tokens=sum(map(sum, shapes)),
        padded_tokens=sum(padded),
        num_microbatches=len(shapes),
        memory={
            "process": PROCESS_BYTES,
            "weights": BYTES * sum(weights.values()),
            "activations and logits": BYTES
            * max(padded)
            * _activations_per_token(structure, calibration),
            "inputs saved by the probe": BYTES * max(padded) * sum(t.in_features for t in targets),
            "gradients held": max(sum(held[t.path] for t in members) for members in passes),
        },
        spilled_bytes=(1 + len(folds)) * BYTES * sum(sizes) if calibration.pairwise else 0,
        num_passes=len(passes),
        flops=len(passes) * plain + 2.0 * sum(sizes) * sum(padded),
    )


def _activations_per_token(structure: Any, calibration: CalibrationConfig) -> int:
    """Entries that forward keeps per token: some ten vectors and three hidden ones per layer, or a
    layer's input where layers are recomputed; of a language model also logits, three times over.
    """
    config = trunk_config(structure)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    of_layer = 10 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    kept = layers * hidden + of_layer if calibration.checkpointing else layers * of_layer
    head = structure.get_output_embeddings()
    return kept + (3 * config.vocab_size if head is not None else 0)


def _linears(structure: nn.Module) -> list[Any]:
    return [m for m in structure.modules() if isinstance(m, nn.Linear)]


def flops_per_second(device: str, seconds: float = 0.3) -> float:
    """This device's rate at float32 matrix products of 2048 x 2048."""
    a = torch.rand(2048, 2048, device=device)
    total = (a @ a).sum().item()  # waits for the device, here and below
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        total += (a @ a).sum().item()
        rounds += 1
    return rounds * 2.0 * 2048**3 / (time.perf_counter() - began)


def parameter_range(targets: Sequence[Target], options: PlanConfig) -> tuple[int, int]:
    """Fewest and most LoRA parameters that the options can come to, before there is a profile.

    Exact and equal where the plan needs none. Otherwise from one interval per module type to as
    many as it has layers; each rank costs a grant more or less.
    """
    if not options.needs_profile:
        count = build_plan(targets, options).parameters
        return count, count
    whole = PlanConfig(topology="all", r=options.r)
    apart = PlanConfig(topology="none", r=options.r)
    fewest, most = (build_plan(targets, plan).parameters for plan in (whole, apart))
    if options.budget == "parameter" or options.topology in ("none",):
        return most, most
    return fewest, most
