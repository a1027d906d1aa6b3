"""What a study will cost: a few steps of each kind of trial, measured, times what is planned.

The call, before anything of the study runs::

    with Pool(...) as pool:
        told = estimate(planned, num_further, plans, pool, storage)
    print(told.table())

``planned`` holds a :class:`Planned` for each cell (its ``num_trials``: the values of the grid) and
for each point; ``num_further``: trials of the sampler beyond them, taken to cost as much as the
others on average. Nothing is recorded in the study; gradient profiles that plans need are measured
and stay in the cache of profiles, where the study finds them.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2lora.broker import Job, affinity_of
from e2lora.config import GroupSpec, TrainConfig, TrialConfig
from e2lora.fleet import smallest
from e2lora.pool import JobFailed, Pool
from e2lora.preflight import Plans
from e2lora.records import TrialFolder, write_json
from e2lora.text_table import text_table

STEPS_BETWEEN = 4
"""Steps before each of the two evaluations of a measurement."""


@dataclass(frozen=True)
class Planned:
    """Trials that are alike: a cell of the study, or a point.

    Attributes:
        config: of one of them, checked.
        parameters: of its adapter.
    """

    label: str
    config: TrialConfig
    parameters: int
    num_trials: int


@dataclass(frozen=True)
class Measured:
    """Seconds of a step, of an evaluation with what is saved after it, and of a trial's beginning
    and end; and the most memory that a worker held.
    """

    step: float
    evaluation: float
    ends: float
    memory_gib: float

    def seconds(self, num_steps: int, eval_every: int | None) -> float:
        """Of a whole trial.

        >>> Measured(step=0.5, evaluation=2.0, ends=3.0, memory_gib=1.0).seconds(100, 40)
        59.0
        """
        evaluations = math.ceil(num_steps / eval_every) if eval_every else 1
        return num_steps * self.step + evaluations * self.evaluation + self.ends


@dataclass(frozen=True)
class Row:
    """A planned set of trials with its cost."""

    planned: Planned
    num_steps: int
    trial_seconds: float
    memory_gib: float
    spec: GroupSpec

    @property
    def worker_seconds(self) -> float:
        return self.planned.num_trials * self.trial_seconds * smallest(self.spec)


@dataclass(frozen=True)
class Estimate:
    """Of a whole study. ``slots``: groups of each kind that the cluster holds at once."""

    rows: tuple[Row, ...]
    num_further: int
    slots: Mapping[GroupSpec, int]

    @property
    def num_trials(self) -> int:
        return sum(row.planned.num_trials for row in self.rows) + self.num_further

    @property
    def _growth(self) -> float:
        """Of all trials over the planned ones."""
        return self.num_trials / max(1, self.num_trials - self.num_further)

    @property
    def worker_hours(self) -> float:
        """Of all trials, those of the sampler included."""
        return sum(row.worker_seconds for row in self.rows) * self._growth / 3600

    @property
    def wall_hours(self) -> float:
        """On the cluster as it is; kinds of groups one after another."""
        seconds = 0.0
        for spec, slots in self.slots.items():
            rows = [row for row in self.rows if row.spec == spec]
            total = sum(row.planned.num_trials * row.trial_seconds for row in rows) * self._growth
            longest = max((row.trial_seconds for row in rows), default=0.0)
            seconds += max(total / max(1, slots), longest)
        return seconds / 3600

    @property
    def memory_gib(self) -> float:
        """The most that one worker will hold."""
        return max(row.memory_gib for row in self.rows)

    def table(self) -> str:
        """For people."""
        head = ["trials of", "parameters", "trials", "steps", "minutes each", "worker-hours", "GiB"]
        rows = [
            [
                row.planned.label,
                f"{row.planned.parameters:,}",
                str(row.planned.num_trials),
                f"{row.num_steps:,}",
                f"{row.trial_seconds / 60:.1f}",
                f"{row.worker_seconds / 3600:.2f}",
                f"{row.memory_gib:.1f}",
            ]
            for row in self.rows
        ]
        further = f", {self.num_further} of them the sampler's" if self.num_further else ""
        slots = ", ".join(
            f"{number} group(s) of {smallest(spec)} worker(s)"
            for spec, number in self.slots.items()
        )
        return "\n".join(
            [
                text_table(head, rows, right=range(1, 7)),
                "",
                f"{self.num_trials} trials{further}: {self.worker_hours:.2f} worker-hours; "
                f"{self.wall_hours:.2f} hours on {slots}, and start-up",
                f"a worker holds {self.memory_gib:.1f} GiB at most",
            ]
        )


def estimate(
    planned: Sequence[Planned], num_further: int, plans: Plans, pool: Pool, storage: Path
) -> Estimate:
    """Measure one trial of each kind, for a few steps, and add up.

    Args:
        num_further: trials beyond the planned ones.
        storage: a folder that all nodes share; what is written there is removed again.

    Raises:
        JobFailed: with the label of what can't be trained, and why.
    """
    measured: dict[tuple[object, ...], Measured] = {}
    rows = []
    for each in planned:
        key = _kind_of(each.config, plans.group_spec(each.config))
        if key not in measured:
            try:
                measured[key] = measure(each.config, plans, pool, storage)
            except JobFailed as error:
                raise JobFailed(f"{each.label}: {error}") from error
        num_steps, training = plans.num_steps(each.config), each.config.training
        seconds = measured[key].seconds(num_steps, training.eval_every)
        spec = plans.group_spec(each.config)
        rows.append(Row(each, num_steps, seconds, measured[key].memory_gib, spec))
    slots = {row.spec: pool.open_slots([row.spec]) for row in rows}
    return Estimate(tuple(rows), num_further, slots)


def _kind_of(config: TrialConfig, spec: GroupSpec) -> tuple[object, ...]:
    """Trials that differ in nothing of this take about as long a step and an evaluation."""
    training = config.training
    return (
        config.model.fingerprint(),
        config.task.fingerprint(),
        config.adapter.family,
        spec,
        training.global_batch_size,
        training.gradient_accumulation_steps,
        training.activation_checkpointing,
        training.packing,
    )


def measure(config: TrialConfig, plans: Plans, pool: Pool, storage: Path) -> Measured:
    """Train this for a few steps with two evaluations, in a folder that is thrown away.

    Raises:
        JobFailed: it can't be trained.
    """
    config, plan = plans.planned(config, pool)
    short = config.model_copy(update={"training": shortened(config.training)})
    storage.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".estimate-", dir=storage) as place:
        folder = TrialFolder(Path(place))
        write_json(folder.plan_file, plan)
        payload = {"config": short.model_dump_json(), "folder": place}
        spec = plans.group_spec(config)
        key = f"estimate-{folder.path.name}"
        told: dict[int, float] = {}  # number of evaluations → when they were heard of
        for update in pool.updates(Job(key, "trial", spec, payload, affinity_of(config))):
            told.setdefault(len(update.evaluations), time.monotonic())
    if update.result is None:
        raise JobFailed(update.error or "it was stopped")
    return read(update.history, update.result["seconds"], told)


def shortened(training: TrainConfig) -> TrainConfig:
    """The same steps, few of them, with an evaluation half-way and one at the end."""
    changes = {
        "max_steps": 2 * STEPS_BETWEEN,
        "num_epochs": None,
        "eval_every": STEPS_BETWEEN,
        "checkpoint_every": None,
        "warmup_steps": 0,
        "warmup_ratio": None,
        "early_stopping": None,
    }
    return TrainConfig.model_validate({**training.model_dump(), **changes})


def read(
    history: Mapping[str, Sequence[float]], seconds: float, told: Mapping[int, float]
) -> Measured:
    """What a short trial shows.

    Args:
        history: of its steps; the first one, which warms everything up, counts to the ends.
        seconds: of the trial, without loading.
        told: number of evaluations → when they were heard of. Without the time between the two, an
            evaluation is taken to cost half of all that is beside the steps.

    >>> history = {"seconds": [3.0, *[1.0] * 7], "peak_memory_gib": [1.0] * 7 + [2.0]}
    >>> read(history, seconds=20.0, told={0: 90.0, 1: 100.0, 2: 107.0})
    Measured(step=1.0, evaluation=3.0, ends=6.0, memory_gib=2.0)
    """
    steps = list(history["seconds"])
    step = statistics.median(steps[1:])
    beside = seconds - sum(steps)
    evaluation = beside / 2
    if 1 in told and 2 in told:
        between = told[2] - told[1] - sum(steps[STEPS_BETWEEN:])
        evaluation = min(max(between, 0.0), evaluation)
    ends = max(0.0, beside - 2 * evaluation) + max(0.0, steps[0] - step)
    return Measured(step, evaluation, ends, max(history["peak_memory_gib"]))
