"""From the words of a command line to plans: what ``jobs/plan.py`` calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from e2lora.cluster import is_of_the_cluster
from e2lora.command import find_study, pairs_of, run_for_user
from e2lora.config import (
    NEEDS_PAIRS,
    PRESETS,
    TASK_CONFIGS,
    TASK_PRESETS,
    AdapterConfig,
    AnyTaskConfig,
    CalibrationConfig,
    ModelConfig,
    PlanConfig,
    TrialConfig,
    fingerprint_of,
)
from e2lora.partition import TOPOLOGIES
from e2lora.planning import Request, dry_run, make_plans
from e2lora.search.plans import configuration_of_point

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Words:
    """What a command line says; what it leaves out is as in the first point of its space."""

    space: str
    model: Sequence[str] | None = None
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
        else:
            print(make_plans(request, out, profile))
        return 0

    return run_for_user(run, "nothing was written", is_of_the_cluster)


def request_of(words: Words) -> Request:
    """Configurations from words.

    Raises:
        ValueError: an unknown space, preset or option, or a value of the wrong kind.
    """
    if words.num_workers < 1:
        raise ValueError(f"--workers must be at least 1; got {words.num_workers}.")
    first = _first_point(words.space)
    calibration = calibration_of(words.calibration, first.plan.calibration)
    return Request(
        model=model_of(words.model) if words.model else first.model,
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
    if not study.given:
        raise ValueError(
            f"--space gives model, task and targets by its study's first point; {space!r} has no "
            "points. Add one, or name another space."
        )
    return configuration_of_point(study, study.given[0])


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
        if name not in (*PRESETS, *TOPOLOGIES):
            raise ValueError(
                f"--plan begins with a preset ({', '.join(PRESETS)}) or a topology "
                f"({', '.join(TOPOLOGIES)}); got {name!r}. Put one of them before the options."
            )
        options = pairs_of("--plan", words)
        for key, remedy in (
            ("topology", "it is the first word"),
            ("calibration", "use --calibration, for all plans together"),
        ):
            if key in options:
                raise ValueError(f"--plan takes no option {key!r}: {remedy}.")
        options = {**PRESETS.get(name, {"topology": name}), **options}
        label = " ".join([name, *words])
        if len(label) > LONGEST_LABEL:
            label = f"{name}-{fingerprint_of(options)[:4]}"
        chosen[label] = options
    if any(options.get("similarity") in NEEDS_PAIRS for options in chosen.values()):
        calibration = calibration.model_copy(update={"pairwise": True})
    given = calibration.model_dump()
    plans = {
        label: _validated(PlanConfig, "--plan", {**options, "calibration": given})
        for label, options in chosen.items()
    }
    if len(set(plans.values())) < len(wanted):
        given_words = [" ".join(words) for words in wanted]
        raise ValueError(
            f"each --plan must differ from the others; got {given_words}. Remove what is the same "
            "plan twice."
        )
    return plans


LONGEST_LABEL = 32


def model_of(words: Sequence[str]) -> ModelConfig:
    """A model from words such as ``["organisation/name", "revision=main"]``."""
    name, *pairs = words
    return _validated(ModelConfig, "--model", {"name": name, **pairs_of("--model", pairs)})


def task_of(words: Sequence[str]) -> AnyTaskConfig:
    """A task from words such as ``["sft", "data=openai/gsm8k", "subset=main"]``, or ``["gsm8k"]``.

    The first word is a kind of task, or a preset, whose options the others change.
    """
    kind, *pairs = words
    if kind not in (*TASK_CONFIGS, *TASK_PRESETS):
        raise ValueError(
            f"--task begins with a kind of task ({', '.join(TASK_CONFIGS)}) or a preset "
            f"({', '.join(TASK_PRESETS)}); got {kind!r}. Put one of them before the options."
        )
    options = pairs_of("--task", pairs)
    if kind in TASK_PRESETS:
        task = TASK_PRESETS[kind].task
        kind, options = task.kind, {**task.model_dump(mode="json"), **options}
    config: Any = _validated(TASK_CONFIGS[kind], "--task", options)
    return config


def calibration_of(words: Sequence[str], base: CalibrationConfig) -> CalibrationConfig:
    """``base`` with what the words, such as ``num_samples=512``, say."""
    given = pairs_of("--calibration", words)
    return _validated(CalibrationConfig, "--calibration", {**base.model_dump(), **given})


def _validated(kind: type[Config], option: str, values: dict[str, Any]) -> Config:
    unknown = sorted(set(values) - set(kind.model_fields))
    if unknown:
        raise ValueError(
            f"{option} has no option {', '.join(map(repr, unknown))}; known: "
            f"{', '.join(kind.model_fields)}. Correct its name."
        )
    return kind.model_validate_json(json.dumps(values))
