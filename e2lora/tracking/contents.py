"""What a run in MLflow should hold, from what a trial's files say; knows nothing of MLflow."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e2lora.config import PlanConfig, TrialConfig
from e2lora.records import StudyRecord, TrialFolder, TrialResult

if TYPE_CHECKING:
    from mlflow.entities import Run

RESULT_TAG, STATE_TAG, FAILURE_TAG = "e2lora.result", "e2lora.state", "e2lora.failure"
ERROR_TAG, NOTE_TAG = "e2lora.error", "mlflow.note.content"
CHOSEN_TAG = "e2lora.chosen"
STATUS = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""How a trial ended → how MLflow says it; ``KILLED`` without a state: nobody trains it now."""
LABELS = ("model", "task", "topology", "system", "seed")  # parameters that are tags as well
PLAN_OPTIONS = {"topology", "r", "lora_alpha"}
SPECIAL_PLAN_OPTIONS = {  # told where they are set: columns of defaults only slow the UI
    "block_size",
    "stride",
    "num_intervals",
    "partition_seed",
    "use_rslora",
    "similarity",
    "allocation",
    "beta",
}
TRAINING_OPTIONS = {"learning_rate", "max_steps", "global_batch_size", "zero_stage", "num_workers"}
SPECIAL_TRAINING_OPTIONS = {"num_epochs", "precision", "schedule", "packing"}
DEFAULT_PLAN = PlanConfig()
MOST_POINTS = 200
"""Of one series of steps: the UI draws no more than that, and a study has many series."""


@dataclass
class Contents:
    """What a run holds: in MLflow, or what a trial's files say it should."""

    status: str
    tags: dict[str, str]
    params: dict[str, str]
    points: set[tuple[str, int, float]]  # metric, step, value
    run_id: str = ""
    unread: Sequence[str] = ()  # metrics whose points in MLflow are not known yet

    @classmethod
    def of(cls, run: Run) -> Contents:
        info, data = run.info, run.data
        return cls(info.status, data.tags, data.params, set(), info.run_id, list(data.metrics))


def study_params(record: StudyRecord) -> dict[str, str]:
    return {
        "study": record.name,
        "space": record.space,
        "models": ", ".join(model.name for model in record.models),
        "tasks": ", ".join(task.display_name for task in record.tasks),
        "budgets": ", ".join(map(str, record.budgets)),
        "seeds": ", ".join(map(str, record.seeds)),
        "objectives": ", ".join(f"{o.name} ({o.direction})" for o in record.objectives),
    }


def trial_params(config: TrialConfig) -> dict[str, str]:
    """What is worth an axis of MLflow's parallel plot; all the rest stands in trial.json."""
    model = config.model
    special = config.training.model_dump(include=SPECIAL_TRAINING_OPTIONS, exclude_defaults=True)
    plan = config.plan
    values: dict[str, object] = {
        "model": f"{model.name}@{model.revision}" if model.revision else model.name,
        "task": config.task.display_name,
        "system": config.system,
        "seed": config.seed,
        "family": config.adapter.family,
        "target_modules": ", ".join(config.adapter.target_modules),
        **config.adapter.special_options,
        **plan.model_dump(include=PLAN_OPTIONS),
        **plan.model_dump(include=SPECIAL_PLAN_OPTIONS, exclude_defaults=True),
        **({"rank_budget": plan.budget} if plan.budget != DEFAULT_PLAN.budget else {}),
        **({"budget": plan.target_parameters} if plan.target_parameters else {}),
        **config.training.model_dump(include=TRAINING_OPTIONS),
        **special,
    }
    return {name: str(value) for name, value in values.items()}


def read_trial(
    trial: TrialFolder,
    running: bool,
    series: Collection[str] | None = None,
    judged: Collection[str] | None = None,
) -> Contents | None:
    """What the trial's run should hold; None while the trial has nothing on disk to show.

    A metric by its bare name is final: only a whole trial has it. What evaluations on the way said
    stands beside it by step, as ``validation/NAME``.

    Args:
        running: whether someone trains it, if it has no result.
        series: which of those that have a value for each training step; None: all.
        judged: which metrics of the evaluations on the way; None: all.
    """
    result, evaluations = trial.result(), trial.evaluations()
    config = trial.config() if trial.config_file.exists() else None
    if config is None and result is None:
        return None
    params = trial_params(config) if config else {}
    planned = trial.plan_file.exists()
    if config and config.plan.target_parameters and not planned:
        params = {k: v for k, v in params.items() if k not in ("r", "lora_alpha")}  # not yet known
    tags = {name: params[name] for name in LABELS if name in params}
    if trial.suggestion_file.exists():
        suggestion = trial.suggestion()
        params["origin"] = suggestion.origin
        if suggestion.chosen is not None:
            tags[CHOSEN_TAG] = str(suggestion.chosen)
    if planned:
        tags["plan_fingerprint"] = trial.plan().fingerprint()
    points = {
        (f"validation/{name}", evaluation.step, value)
        for evaluation in evaluations
        for name, value in evaluation.metrics.items()
        if judged is None or name in judged
    }
    known = config.training.max_steps if config else None
    for name, values in trial.steps().items():
        if series is None or name in series:
            points |= {(f"train/{name}", step, v) for step, v in thinned(values, known)}
    if not result:
        return Contents("RUNNING" if running else "KILLED", tags, params, points)
    tags |= {RESULT_TAG: result.fingerprint(), STATE_TAG: result.state}
    if result.failure:
        tags[FAILURE_TAG] = result.failure
    if result.error:
        tags[ERROR_TAG] = tags[NOTE_TAG] = result.error[-4000:]
    last = evaluations[-1].step if evaluations else 0
    points |= {(name, last, float(value)) for name, value in _final_values(result).items()}
    return Contents(STATUS[result.state], tags, params, points)


def _final_values(result: TrialResult) -> dict[str, float]:
    """Metrics that are compared: of a trial that isn't whole, what it cost and no score."""
    cost: dict[str, float] = {"seconds": result.seconds, "attempts": result.attempts}
    if result.state == "failed":
        return cost
    cost |= {
        "adapter_parameters": result.adapter_parameters,
        "head_parameters": result.head_parameters,
    }
    if result.state == "stopped":
        return cost
    tested = {f"test/{name}": value for name, value in result.test_metrics.items()}
    return {**result.metrics, **tested, **cost}


def thinned(
    values: Sequence[float], num_steps: int | None = None, most: int = MOST_POINTS
) -> list[tuple[int, float]]:
    """Some of a series of steps, each with its step; what isn't finite is left out.

    The steps that are taken stay the same while the series grows to ``num_steps``, so that a run
    never holds more than ``most``; without ``num_steps`` (epochs) it holds half of ``most`` more
    each time that the series doubles.

    >>> thinned([0.5, 0.4, 0.3, 0.2], num_steps=8, most=4)
    [(2, 0.4), (4, 0.2)]
    """
    every = math.ceil((num_steps or 0) / most) or 1
    if num_steps is None:
        while len(values) > every * most:
            every *= 2
    taken = range(every, len(values) + 1, every)
    return [(step, values[step - 1]) for step in taken if math.isfinite(values[step - 1])]
