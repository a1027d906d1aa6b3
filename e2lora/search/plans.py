"""Configurations → checked plans, before any trial runs: the study's preflight and plan room.

Structures (shapes without weights) are found once per model, task and target modules; gradient
profiles are measured once per model, task, seed and calibration, on a worker group, and kept in
the study's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna

from e2lora.adapters import FAMILIES, count_adapter_parameters, require_possible_trial
from e2lora.broker import Job
from e2lora.cluster import require_fits
from e2lora.config import (
    AdapterConfig,
    GroupSpec,
    Study,
    TrialConfig,
    fingerprint_of,
    in_one_paragraph,
)
from e2lora.data import calibration_rows
from e2lora.models import load_structure
from e2lora.moments import GradientProfile, Target
from e2lora.plan import SharingPlan, build_plan, require_possible
from e2lora.pool import Pool
from e2lora.records import StudyFolder
from e2lora.targets import find_targets
from e2lora.tasks import Task, load_task


class Plans:
    """Builds the plan of any configuration of a study."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._tasks: dict[str, Task] = {}
        self._structures: dict[str, Any] = {}
        self._fitting: set[GroupSpec] = set()

    def targets(self, config: TrialConfig) -> tuple[Target, ...]:
        """What the trial adapts; raises what loading the data or the model's structure does."""
        return find_targets(self._structure(config), config.adapter.target_modules)

    def _structure(self, config: TrialConfig) -> Any:
        task = self._task(config)
        key = fingerprint_of([config.model.fingerprint(), config.task.fingerprint()])
        if key not in self._structures:
            self._structures[key] = load_structure(config.model, task.auto_class, task.num_labels)
        return self._structures[key]

    def _task(self, config: TrialConfig) -> Task:
        key = config.task.fingerprint()
        if key not in self._tasks:
            self._tasks[key] = load_task(config.task)
        return self._tasks[key]

    def check(self, config: TrialConfig, study: Study) -> None:
        """Everything that can be known to be wrong before anything is trained.

        Raises:
            ValueError, OSError: an undeclared part; a model, data, target, rank, objective or
                worker request that can't work.
        """
        require_declared(study, config)
        spec = GroupSpec.of(config.training)
        if spec not in self._fitting:  # asked once: a node that is away for a while comes back
            require_fits(spec)
            self._fitting.add(spec)
        _require_known_objectives(study, self._task(config))
        family = FAMILIES[config.adapter.family]
        if config.plan.needs_profile or family.needs_gradients:
            calibration_rows(
                self._task(config).num_rows("train"),
                config.plan.calibration.num_samples,
                config.seed,
            )
        require_possible_trial(config)
        targets = self.targets(config)
        require_possible(targets, config.plan)
        if not config.plan.needs_profile:
            family.require_fits(build_plan(targets, config.plan), config.adapter)

    def measure_profiles(self, configs: Iterable[TrialConfig], pool: Pool) -> None:
        """Measure, on the pool, what profiles these configurations need and the study lacks."""
        wanting = {
            self.profile_file(config): config
            for config in map(with_absolute_paths, configs)
            if config.plan.needs_profile
        }
        missing = [config for file, config in wanting.items() if not file.exists()]
        if missing:
            print(f"measuring {len(missing)} gradient profile(s) as groups come up", flush=True)
        for config in missing:
            self._profile(config, pool)

    def plan_for(self, config: TrialConfig, pool: Pool) -> SharingPlan:
        """The plan, after measuring the profile on a group if it isn't there yet."""
        profile = self._profile(config, pool) if config.plan.needs_profile else None
        plan = build_plan(self.targets(config), config.plan, profile)
        FAMILIES[config.adapter.family].require_fits(plan, config.adapter)
        return plan

    def count(self, config: TrialConfig, plan: SharingPlan) -> int:
        """Trainable adapter parameters; of full fine-tuning all, what may be a head among them."""
        counted = count_adapter_parameters(plan, config.adapter)
        if counted is not None:
            return counted
        return sum(parameter.numel() for parameter in self._structure(config).parameters())

    def _profile(self, config: TrialConfig, pool: Pool) -> GradientProfile:
        file = self.profile_file(config)
        if not file.exists():
            payload = {"config": config.model_dump_json(), "file": str(file)}
            spec = GroupSpec.of(config.training)
            pool.run(Job(f"profile-{file.stem}", "profile", spec, payload))
        return GradientProfile.model_validate_json(file.read_text())

    def profile_file(self, config: TrialConfig) -> Path:
        """One per what a profile depends on; the trial's other options don't matter to it."""
        adapter: AdapterConfig = config.adapter
        key = fingerprint_of(
            [
                config.model.fingerprint(),
                config.task.fingerprint(),
                config.plan.calibration.fingerprint(),
                sorted(adapter.target_modules),
                config.seed,
                config.training.precision,
            ]
        )
        return self._folder.profiles / f"{key}.json"


def configuration_of(study: Study, trial: Any) -> TrialConfig:
    """What the study's space makes of a trial's suggestions.

    Raises:
        ValueError: whatever the space raises.
    """
    try:
        return study.space(trial)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"a study's space must return a configuration; it raised {type(error).__name__}: "
            f"{error}. Correct the space."
        ) from error


def configuration_of_point(study: Study, point: Mapping[str, Any]) -> TrialConfig:
    """Of one of the study's points.

    Raises:
        ValueError: the space doesn't accept it; the message names the point.
    """
    try:
        return configuration_of(study, optuna.trial.FixedTrial(dict(point)))
    except ValueError as error:
        raise ValueError(f"{in_one_paragraph(error)} (point {dict(point)})") from error


def checked_configurations(study: Study, plans: Plans, num_drawn: int = 4) -> list[TrialConfig]:
    """What the study's points are, and some that its space draws at random, without a ledger.

    A space may offer combinations that can't be trained: one that is drawn is told, and is not
    among these. A point must be such as can be trained.

    Raises:
        ValueError, OSError: what the space or :meth:`Plans.check` refuses at a point, or at every
            draw of a study without points.
    """
    configurations = [configuration_of_point(study, point) for point in study.points]
    for point, config in zip(study.points, configurations, strict=True):
        try:
            plans.check(config, study)
        except ValueError as error:
            raise ValueError(f"{in_one_paragraph(error)} (point {dict(point)})") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=study.seeds[0]))
    refusals = []
    for trial in (drawing.ask() for _ in range(num_drawn)):
        try:
            config = configuration_of(study, trial)
            plans.check(config, study)
            configurations.append(config)
        except ValueError as error:
            refusals.append(f"{in_one_paragraph(error)} (drawn {trial.params})")
    if not configurations:
        raise ValueError(refusals[0])
    if refusals:
        print(
            f"note: {len(refusals)} of {num_drawn} configurations drawn from the space can't be "
            f"trained; such trials will be failed: {refusals[0]}",
            flush=True,
        )
    return configurations


def _require_known_objectives(study: Study, task: Task) -> None:
    known = {*task.metric_names, "train_loss", "adapter_parameters"}
    unknown = [o.name for o in study.objectives if o.name not in known]
    if unknown:
        raise ValueError(
            f"a study's objectives must be metrics of its tasks; {task.config.display_name!r} has "
            f"{sorted(known)}, not {unknown}. Correct the study's `objectives`."
        )


def with_absolute_paths(config: TrialConfig) -> TrialConfig:
    """Local files by their absolute path: workers don't run in the folder of this process."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": _absolute(config.model.name)}),
            "task": config.task.model_copy(update={"data": _absolute(config.task.data)}),
        }
    )


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def require_declared(study: Study, config: TrialConfig) -> None:
    """A space may only return models, tasks and seeds that its study declares.

    Raises:
        ValueError: naming what is not declared.
    """
    for name, value, declared in (
        ("model", config.model, study.models),
        ("task", config.task, study.tasks),
        ("seed", config.seed, study.seeds),
    ):
        if value not in declared:
            raise ValueError(
                f"the space of a study may only return what the study declares; {name} "
                f"{value!r} is not in {declared!r}. Add it to the study."
            )
