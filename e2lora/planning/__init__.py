"""From a model and a task, as a command line names them, to profile, plans, tables and pictures."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from e2lora.command import storage_folder
from e2lora.config import (
    AdapterConfig,
    AnyTaskConfig,
    GroupSpec,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    TrialConfig,
    fingerprint_of,
    system_name,
)
from e2lora.data import calibration_folds
from e2lora.figures import draw_entropies, draw_ranks, draw_similarity
from e2lora.models import load_base, load_processor, load_structure
from e2lora.moments import GradientProfile
from e2lora.plan import build_plan, require_possible
from e2lora.planning.estimate import flops_per_second, parameter_range, profile_cost
from e2lora.planning.tables import compare_plans, describe_plan, describe_profile
from e2lora.profile import measure_profile
from e2lora.profile_cache import ProfileCache
from e2lora.records import write_json
from e2lora.targets import find_targets, layers_without
from e2lora.tasks import load_task
from e2lora.tokens import tokenised


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


def title_of(model: str, task: str) -> str:
    return f"{Path(model).name} on {Path(task).name}"


# ---- what it would cost -------------------------------------------------------------------------


def dry_run(request: Request) -> str:
    """Counts, memory and time as text; reads rows, tokenizer and configuration, no weights.

    Raises:
        ValueError, OSError: whatever can be known to be wrong beforehand.
    """
    config, task = request.trial, load_task(request.task)
    structure = load_structure(request.model, task.auto_class, task.num_labels)
    targets = find_targets(structure, request.adapter.target_modules)
    for options in request.plans.values():
        require_possible(targets, options)
    data = tokenised(task, load_processor(request.model, task.processor))
    calibration = config.plan.calibration
    numbers = calibration_folds(
        data.lengths,
        calibration.num_samples,
        calibration.num_folds,
        request.seed,
    )
    folds = [[data.train[i] for i in fold] for fold in numbers]
    cost = profile_cost(structure, targets, folds, calibration, request.num_workers)
    lines = [
        f"{title_of(request.model.name, request.task.display_name)}: nothing is measured (dry run)",
        f"{len(targets)} targets; {calibration.num_samples} rows in {len(folds)} folds; per worker "
        f"{cost.tokens:,} tokens ({cost.padded_tokens:,} padded) in {cost.num_microbatches} "
        f"microbatch(es), {cost.num_passes} pass(es)",
        f"memory  about {_size(cost.memory_bytes)}: "
        + ", ".join(f"{_size(size)} {what}" for what, size in cost.memory.items()),
    ]
    if cost.spilled_bytes:
        lines.append(f"disk    {_size(cost.spilled_bytes)} of gradients, for a while")
    device = _device()
    seconds = cost.seconds(flops_per_second(device))
    about = f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"
    lines.append(
        f"time    {about} after loading, by the rate of matrix products on this {device.upper()} "
        f"now ({cost.flops:.2g} operations)"
    )
    lines += [f"note    {note}" for note in _missing(layers_without(structure, targets))]
    for label, options in request.plans.items():
        low, high = parameter_range(targets, options)
        between = f"{low:,}" if low == high else f"between {low:,} and {high:,}"
        depends = "" if low == high else ", depending on the gradients"
        lines.append(f"plan    {label}: {between} LoRA parameters at r={options.r}{depends}")
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


def make_plans(request: Request, out: Path | None = None, profile_file: Path | None = None) -> str:
    """Write profile, plans and pictures; returns the tables, and where all is, as text.

    Args:
        out: the folder to write to; plans of an earlier run there are removed. None: one for this
            model, task, targets and seed, below the default storage.
        profile_file: an existing profile to plan from, instead of measuring one.

    Raises:
        ValueError, OSError: a model, data, targets or options that can't work; a folder that can't
            be written.
    """
    if profile_file:
        profile = read_profile(profile_file)
        out = _folder(out or _default_folder(profile))
    else:
        out = out and _folder(out)  # before the long work, if it is known
        profile = _measured(request)
        out = out or _folder(_default_folder(profile))
    targets = [entry.target for entry in profile.layers]
    plans = {label: build_plan(targets, o, profile) for label, o in request.plans.items()}
    title = title_of(profile.provenance.model, profile.provenance.task)
    pictures = [out / "entropy.png"]
    draw_entropies(pictures[0], profile, title)
    labels = list(plans)
    for first in range(0, len(plans), PLANS_A_PICTURE):
        shown = {label: plans[label] for label in labels[first : first + PLANS_A_PICTURE]}
        number = f"-{first // PLANS_A_PICTURE + 1}" if first else ""
        pictures += [out / f"similarity{number}.png", out / f"ranks{number}.png"]
        draw_similarity(pictures[-2], profile, shown, title)
        draw_ranks(pictures[-1], shown, title)
    for old in (out / "plan.json", *out.glob("plan-*.json")):
        if old.exists() and '"profile_fingerprint"' in old.read_text(encoding="utf-8"):
            old.unlink()  # a plan of an earlier run, and not something else of that name
    files = [out / "profile.json"]
    write_json(files[0], profile)
    for label, plan in plans.items():
        name = "plan.json" if len(plans) == 1 else f"plan-{_file_name(label)}.json"
        files.append(out / name)
        write_json(files[-1], plan)
    names = {label: system_name(plan.options, request.adapter) for label, plan in plans.items()}
    parts = [describe_profile(title, profile), *_missing(profile.layers_without)]
    parts += [describe_plan(f"{label}: {names[label]}", plan) for label, plan in plans.items()]
    if len(plans) > 1:
        parts.append(compare_plans(plans))
    parts.append("\n".join(f"{file.suffix[1:]:<5} {file}" for file in (*files, *pictures)))
    return "\n\n".join(parts)


PLANS_A_PICTURE = 4


def read_profile(file: Path) -> GradientProfile:
    """A profile.json.

    Raises:
        ValueError: it isn't there, or is something else.
    """
    try:
        return GradientProfile.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"a profile must be a file that can be read; {file} is not: {error.strerror}. Name a "
            "profile.json as jobs/plan.py or a study leaves it."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"a profile must be a profile.json of this version; {file} is none (a plan.json can't "
            f"be planned from): {str(error).splitlines()[0]}. Measure it again."
        ) from error


def _default_folder(profile: GradientProfile) -> Path:
    """Of its own for each model, task, targets and seed."""
    p = profile.provenance
    paths = [entry.target.path for entry in profile.layers]
    key = fingerprint_of([p.model, p.model_fingerprint, p.task, p.seed, paths])[:6]
    name = _file_name(title_of(p.model, p.task).replace(" on ", "-"))
    return storage_folder(None) / "plans" / f"{name}-{key}"


def _folder(out: Path) -> Path:
    out = out.expanduser().resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise ValueError(
            f"--out must be a folder that can be written; {out} can't: {error.strerror}. Name "
            "another one."
        ) from error


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "-", label)


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
    base = load_base(
        request.model,
        task.auto_class,
        task.num_labels,
        torch.float32,
        processor=task.processor,
    )
    base.model.to(_device())
    data = tokenised(task, base.processor)
    return measure_profile(base, data, config, on_progress=_Progress(), cache=ProfileCache())


def _measured_on_workers(config: TrialConfig) -> GradientProfile:
    """On a group of a Ray cluster, each worker on its share of the rows."""
    from e2lora.broker import Job
    from e2lora.checkup import require_sound_cluster
    from e2lora.cluster import connect, require_fits
    from e2lora.pool import Pool

    connect()
    spec = GroupSpec.of(config.training)
    require_fits(spec)
    with tempfile.TemporaryDirectory(prefix="e2lora-plan-", dir=Path.cwd()) as folder:
        require_sound_cluster(Path(folder), [spec])
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
