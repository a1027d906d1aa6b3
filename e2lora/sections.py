"""A study's folder → what its report is made of: sections, and what ended without a score.

Reads what trials left, and nothing else: no cluster, no database.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from e2lora.config import Objective, TrialConfig
from e2lora.pseudo import PSEUDO_METRICS, pseudo_outcomes
from e2lora.records import StudyFolder, StudyRecord, Suggestion, TrialFolder, TrialResult
from e2lora.scored import Scored, Section, Unscored

PARAMETERS = "adapter_parameters"
BASELINE = "majority_baseline"  # a metric that tasks may report: the score without any learning
UNTOLD = Suggestion(origin="sampler", params={})  # of studies from before origins were recorded


class Trial(NamedTuple):
    """What a trial's folder holds; no result while it has not ended."""

    folder: TrialFolder
    config: TrialConfig
    suggestion: Suggestion
    result: TrialResult | None


@dataclass(frozen=True)
class Reading:
    """A study as its folder tells it at this moment.

    Attributes:
        trials: of stage one, the search.
        runs: of stage two: chosen configurations over seeds.
        refused: results of trials that never had a configuration.
        answered: suggestions that were answered without training: number, reason, params.
    """

    record: StudyRecord
    metric: Objective
    sections: tuple[Section, ...]
    trials: tuple[Trial, ...]
    runs: tuple[Trial, ...]
    refused: tuple[TrialResult, ...]
    answered: tuple[Mapping[str, Any], ...]

    @property
    def num_ended(self) -> int:
        """Trials of stage one that have ended; an answered suggestion is no trial."""
        return sum(trial.result is not None for trial in self.trials) + len(self.refused)

    @property
    def num_running(self) -> int:
        """Trials and runs that have begun and not ended."""
        return sum(trial.result is None for trial in (*self.trials, *self.runs))

    def progress(self, planned: int | None) -> str:
        """In sentences: how many trials and runs have ended, and how."""
        results = [*(trial.result for trial in self.trials), *self.refused]
        of = f"{self.num_ended} of {planned} planned trials have" if planned else ""
        text = f"{of or f'{self.num_ended} trial(s) have'} ended: {_states(results)}"
        if self.answered:
            reasons = Counter(_kind(str(answer["reason"])) for answer in self.answered)
            told = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
            more = f"; {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
            text += f" {len(self.answered)} suggestion(s) were answered without training: {told}"
            text += f"{more}."
        if self.runs:
            ended = sum(run.result is not None for run in self.runs)
            text += f" Over seeds {ended} run(s) of chosen configurations have ended: "
            text += _states([run.result for run in self.runs])
        for result in self.refused:
            text += f" Trial {result.number} had no configuration: {result.error}"
        return text


def _kind(reason: str) -> str:
    """A reason without its numbers.

    >>> _kind("12,288 parameters, more than 9,000")
    '… parameters, more than …'
    """
    return re.sub(r"\d[\d,]*", "…", reason)


def _states(results: Sequence[TrialResult | None]) -> str:
    """
    >>> _states([None])
    '0 complete, 0 failed; 1 running or interrupted.'
    """
    states = Counter(result.state if result else "running" for result in results)
    kinds = Counter(r.failure for r in results if r and r.state == "failed" and r.failure)
    text = f"{states['complete']} complete, {states['failed']} failed"
    text += f" ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})" if kinds else ""
    text += f", {states['stopped']} stopped early" if states["stopped"] else ""
    return (
        f"{text}; {states['running']} running or interrupted." if states["running"] else text + "."
    )


def read_study(folder: StudyFolder) -> Reading:
    """
    Raises:
        FileNotFoundError: the folder holds no study.
        ValueError: the study has no objective besides the number of adapter parameters.
    """
    if not folder.record_file.exists():
        raise FileNotFoundError(
            f"a report needs a study's folder with its study.json; {folder.path} has none. Check "
            "the storage path and the study's name."
        )
    record = folder.record()
    metric = metric_of(record)
    trials, runs = _read(folder), _read(folder.seeds)
    answered = folder.path / "answered.json"
    return Reading(
        record=record,
        metric=metric,
        sections=tuple(_sections(trials, runs, metric, record.quota)),
        trials=trials,
        runs=runs,
        refused=tuple(filter(None, (trial.result() for trial in folder.refused_folders()))),
        answered=tuple(json.loads(answered.read_text())) if answered.exists() else (),
    )


def metric_of(record: StudyRecord) -> Objective:
    """The objective that systems are judged by: the first to maximize, else the first to minimize.

    Raises:
        ValueError: there is none besides the number of adapter parameters.
    """
    candidates = [objective for objective in record.objectives if objective.name != PARAMETERS]
    if not candidates:
        raise ValueError(
            f"a report needs an objective besides {PARAMETERS!r} to judge systems by; study "
            f"{record.name!r} has {[o.name for o in record.objectives]}. Add a metric of its task."
        )
    return next((o for o in candidates if o.direction == "maximize"), candidates[0])


def section_key(config: TrialConfig) -> tuple[str, str]:
    """Model and task: trials are compared with others of the same."""
    return config.model.name, config.task.display_name


def _read(folder: StudyFolder) -> tuple[Trial, ...]:
    return tuple(
        Trial(
            trial,
            trial.config(),
            trial.suggestion() if trial.suggestion_file.exists() else UNTOLD,
            trial.result(),
        )
        for trial in folder.trial_folders()
    )


def _sections(
    trials: Sequence[Trial], runs: Sequence[Trial], metric: Objective, quota: int
) -> list[Section]:
    """One per model and task, in the order of their first trials."""
    sections = []
    for key in dict.fromkeys(section_key(trial.config) for trial in trials):
        mine = [trial for trial in trials if section_key(trial.config) == key]
        judged = [_judge(trial, metric) for trial in mine if trial.result]
        scored = [trial for trial in judged if isinstance(trial, Scored)]
        scored.sort(
            key=lambda t: (
                t.budget or 0,
                t.system.casefold(),
                t.r or 0,
                t.config.training.learning_rate,
            )
        )
        over_seeds = [_judge(r, metric) for r in runs if r.result and section_key(r.config) == key]
        sections.append(
            Section(
                *key,
                metric,
                trials=tuple(scored),
                unscored=tuple(trial for trial in judged if isinstance(trial, Unscored)),
                baseline=_baseline(mine, scored, metric),
                runs=tuple(run for run in over_seeds if isinstance(run, Scored)),
                quota=quota,
            )
        )
    return sections


def _judge(trial: Trial, metric: Objective) -> Scored | Unscored:
    """A trial that has ended: scored only if it ran its whole length."""
    result, origin = trial.result, trial.suggestion.origin
    assert result is not None
    if result.state != "complete":
        stopped = result.state == "stopped"
        ending = "stopped early by the study's pruner" if stopped else "no error recorded"
        effort = stopped or result.failure == "diverged"
        return Unscored(result.number, trial.config, result.error or ending, origin, effort)
    if metric.name not in result.metrics:
        error = f"complete, but without {metric.name!r}: has {sorted(result.metrics)}"
        return Unscored(result.number, trial.config, error, origin)
    folder = trial.folder
    outcome, outcomes = _outcomes_for(
        metric, trial.config, folder.outcomes_file, folder.predictions_file
    )
    of_test, test_outcomes = _outcomes_for(
        metric, trial.config, folder.test_outcomes_file, folder.test_predictions_file
    )
    return Scored(
        number=result.number,
        config=trial.config,
        value=result.metrics[metric.name],
        parameters=result.adapter_parameters,
        seconds=result.seconds,
        outcomes=None if outcomes is None else tuple(outcomes),
        outcome=outcome,
        origin=origin,
        chosen=trial.suggestion.chosen,
        test_value=result.test_metrics.get(metric.name),
        test_outcomes=None if of_test != outcome else tuple(test_outcomes or ()) or None,
    )


def _outcomes_for(
    metric: Objective, config: TrialConfig, outcomes_file: Path, predictions_file: Path
) -> tuple[str, list[float] | None]:
    """The metric's own outcomes, by its predictions where it is no mean over rows.

    Else the task's first ones, by their name; nothing where nothing was scored.
    """
    name = metric.name
    if name == "score":  # a task's official metric under one name
        name = getattr(config.task, "metric", name)
    if name in PSEUDO_METRICS and predictions_file.exists():
        rows = [json.loads(line) for line in predictions_file.read_text().splitlines()]
        columns = ([row[key] for row in rows] for key in ("prediction", "expected"))
        found = pseudo_outcomes(name, *columns)
        if found is not None:
            return name, found.tolist()
    outcomes = json.loads(outcomes_file.read_text()) if outcomes_file.exists() else {}
    name = name if name in outcomes else next(iter(outcomes), "")
    return name, outcomes.get(name)


def _baseline(trials: Sequence[Trial], scored: Sequence[Scored], metric: Objective) -> float | None:
    """A share of right answers, so of no use beside another kind of metric."""
    numbers = {trial.number for trial in scored}
    found = {
        trial.result.metrics.get(BASELINE)
        for trial in trials
        if trial.result and trial.result.number in numbers
    }
    shown = scored and metric.direction == "maximize" and all(t.interval for t in scored)
    return found.pop() if shown and len(found) == 1 else None
