"""A trial's state on disk, independent of the number of workers and of the ZeRO stage.

    checkpoints/step-000120/
      state.safetensors   full tensors: parameter/NAME, exp_avg/NAME, exp_avg_sq/NAME, adam_steps;
                          initial/NAME, hooks/NAME where the adapter's family has such;
                          history/NAME, what was measured at each step so far
      state.json          step, identity of the trial, evaluations so far, scores of the last one
      COMPLETE            written last; a folder without it does not count

Data order and random states need no place here: both are pure functions of (seed, step).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from e2lora.adapters.tensors import write_tensors
from e2lora.config import Frozen
from e2lora.patience import patiently
from e2lora.records import Evaluation, write_json
from e2lora.tasks.scores import RowScore

MARKER = "COMPLETE"


@dataclass(frozen=True)
class TrainState:
    """Everything that training needs to go on after ``step`` optimiser steps."""

    step: int
    identity: str
    tensors: dict[str, Tensor]
    history: dict[str, list[float]] = field(default_factory=dict)  # by step
    evaluations: list[Evaluation] = field(default_factory=list)
    scores: list[RowScore] = field(default_factory=list)  # of the last evaluation, by row


class _Description(Frozen):
    version: Literal[3] = 3
    step: int
    identity: str
    evaluations: tuple[Evaluation, ...]
    scores: tuple[RowScore, ...]


HISTORY = "history/"


def save_checkpoint(
    folder: Path, state: TrainState, keep: int = 1, best: int | None = None
) -> None:
    """Write ``folder/step-…`` whole or not at all; then remove all but the ``keep`` newest.

    Args:
        best: a step whose state stays, too.

    Raises:
        OSError: the storage failed, for longer than :func:`e2lora.patience.patiently` waits.
    """
    patiently(lambda: _save_checkpoint(folder, state, keep, best))


def _save_checkpoint(folder: Path, state: TrainState, keep: int, best: int | None) -> None:
    final = folder / f"step-{state.step:06d}"
    partial = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    history = {
        f"{HISTORY}{name}": torch.tensor(values, dtype=torch.float64)
        for name, values in state.history.items()
    }
    write_tensors(partial / "state.safetensors", state.tensors | history)
    description = _Description(
        step=state.step,
        identity=state.identity,
        evaluations=tuple(state.evaluations),
        scores=tuple(state.scores),
    )
    write_json(partial / "state.json", description)
    for name in ("state.safetensors", "state.json"):
        _flush_to_disk(partial / name)
    (partial / MARKER).touch()
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    leftovers = folder.glob(".step-*")  # of processes that were killed while they wrote
    old = [path for path in _complete(folder)[:-keep] if _step_of(path) != best]
    for path in (*old, *leftovers):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(folder: Path, identity: str, step: int | None = None) -> TrainState | None:
    """The newest complete state, or that of ``step``; None if there is none.

    Raises:
        ValueError: the state belongs to another configuration or plan.
    """
    found = [path for path in _complete(folder) if step in (None, _step_of(path))]
    if not found:
        return None
    newest = found[-1]
    description = _Description.model_validate_json((newest / "state.json").read_text())
    if description.identity != identity:
        raise ValueError(
            "a checkpoint may only continue the trial that wrote it; "
            f"{newest} was written by {description.identity}, this trial is {identity}. Use "
            "another study name, or remove the folder to train anew."
        )
    tensors = load_file(newest / "state.safetensors")
    history = {
        name.removeprefix(HISTORY): tensors.pop(name).tolist()
        for name in [name for name in tensors if name.startswith(HISTORY)]
    }
    return TrainState(
        step=description.step,
        identity=identity,
        tensors=tensors,
        history=history,
        evaluations=list(description.evaluations),
        scores=list(description.scores),
    )


def _complete(folder: Path) -> list[Path]:
    found = [marker.parent for marker in folder.glob(f"step-*/{MARKER}")]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
