"""What must hold before the first step, and how a step that breaks is told."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from e2lora.config import TrainConfig


class OutOfMemory(RuntimeError):
    """A step did not fit; says what to lower."""


def require_agreement(facts: Mapping[str, Any], group: Any) -> None:
    """All workers must be about to train the same. Collective.

    Args:
        facts: what each worker has, by what it is called; small values that print well.
        group: process group of all workers, or None for one.

    Raises:
        ValueError: on every worker, with what differs and who has what.
    """
    if group is None:
        return
    of_workers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_workers, dict(facts), group=group)
    for name in facts:
        values = [have.get(name) for have in of_workers]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"all workers of a trial must start from the same {name}; they have "
                f"{', '.join(f'worker {i}: {value!r}' for i, value in enumerate(values))}. Make "
                "the nodes alike: package versions, model files, data."
            )


def require_rows(num_rows: int, split: str, task: str) -> None:
    if num_rows == 0:
        raise ValueError(
            f"training needs rows; the {split} split of {task} has none. Correct the task's data."
        )


def digest_of(parameters: Mapping[str, torch.Tensor]) -> str:
    """Of names, shapes and values of what is trained; of tensors that ZeRO-3 has partitioned, of
    names and shapes.
    """
    digest = hashlib.sha256()
    for name, tensor in parameters.items():
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        digest.update(f"{name} {shape} {tensor.dtype}\n".encode())
        if not hasattr(tensor, "ds_shape"):
            flat = tensor.detach().reshape(-1)  # bytes can't be seen of a scalar
            digest.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_finite(
    value: float, step: int, training: TrainConfig, name: str = "training loss"
) -> None:
    """Raises:
    FloatingPointError: a loss or a metric of all workers isn't.
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} must stay finite; it was {value} at step {step} with "
            f"learning_rate={training.learning_rate:g}. Lower the learning rate."
        )


@contextmanager
def explained_memory(training: TrainConfig) -> Iterator[None]:
    """Raises:
    OutOfMemory: in place of torch's error, which says what was asked for and not what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a step must fit the worker's memory; a microbatch of {training.micro_batch_size} "
            f"rows didn't: {str(error).splitlines()[0]} Raise `gradient_accumulation_steps` (or "
            f"'auto'), {_further_remedies(training)}."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory is short, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _further_remedies(training: TrainConfig) -> str:
    ways = []
    if training.activation_checkpointing == "none":
        ways.append("set activation_checkpointing='non_reentrant'")
    if training.zero_stage < 3:
        ways.append("use a higher `zero_stage` with more workers")
    if training.precision == "fp32":
        ways.append("use precision='bf16'")
    ways.append("shorten `max_length`")
    return ", ".join(ways[:-1]) + f" or {ways[-1]}" if len(ways) > 1 else ways[0]
