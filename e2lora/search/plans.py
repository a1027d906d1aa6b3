"""Configurations → checked plans, before any trial runs: the study's preflight and plan room.

Structures (shapes without weights) are found once per model, task and target modules; gradient
profiles are measured once per model, task, seed and calibration, on a worker group, and kept in
the study's folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from e2lora.models import find_targets, load_structure
from e2lora.moments import GradientProfile, Target
from e2lora.partition import NEEDS_PROFILE
from e2lora.plan import SharingPlan, build_plan
from e2lora.pool import Pool
from e2lora.records import StudyFolder
from e2lora.tasks import Task, load_task


class Plans:
    """Builds the plan of any configuration of a study."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._tasks: dict[str, Task] = {}
        self._structures: dict[str, Any] = {}

    def targets(self, config: TrialConfig) -> tuple[Target, ...]:
        """What the trial adapts; raises what loading the data or the model's structure does."""
        task_key = config.task.fingerprint()
        if task_key not in self._tasks:
            self._tasks[task_key] = load_task(config.task)
        task = self._tasks[task_key]
        key = fingerprint_of([config.model.fingerprint(), task_key])
        if key not in self._structures:
            self._structures[key] = load_structure(config.model, task.auto_class, task.num_labels)
        return find_targets(self._structures[key], config.adapter.target_modules)

    def check(self, config: TrialConfig) -> None:
        """Everything that can be known to be wrong before anything is trained.

        Raises:
            ValueError, OSError: a model, data, target, rank or worker request that can't work.
        """
        require_fits(GroupSpec.of(config.training))
        without_profile = {"topology": "none", "block_size": None}
        needs_profile = config.plan.topology in NEEDS_PROFILE
        options = config.plan.model_copy(update=without_profile if needs_profile else {})
        build_plan(self.targets(config), options)

    def measure_profiles(self, configs: Iterable[TrialConfig], pool: Pool) -> None:
        """Measure, on the pool, what profiles these configurations need and the study lacks."""
        wanting = {
            self.profile_file(config): config
            for config in map(with_absolute_paths, configs)
            if config.plan.topology in NEEDS_PROFILE
        }
        missing = [config for file, config in wanting.items() if not file.exists()]
        if missing:
            print(f"measuring {len(missing)} gradient profile(s) as groups come up", flush=True)
        for config in missing:
            self._profile(config, pool)

    def plan_for(self, config: TrialConfig, pool: Pool) -> SharingPlan:
        """The plan, after measuring the profile on a group if it isn't there yet."""
        self.check(config)
        if config.plan.topology not in NEEDS_PROFILE:
            return build_plan(self.targets(config), config.plan)
        return build_plan(self.targets(config), config.plan, self._profile(config, pool))

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


def configurations_of_points(study: Study) -> list[TrialConfig]:
    """What the enqueued points of a study are, without a ledger.

    Raises:
        ValueError: a point that the space doesn't accept, with the point.
    """
    import optuna

    configurations = []
    for point in study.points:
        try:
            configurations.append(study.space(optuna.trial.FixedTrial(dict(point))))
        except ValueError as error:
            raise ValueError(
                f"every point of a study must be one that its space accepts; {dict(point)} is "
                f"not: {in_one_paragraph(error)}"
            ) from error
    return configurations


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


def require_declared(study: Study, configurations: Iterable[TrialConfig]) -> None:
    """A space may only return models, tasks and seeds that its study declares.

    Raises:
        ValueError: naming what is not declared.
    """
    for config in configurations:
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
