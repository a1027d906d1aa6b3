"""σ on real weights and real rows, on one worker and on two of a Ray cluster: that of autograd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from e2lora.assets import cache_root, resolve
from e2lora.data import calibration_folds
from e2lora.models import load_base, reset_head
from e2lora.moments import GradientProfile
from e2lora.planning import Request
from e2lora.planning.entry import Words, request_of
from e2lora.targets import find_targets
from e2lora.tasks import load_task
from tests.conftest import ROOT, data_folder, model_folder

CALIBRATION = ["num_samples=10", "num_folds=2", "microbatch_size=3"]


def minilm() -> list[str]:
    return []


def smollm2() -> list[str]:
    task = ["sft", f"data={data_folder('gsm8k')}", "prompt_column=question"]
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return ["--model", model_folder("smollm2-135m"), "--task", *task, "--targets", *names]


def request_for(arguments: Sequence[str]) -> Request:
    """The same as the job makes of its arguments."""
    options: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            values = options.setdefault(word, [])
        else:
            values.append(word)
    return request_of(
        Words(
            "search_spaces.quickstart",
            model=options.get("--model"),
            task=options.get("--task"),
            targets=options.get("--targets"),
            calibration=CALIBRATION,
        )
    )


def by_autograd(request: Request) -> dict[str, list[float]]:
    """σ of each target over all rows, then over those of each fold; weights require gradients."""
    task = load_task(request.task)
    base = load_base(request.model, task.auto_class, task.num_labels, torch.float32)
    reset_head(base.model, base.head, request.seed)
    rows = task.features("train", base.processor)
    lengths = [len(row["input_ids"]) for row in rows]
    numbers = calibration_folds(lengths, 10, 2, request.seed)
    targets = find_targets(base.model, request.adapter.target_modules)
    weights = {t.path: base.model.get_submodule(t.path).weight for t in targets}
    base.model.eval()
    for weight in weights.values():
        weight.requires_grad_(True)

    def stds(chosen: Sequence[int]) -> list[float]:
        batch = [rows[i] for i in chosen]
        loss: Any = sum(task.loss_sum(base.model, task.collate([r], base.processor)) for r in batch)
        gradients = torch.autograd.grad(loss / task.num_supervised(batch), list(weights.values()))
        return [gradient.double().std(correction=0).item() for gradient in gradients]

    parts = [stds([i for fold in numbers for i in fold]), *(stds(fold) for fold in numbers)]
    return {
        path: list(values) for path, values in zip(weights, zip(*parts, strict=True), strict=True)
    }


def without_profiles(folder: Path) -> Path:
    """A cache with the demo's assets and nothing else."""
    for name in ("demo:minilm-l6", "demo:vader"):
        resolve(name)
    folder.mkdir()
    for asset in cache_root().iterdir():
        if asset.name != "profiles":
            (folder / asset.name).symlink_to(asset)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("arguments", [minilm, smollm2])
def test_job_measures_sigma_as_autograd_does(arguments: Any, workers: int, tmp_path: Path) -> None:
    """As a user runs it; with two workers on a Ray of its own, each on its share of the rows."""
    words = arguments()
    command = [sys.executable, "jobs/plan.py", *words, "--calibration", *CALIBRATION]
    command += ["--workers", str(workers), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "E2LORA_CACHE": str(without_profiles(tmp_path / "cache"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    profile = GradientProfile.model_validate_json((tmp_path / "out/profile.json").read_text())
    assert profile.provenance.num_workers == workers
    expected = by_autograd(request_for(words))
    assert len(profile.layers) == len(expected)
    for place, entry in enumerate(profile.layers):
        found = [entry.moments.std, *(fold.moments[place].std for fold in profile.folds)]
        assert found == pytest.approx(expected[entry.target.path], rel=1e-5), entry.target.path
