"""From a model and a task, as a command line names them, to profile, plans, tables and pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from e2lora.config import (
    AdapterConfig,
    AnyTaskConfig,
    GroupSpec,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    TrialConfig,
    system_name,
)
from e2lora.data import calibration_folds
from e2lora.figures import draw_entropies, draw_ranks, draw_similarity
from e2lora.models import load_base, load_structure
from e2lora.moments import GradientProfile
from e2lora.plan import build_plan, require_possible
from e2lora.planning.estimate import flops_per_second, parameter_range, profile_cost
from e2lora.planning.tables import compare_plans, describe_plan, describe_profile
from e2lora.profile import measure_profile
from e2lora.profile_cache import ProfileCache
from e2lora.records import write_json
from e2lora.targets import find_targets, layers_without
from e2lora.tasks import TrialData, load_task


@dataclass(frozen=True)
class Request:
    """What to plan for: ``plans`` by their labels, all with one calibration."""

    model: ModelConfig
    task: AnyTaskConfig
    adapter: AdapterConfig
    plans: Mapping[str, PlanConfig]
    seed: int = 0
    num_workers: int = 1

    @property
    def trial(self) -> TrialConfig:
        """As a trial, whose training is not run."""
        return TrialConfig(
            model=self.model,
            task=self.task,
            adapter=self.adapter,
            plan=next(iter(self.plans.values())),
            training=TrainConfig(
                max_steps=1,
                learning_rate=1e-3,
                global_batch_size=self.num_workers,
                num_workers=self.num_workers,
            ),
            seed=self.seed,
        )

    @property
    def title(self) -> str:
        return f"{Path(self.model.name).name} on {Path(self.task.display_name).name}"


# ---- what it would cost -------------------------------------------------------------------------


def dry_run(request: Request) -> str:
    """Counts, memory and time as text; reads rows, tokenizer and configuration, no weights.

    Raises:
        ValueError, OSError: whatever can be known to be wrong beforehand.
    """
    from transformers import AutoTokenizer

    from e2lora.assets import resolve

    config, task = request.trial, load_task(request.task)
    structure = load_structure(request.model, task.auto_class, task.num_labels)
    targets = find_targets(structure, request.adapter.target_modules)
    for options in request.plans.values():
        require_possible(targets, options)
    tokenizer = AutoTokenizer.from_pretrained(
        resolve(request.model.name), revision=request.model.revision
    )
    rows = task.features("train", tokenizer)
    calibration = config.plan.calibration
    numbers = calibration_folds(
        [len(row["input_ids"]) for row in rows],
        calibration.num_samples,
        calibration.num_folds,
        request.seed,
    )
    folds = [[rows[i] for i in fold] for fold in numbers]
    cost = profile_cost(structure, targets, folds, calibration, request.num_workers)
    lines = [
        f"{request.title}: nothing is measured (dry run)",
        f"{len(targets)} targets; {calibration.num_samples} rows in {len(folds)} folds; per worker "
        f"{cost.tokens:,} tokens ({cost.padded_tokens:,} padded) in {cost.num_microbatches} "
        f"microbatch(es), {cost.num_passes} pass(es)",
        f"memory  {_size(cost.weights_bytes)} weights in float32, up to "
        f"{_size(cost.saved_inputs_bytes)} inputs saved by the probe, {_size(cost.held_bytes)} "
        "gradients held; the model's own activations and logits come on top",
    ]
    if cost.spilled_bytes:
        lines.append(f"disk    {_size(cost.spilled_bytes)} of gradients, for a while")
    device = _device()
    seconds = cost.seconds(flops_per_second(device))
    lines.append(
        f"time    about {seconds:.0f} s on a {device} as here now, by its rate of matrix "
        f"products ({cost.flops:.2g} floating point operations; attention's own left out)"
    )
    lines += [f"note    {note}" for note in _missing(layers_without(structure, targets))]
    for label, options in request.plans.items():
        low, high = parameter_range(targets, options)
        count = f"{low:,}" if low == high else f"{low:,} to {high:,}, as gradients say"
        lines.append(f"plan    {label}: {count} LoRA parameters at r={options.r}")
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    """
    >>> _size(3 * 2**20), _size(2.5 * 2**30)
    ('3 MiB', '2.5 GiB')
    """
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def _missing(layers: Mapping[str, Sequence[int]]) -> list[str]:
    return [f"{name}: layers {list(without)} have none" for name, without in layers.items()]


# ---- profile → plans ----------------------------------------------------------------------------


def make_plans(request: Request, out: Path, profile_file: Path | None = None) -> str:
    """Write profile, plans and pictures into ``out``; returns the tables as text.

    Args:
        profile_file: an existing profile to plan from, instead of measuring one.

    Raises:
        ValueError, OSError: a model, data, targets or options that can't work.
    """
    if profile_file is None:
        profile = _measured(request)
    else:
        profile = GradientProfile.model_validate_json(profile_file.read_text(encoding="utf-8"))
    targets = [entry.target for entry in profile.layers]
    plans = {label: build_plan(targets, o, profile) for label, o in request.plans.items()}
    write_json(out / "profile.json", profile)
    files = [out / "profile.json"]
    for label, plan in plans.items():
        name = "plan.json" if len(plans) == 1 else f"plan-{_file_name(label)}.json"
        write_json(out / name, plan)
        files.append(out / name)
    title = f"{Path(profile.provenance.model).name} on {Path(profile.provenance.task).name}"
    draw_entropies(out / "entropy.png", profile, title)
    draw_similarity(out / "similarity.png", profile, plans, title)
    draw_ranks(out / "ranks.png", plans, title)
    files += [out / name for name in ("entropy.png", "similarity.png", "ranks.png")]
    names = {label: system_name(plan.options, request.adapter) for label, plan in plans.items()}
    parts = [describe_profile(title, profile), *_missing(profile.layers_without)]
    parts += [describe_plan(f"{label}: {names[label]}", plan) for label, plan in plans.items()]
    if len(plans) > 1:
        parts.append(compare_plans(plans))
    parts.append("\n".join(f"{file.suffix[1:]:<5} {file}" for file in files))
    return "\n\n".join(parts)


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def _measured(request: Request) -> GradientProfile:
    config = request.trial
    task = load_task(request.task)
    structure = load_structure(request.model, task.auto_class, task.num_labels)
    targets = find_targets(structure, request.adapter.target_modules)
    for options in request.plans.values():
        require_possible(targets, options)
    if request.num_workers > 1:
        return _measured_on_workers(config)
    print("loading the model and its rows", file=sys.stderr)
    base = load_base(request.model, task.auto_class, task.num_labels, torch.float32)
    base.model.to(_device())
    rows = {split: task.features(split, base.tokenizer) for split in ("train", "validation")}
    data = TrialData(task, rows["train"], rows["validation"])
    return measure_profile(base, data, config, on_progress=_Progress(), cache=ProfileCache())


def _measured_on_workers(config: TrialConfig) -> GradientProfile:
    """On a group of a Ray cluster, each worker on its share of the rows."""
    import tempfile

    from e2lora.broker import Job
    from e2lora.cluster import connect, require_fits, require_shared_storage
    from e2lora.pool import Pool

    connect()
    spec = GroupSpec.of(config.training)
    require_fits(spec)
    with tempfile.TemporaryDirectory(prefix="e2lora-plan-", dir=Path.cwd()) as folder:
        require_shared_storage(Path(folder))
        file = Path(folder) / "profile.json"
        print(f"measuring on {spec.num_workers} workers", file=sys.stderr)
        with Pool("plan", Path(folder) / "ray") as pool:
            payload = {"config": config.model_dump_json(), "file": str(file)}
            pool.run(Job("profile", "profile", spec, payload))
        return GradientProfile.model_validate_json(file.read_text(encoding="utf-8"))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Progress:
    """Microbatches done, their rate and what is left, every few seconds."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == self._done or (now - self._told < 5.0 and done < total):
            return
        self._told, self._done = now, done
        each = (now - self._began) / done
        print(
            f"microbatch {done}/{total}, {each:.2f} s each, {each * (total - done):.0f} s to go",
            file=sys.stderr,
        )
