"""From the words of a command line to plans: what ``jobs/plan.py`` calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter

from e2lora.cluster import is_of_the_cluster
from e2lora.command import default_storage, find_study, run_for_user
from e2lora.config import (
    NEEDS_PAIRS,
    PRESETS,
    AdapterConfig,
    AnyTaskConfig,
    CalibrationConfig,
    ModelConfig,
    PlanConfig,
    TrialConfig,
)
from e2lora.planning import Request, dry_run, make_plans
from e2lora.search.plans import sample_configurations

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Words:
    """What a command line says; what it leaves out is as in the first point of its space."""

    space: str
    model: str | None = None
    task: Sequence[str] | None = None
    targets: Sequence[str] | None = None
    calibration: Sequence[str] = ()
    plans: Sequence[Sequence[str]] | None = None
    seed: int | None = None
    num_workers: int = 1


def plan_command(words: Words, profile: Path | None, out: Path | None, dry: bool) -> int:
    """Plan, or say what it would cost; prints, and returns an exit code (2: it can't be done).

    Args:
        profile: an existing profile.json to plan from.
        out: the folder to write to; None: below the default storage.
        dry: counts, memory and time only.
    """

    def run() -> int:
        if profile:
            _require_nothing_else(words, dry)
        request = request_of(words)
        if dry:
            print(dry_run(request))
            return 0
        folder = out or default_storage() / "plans" / request.title.replace(" on ", "-")
        print(make_plans(request, folder.expanduser().resolve(), profile))
        return 0

    return run_for_user(run, "nothing was written", is_of_the_cluster)


def request_of(words: Words) -> Request:
    """Configurations from words.

    Raises:
        ValueError: an unknown space, preset or option, or a value of the wrong kind.
    """
    first = _first_point(words.space)
    calibration = calibration_of(words.calibration, first.plan.calibration)
    return Request(
        model=ModelConfig(name=words.model) if words.model else first.model,
        task=task_of(words.task) if words.task else first.task,
        adapter=AdapterConfig(target_modules=tuple(words.targets))
        if words.targets
        else AdapterConfig(target_modules=first.adapter.target_modules),
        plans=plans_of(words.plans or [["e2"]], calibration),
        seed=first.seed if words.seed is None else words.seed,
        num_workers=words.num_workers,
    )


def _require_nothing_else(words: Words, dry: bool) -> None:
    """With a profile, what was measured is given.

    Raises:
        ValueError: naming the options that would have no effect.
    """
    given = {
        "--model": words.model,
        "--task": words.task,
        "--targets": words.targets,
        "--calibration": words.calibration,
        "--seed": words.seed is not None,
        "--workers": words.num_workers > 1,
        "--dry-run": dry,
    }
    idle = [option for option, value in given.items() if value]
    if idle:
        raise ValueError(
            "--profile says what was measured, so other options than --plan and --out would have "
            f"no effect; got {', '.join(idle)} too. Remove them, or --profile."
        )


def _first_point(space: str) -> TrialConfig:
    study = find_study(space)
    if not study.points:
        raise ValueError(
            f"--space gives model, task and targets by its study's first point; {space!r} has no "
            "points. Add one, or name another space."
        )
    return sample_configurations(study, num_drawn=0)[0]


def plans_of(
    wanted: Sequence[Sequence[str]], calibration: CalibrationConfig
) -> dict[str, PlanConfig]:
    """Options by label, from words such as ``["e2", "r=16", "similarity=cosine"]``.

    The first word is a preset or a topology. Pairs of layers are measured where any plan needs
    them, so that all share one profile.

    Raises:
        ValueError: an unknown preset or option, or the same plan twice.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for name, *words in wanted:
        preset = PRESETS.get(name, {"topology": name})
        chosen[" ".join([name, *words])] = {**preset, **_pairs_of(words)}
    if len(chosen) < len(wanted):
        raise ValueError(f"each --plan must differ from the others; got {list(wanted)}.")
    if any(options.get("similarity") in NEEDS_PAIRS for options in chosen.values()):
        calibration = calibration.model_copy(update={"pairwise": True})
    return {
        label: _validated(PlanConfig, {**options, "calibration": calibration.model_dump()})
        for label, options in chosen.items()
    }


def task_of(words: Sequence[str]) -> AnyTaskConfig:
    """A task from words such as ``["sft", "data=openai/gsm8k", "subset=main"]``."""
    kind, *pairs = words
    return TypeAdapter(AnyTaskConfig).validate_json(json.dumps({"kind": kind, **_pairs_of(pairs)}))


def calibration_of(words: Sequence[str], base: CalibrationConfig) -> CalibrationConfig:
    """``base`` with what the words, such as ``num_samples=512``, say."""
    return _validated(CalibrationConfig, {**base.model_dump(), **_pairs_of(words)})


def _validated(kind: type[Config], values: dict[str, Any]) -> Config:
    return kind.model_validate_json(json.dumps(values))


def _pairs_of(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words; a value that is JSON is read as such, any other is a text.

    >>> _pairs_of(["r=16", "similarity=cosine", "use_rslora=true"])
    {'r': 16, 'similarity': 'cosine', 'use_rslora': True}
    """
    pairs = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ValueError(f"options are written KEY=VALUE; got {word!r}.")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs
