"""A study on disk: where everything lies, and the records that stand there.

STORAGE/STUDY/
  study.json                 StudyRecord
  data.json                  SplitsRecord of each task: how many rows, and which stand twice
  optuna.journal             the ledger of trials
  answered.json              suggestions that needed no training, and why
  profiles/KEY.json          GradientProfile, one per model x task x seed x calibration
  weights/KEY.json           which weights each model had when the first trial began
  trials/00007/
    suggestion.json          Suggestion: where its configuration comes from
    trial.json               TrialConfig
    plan.json                SharingPlan
    metrics.jsonl            Evaluation, one line each
    outcomes.json            of the weights that are kept: by metric, a number per validation row
    predictions.jsonl        … what the model said of each validation row, and what is right
    test_outcomes.json  test_predictions.jsonl   … of the test rows, of runs that score them
    steps.json               what was measured at each step: a list for each, by step
    result.json              TrialResult: written last, when the trial has ended
    checkpoints/  adapter/
  seeds/                     chosen configurations over seeds: a ledger and trials/ as above
  report/                    report.html, pareto.png, …
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from e2lora.config import AnyTaskConfig, Frozen, ModelConfig, Objective, Pruner, TrialConfig
from e2lora.patience import patiently
from e2lora.plan import SharingPlan


class Evaluation(Frozen):
    """Metrics after ``step`` optimiser steps."""

    step: int
    metrics: dict[str, float]


Failure = Literal["refused", "diverged", "memory", "error", "lost"]
"""Why a trial failed: before it ran; by a loss that isn't finite; for want of memory; by an error;
by losing every attempt to something outside of it. The first two are the configuration's own."""


class TrialResult(Frozen):
    """How a trial ended. ``metrics`` are of the weights that are kept, empty if it has none.

    Attributes:
        state: ``stopped``: by the study's pruner, on its way; its metrics are no final ones.
        test_metrics: only of final runs: a search does not look at test rows.
    """

    number: int
    state: Literal["complete", "stopped", "failed"]
    failure: Failure | None = None
    metrics: dict[str, float]
    adapter_parameters: int
    head_parameters: int
    seconds: float
    attempts: int
    test_metrics: dict[str, float] = Field(default={})
    error: str | None = None
    gradient_accumulation_steps: int | None = None

    def value(self, objective: str) -> float:
        """An objective by its name: a metric, or ``adapter_parameters``."""
        if objective == "adapter_parameters":
            return float(self.adapter_parameters)
        return self.metrics[objective]


class Suggestion(Frozen):
    """Where a trial's configuration comes from.

    Attributes:
        origin: the quota that each cell of the study has; a point that the study names; the
            sampler; or a run of a chosen trial's configuration over seeds.
        params: what the space was told.
        chosen: of a run over seeds: the number of the trial whose configuration it has.
        identity: of plan and options: trials of one identity would be the same; empty where
            none could be made.
    """

    origin: Literal["quota", "point", "sampler", "seeds"]
    params: dict[str, Any]
    chosen: int | None = None
    identity: str = ""


class StudyRecord(Frozen):
    """What a study is, so that a report can be made from its folder alone.

    Attributes:
        quota: full trials that each cell has before the sampler chooses.
    """

    name: str
    space: str
    models: tuple[ModelConfig, ...]
    tasks: tuple[AnyTaskConfig, ...]
    objectives: tuple[Objective, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    num_cells: int = 0
    quota: int = 0
    sampler: str = "tpe"
    pruner: Pruner | None = None
    max_parameters: int | None = None


class SplitsRecord(Frozen):
    """The rows that a task was read as.

    Attributes:
        rows: of each split.
        duplicates: ``"train/test"`` → test rows with exactly the inputs of a training row.
    """

    task: str
    rows: dict[str, int]
    duplicates: dict[str, int]

    def told(self) -> list[str]:
        """A line for each pair of splits that share rows."""
        lines = []
        for pair, count in self.duplicates.items():
            first, _, second = pair.partition("/")
            if count:
                lines.append(
                    f"{count:,} of the {self.rows[second]:,} {second} rows of {self.task} have "
                    f"exactly the inputs of a {first} row."
                )
        return lines


SPLITS_RECORDS = TypeAdapter(list[SplitsRecord])


class TrialFolder:
    """Paths and readers of one trial."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result_file = path / "result.json"
        self.metrics_file = path / "metrics.jsonl"
        self.outcomes_file = path / "outcomes.json"
        self.predictions_file = path / "predictions.jsonl"
        self.test_outcomes_file = path / "test_outcomes.json"
        self.test_predictions_file = path / "test_predictions.jsonl"
        self.steps_file = path / "steps.json"
        self.config_file = path / "trial.json"
        self.plan_file = path / "plan.json"
        self.suggestion_file = path / "suggestion.json"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"

    @property
    def number(self) -> int:
        """Of a study's trial, in the ledger."""
        return int(self.path.name)

    def siblings(self) -> list[TrialFolder]:
        """All trials of its study that hold a configuration, itself among them, by number."""
        files = sorted(self.path.parent.glob("*/trial.json"))
        return [TrialFolder(file.parent) for file in files]

    def config(self) -> TrialConfig:
        return TrialConfig.model_validate_json(self.config_file.read_text())

    def suggestion(self) -> Suggestion:
        return Suggestion.model_validate_json(self.suggestion_file.read_text())

    def plan(self) -> SharingPlan:
        return SharingPlan.model_validate_json(self.plan_file.read_text())

    def result(self) -> TrialResult | None:
        """None while the trial has not ended."""
        if not self.result_file.exists():
            return None
        return TrialResult.model_validate_json(self.result_file.read_text())

    def evaluations(self) -> list[Evaluation]:
        """In order of steps, each step once."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text().splitlines()
        return [Evaluation.model_validate_json(line) for line in lines]

    def steps(self) -> dict[str, list[float]]:
        """What was measured at each step: ``loss``, ``learning_rate``, ``tokens_per_second`` …

        What wasn't a finite number is NaN.
        """
        if not self.steps_file.exists():
            return {}
        stored: dict[str, list[float | None]] = json.loads(self.steps_file.read_text())
        return {
            name: [math.nan if value is None else value for value in values]
            for name, values in stored.items()
        }

    def outcomes(self) -> dict[str, list[float]]:
        """Of the validation rows, by the metric that is their mean; empty before an evaluation."""
        return json.loads(self.outcomes_file.read_text()) if self.outcomes_file.exists() else {}


class StudyFolder:
    """Paths and readers of one study under a storage path."""

    def __init__(self, storage: Path, name: str) -> None:
        self.path = storage / name
        self.name = name
        self.record_file = self.path / "study.json"
        self.data_file = self.path / "data.json"
        self.answered_file = self.path / "answered.json"
        self.journal = self.path / "optuna.journal"
        self.profiles = self.path / "profiles"
        self.trials = self.path / "trials"
        self.report = self.path / "report"
        self.tune = self.path / "tune"

    @property
    def seeds(self) -> StudyFolder:
        """The chosen configurations, run again over seeds: it has a ledger and trials of its own.

        Their folders hold what other trials' do, and are scored on test rows where there are any.
        """
        return StudyFolder(self.path, "seeds")

    def record(self) -> StudyRecord:
        return StudyRecord.model_validate_json(self.record_file.read_text())

    def splits(self) -> list[SplitsRecord]:
        """Of the study's tasks; empty where that was never written."""
        if not self.data_file.exists():
            return []
        return SPLITS_RECORDS.validate_json(self.data_file.read_text())

    def trial(self, number: int) -> TrialFolder:
        return TrialFolder(self.trials / f"{number:05d}")

    def tune_trial(self, number: int) -> Path:
        """Where Tune keeps what it heard of a trial: it writes now and then, not at once."""
        return self.tune / f"trial-{number:05d}"

    def trial_folders(self) -> list[TrialFolder]:
        """Those that hold a configuration, by number."""
        return [TrialFolder(file.parent) for file in sorted(self.trials.glob("*/trial.json"))]

    def refused_folders(self) -> list[TrialFolder]:
        """Those of trials that have ended for want of a configuration, by number."""
        ended = (TrialFolder(file.parent) for file in sorted(self.trials.glob("*/result.json")))
        return [trial for trial in ended if not trial.config_file.exists()]


def write_json(file: Path, value: BaseModel | Any) -> None:
    """Write a record as JSON, see :func:`write_text`."""
    if isinstance(value, BaseModel):
        write_text(file, value.model_dump_json(indent=1) + "\n")
    else:
        write_text(file, json.dumps(value, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write atomically: a reader, or a crash, sees the old file or the whole new one.

    Raises:
        OSError: the storage failed, for longer than :func:`e2lora.patience.patiently` waits.
    """
    patiently(lambda: _write_text(file, text))


def _write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def is_thrown_away(folder: Path) -> bool:
    """Whether a folder is the passing copy that Ray makes of a submitted job's working directory.

    >>> is_thrown_away(Path("/tmp/ray/session/runtime_resources/working_dir_files/_ray_pkg_1"))
    True
    """
    return {"runtime_resources", "working_dir_files"} <= set(folder.parts)
