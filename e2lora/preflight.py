"""Configurations → checked plans, before anything is trained: for studies and for single runs.

Structures (shapes without weights) are found once per model, task and target modules; gradient
profiles are measured once per model, task, seed and calibration, on a worker group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e2lora.adapters import FAMILIES, count_adapter_parameters, require_possible_trial
from e2lora.broker import Job, affinity_of
from e2lora.cluster import require_fits
from e2lora.config import (
    AdapterConfig,
    GroupSpec,
    TaskConfig,
    TrainConfig,
    TrialConfig,
    fingerprint_of,
)
from e2lora.data import calibration_rows
from e2lora.models import load_structure
from e2lora.moments import GradientProfile, Target
from e2lora.plan import SharingPlan, build_plan, require_possible
from e2lora.pool import Pool
from e2lora.ranks import rank_for_count
from e2lora.records import SplitsRecord
from e2lora.targets import find_targets
from e2lora.tasks import Task, load_task, require_can_pack
from e2lora.training.activations import require_checkpointable
from e2lora.training.engine import require_known_to_deepspeed
from e2lora.training.stopping import require_metric


class Plans:
    """Checks configurations and builds their plans.

    Args:
        profiles: the folder of gradient profiles.
        min_workers: with how few workers an elastic group may do; None: it isn't elastic.
        may_grow: an autoscaler brings the nodes that the cluster lacks.
    """

    def __init__(
        self, profiles: Path, min_workers: int | None = None, may_grow: bool = False
    ) -> None:
        self._profiles, self._min_workers, self._may_grow = profiles, min_workers, may_grow
        self._tasks: dict[str, Task] = {}
        self._structures: dict[str, Any] = {}
        self._fitting: set[GroupSpec] = set()
        self._ranks: dict[str, int] = {}  # that meet a target of parameters

    def targets(self, config: TrialConfig) -> tuple[Target, ...]:
        """What the trial adapts; raises what loading the data or the model's structure does."""
        return find_targets(self._structure(config), config.adapter.target_modules)

    def _structure(self, config: TrialConfig) -> Any:
        task = self.task(config)
        key = fingerprint_of([config.model.fingerprint(), config.task.fingerprint()])
        if key not in self._structures:
            self._structures[key] = load_structure(config.model, task.auto_class, task.num_labels)
        return self._structures[key]

    def task(self, config: TrialConfig) -> Task:
        """Its data are loaded once."""
        key = config.task.fingerprint()
        if key not in self._tasks:
            self._tasks[key] = load_task(config.task)
            for line in _splits_of(self._tasks[key]).told():
                print(f"note: {line}", flush=True)
        return self._tasks[key]

    @property
    def splits(self) -> list[SplitsRecord]:
        """The rows of every task that was read so far."""
        return [_splits_of(task) for task in self._tasks.values()]

    def num_steps(self, config: TrialConfig) -> int:
        """How many steps a trial will take, if it isn't stopped early."""
        return config.training.for_rows(self.task(config).num_rows("train")).num_steps

    def group_spec(self, config: TrialConfig) -> GroupSpec:
        """The kind of worker group that serves this configuration."""
        return GroupSpec.of(config.training, self._min_workers)

    def check(self, config: TrialConfig) -> None:
        """Everything that can be known to be wrong before anything is trained.

        Raises:
            ValueError, OSError: a model, data, target, rank or worker request that can't work.
        """
        spec = self.group_spec(config)
        if spec not in self._fitting:  # asked once: a node that is away for a while comes back
            if not self._may_grow:
                require_fits(spec)
            self._fitting.add(spec)
        task, training = self.task(config), config.training
        if training.packing:
            require_can_pack(config.task)
        require_metric(training.early_stopping, task.directions)
        require_known_to_deepspeed(training)
        family = FAMILIES[config.adapter.family]
        if config.plan.needs_profile or family.needs_gradients:
            calibration_rows(
                task.num_rows("train"), config.plan.calibration.num_samples, config.seed
            )
        known = training.for_rows(task.num_rows("train"))
        require_possible_trial(config.model_copy(update={"training": known}))
        targets = self.targets(config)
        require_possible(targets, config.plan)
        if not config.plan.needs_profile:
            config = self._at_target(config, None)
            _require_fits(build_plan(targets, config.plan), config, known)

    def measure_profiles(self, configs: Iterable[TrialConfig], pool: Pool) -> None:
        """Measure, on the pool, what profiles these configurations need and the folder lacks."""
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

    def planned(self, config: TrialConfig, pool: Pool) -> tuple[TrialConfig, SharingPlan]:
        """The plan, and the configuration at the rank that meets its target of parameters.

        A profile that isn't there yet is measured on a group before.

        Raises:
            ValueError: a plan that can't be made, or doesn't fit the family.
            JobFailed: the profile could not be measured.
        """
        profile = self._profile(config, pool) if config.plan.needs_profile else None
        config = self._at_target(config, profile)
        plan = build_plan(self.targets(config), config.plan, profile)
        known = config.training.for_rows(self.task(config).num_rows("train"))
        _require_fits(plan, config, known)
        return config, plan

    def _at_target(self, config: TrialConfig, profile: GradientProfile | None) -> TrialConfig:
        options, targets = config.plan, self.targets(config)
        if options.target_parameters is None:
            return config

        def count(r: int) -> int:
            counted = count_adapter_parameters(
                build_plan(targets, options.at_rank(r), profile), config.adapter
            )
            if counted is None:
                raise ValueError(
                    "target_parameters chooses a rank, and full fine-tuning has none; got "
                    f"target_parameters={options.target_parameters}. Remove it for this family."
                )
            return counted

        most = min(min(t.in_features, t.out_features) for t in targets)
        key = fingerprint_of(
            [
                options.at_rank(1).fingerprint(),
                config.adapter.fingerprint(),
                [t.model_dump() for t in targets],
                profile.fingerprint() if profile else None,
            ]
        )
        if key not in self._ranks:
            self._ranks[key] = rank_for_count(options.target_parameters, count, most)
        return config.model_copy(update={"plan": options.at_rank(self._ranks[key])})

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
            spec = self.group_spec(config)
            key = f"profile-{file.stem}"
            pool.run(Job(key, "profile", spec, payload, affinity_of(config)))
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
        return self._profiles / f"{key}.json"


def _splits_of(task: Task) -> SplitsRecord:
    return SplitsRecord(
        task=task.config.display_name,
        rows={split: task.num_rows(split) for split in task.splits},
        duplicates=dict(task.duplicates),
    )


def _require_fits(plan: SharingPlan, config: TrialConfig, known: TrainConfig) -> None:
    """
    Args:
        known: its training, as long as it is on its rows.
    """
    family = FAMILIES[config.adapter.family]
    family.require_fits(plan, config.adapter)
    family.require_reaches(plan, config.model_copy(update={"training": known}))
    require_checkpointable(plan, config.adapter, config.training)


def with_absolute_paths(config: TrialConfig) -> TrialConfig:
    """Local files by their absolute path: workers don't run in the folder of this process."""
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": _absolute(config.model.name)}),
            "task": config.task.model_copy(update=_absolute_places(config.task)),
        }
    )


def _absolute_places(task: TaskConfig) -> dict[str, str]:
    places = {"data": task.data, "test_data": task.test_data}
    return {field: _absolute(name) for field, name in places.items() if name is not None}


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def differences(old: TrialConfig, new: TrialConfig) -> list[str]:
    """The fields in which two configurations differ, each with both values."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return [f"{key}: was {a.get(key)!r}, is {b.get(key)!r}" for key in keys]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value)
    return flat
