"""A study on disk → tables, pictures, verdict.

Made from the study's folder alone, so at any moment of a study, and again years later.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2lora.ablation import ablation_table
from e2lora.gallery import NAMES, draw_all
from e2lora.records import StudyFolder, StudyRecord, TrialResult
from e2lora.reproduction import published_tables
from e2lora.scored import Section
from e2lora.sections import Reading, Trial, read_study, section_key
from e2lora.sensitivity import sensitivity_table
from e2lora.standings import budget_table, trials_table, unscored_notes
from e2lora.tables import Chapter, Table, as_text, html_page, markdown_report
from e2lora.verdict import write_verdict


@dataclass(frozen=True)
class Report:
    """Where a report lies, and what it says: tables as text for a terminal, and the verdict."""

    html: Path
    pictures: tuple[Path, ...]
    csv: Path
    markdown: Path
    table: str
    verdict: str


def render_report(folder: StudyFolder, trials_planned: int | None = None) -> Report:
    """Write ``report.html``, ``report.md``, ``results.csv`` and pictures into ``folder.report``.

    Works at any time: trials that have not ended are counted, failed ones are listed with their
    error, those stopped early as such, and none of them is scored. With several models or tasks
    each pair gets a chapter of its own, and its pictures a number from the second on
    (``pareto-2.png``).

    Args:
        trials_planned: of the search; None where it is not known.

    Raises:
        FileNotFoundError: the folder holds no study.
        ValueError: the study has no objective besides the number of adapter parameters.
    """
    study = read_study(folder)
    of_quota = study.record.num_cells * study.record.quota
    planned = trials_planned or max(len(study.trials) + len(study.refused), of_quota)
    verdict = write_verdict(
        study.sections,
        study.progress(trials_planned),
        interim=study.num_ended < planned or study.num_running > 0,
        notes=[line for splits in folder.splits() for line in splits.told()],
    )
    out = folder.report
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        for stale in out.glob(f"{name}*.png"):  # of an earlier report that had more to show
            stale.unlink()
    chapters = _chapters(folder, study)
    report = Report(
        html=out / "report.html",
        pictures=tuple(file for chapter in chapters for file in chapter.pictures),
        csv=out / "results.csv",
        markdown=out / "report.md",
        table="\n\n".join(_terminal(section) for section in study.sections),
        verdict=verdict,
    )
    title, lines = f"Study {study.record.name}", verdict.splitlines()
    facts = _facts(study.record)
    report.csv.write_text(_csv(study), encoding="utf-8")
    report.markdown.write_text(markdown_report(title, facts, chapters, lines), encoding="utf-8")
    report.html.write_text(html_page(title, facts, chapters, lines), encoding="utf-8")
    return report


def _terminal(section: Section) -> str:
    """The table by budget; of a study without budgets that of its trials."""
    if section.cells:
        text = as_text(budget_table(section))
        notes = "\n".join(unscored_notes(section))
        return f"{section.title}\n{text}\n{notes}".rstrip()
    return f"{section.title}\n{as_text(trials_table(section)).partition(chr(10))[2]}"


def _chapters(folder: StudyFolder, study: Reading) -> list[Chapter]:
    chapters = []
    params = {trial.folder.number: trial.suggestion.params for trial in study.trials}
    for place, section in enumerate(study.sections):
        shown = draw_all(folder, section, params, f"-{place + 1}" if place else "")
        parts = (
            budget_table(section) if section.cells else None,
            shown.get("pareto"),
            shown.get("systems"),
            shown.get("size"),
            ablation_table(section),
            sensitivity_table(section),
            *map(shown.get, ("learning-rate", "importance", "plans", "similarity")),
            trials_table(section),
            *_failed_runs(study.runs, section),
        )
        chapters.append(Chapter(section.title, tuple(part for part in parts if part)))
    tests = [
        {
            run.result.number: run.result.test_metrics
            for run in study.runs
            if run.result and section_key(run.config) == (section.model, section.task)
        }
        for section in study.sections
    ]
    if published := published_tables(study.sections, tests):
        chapters.append(Chapter("Published against measured", tuple(published)))
    if study.answered:
        chapters.append(Chapter("Answered without training", (_answered(study),)))
    return chapters


def _failed_runs(runs: Sequence[Trial], section: Section) -> list[str]:
    return [
        f"Run {run.result.number} over seeds (of trial {run.suggestion.chosen}, seed "
        f"{run.config.seed}) is not complete: {' '.join((run.result.error or 'untold').split())}"
        for run in runs
        if run.result
        and run.result.state != "complete"
        and section_key(run.config) == (section.model, section.task)
    ]


def _answered(study: Reading) -> Table:
    return Table(
        "Suggestions that were answered without a trial",
        ("number", "reason", "suggestion"),
        tuple(
            (
                str(answer["number"]),
                str(answer["reason"]),
                ", ".join(f"{name} {value}" for name, value in answer.get("params", {}).items()),
            )
            for answer in study.answered
        ),
        frozenset(("number",)),
        is_long=True,
    )


def _facts(record: StudyRecord) -> str:
    objectives = ", ".join(f"{o.name} ({o.direction})" for o in record.objectives)
    parts = [f"Space: {record.space}", f"Objectives: {objectives}"]
    if record.quota:
        parts.append(f"Quota: {record.quota} full trials for each of {record.num_cells} cells")
    parts.append(f"Then the sampler: {record.sampler}")
    if record.pruner:
        parts.append(f"Early stopping beside the quota: {record.pruner.name}")
    if record.max_parameters:
        parts.append(f"At most {record.max_parameters:,} parameters")
    return f"{'. '.join(parts)}. Seeds: {list(record.seeds)}."


FIXED = (
    *("trial", "stage", "state", "failure", "origin", "chosen", "model", "task", "system"),
    *("budget", "r", "learning_rate", "seed", "partition_seed", "adapter_parameters"),
    *("head_parameters", "seconds"),
)
LAST = ("low", "high", "front", "error")


def _csv(study: Reading) -> str:
    """One line per trial or run over seeds that has ended, with all its metrics."""
    ended = [("search", trial, trial.result) for trial in study.trials if trial.result]
    ended += [("seeds", run, run.result) for run in study.runs if run.result]
    places = {(section.model, section.task): section for section in study.sections}
    rows: list[dict[str, Any]] = []
    for stage, trial, result in ended:
        section = places[section_key(trial.config)]
        scored = section.trials if stage == "search" else section.runs
        found = next((t for t in scored if t.number == result.number), None)
        low, high = (found.interval if found else None) or (None, None)
        on_front = int(result.number in section.front) if found and stage == "search" else None
        training = {
            "budget": trial.config.plan.target_parameters,
            "r": trial.config.base_rank,
            "learning_rate": trial.config.training.learning_rate,
            "seed": trial.config.seed,
            "partition_seed": trial.config.plan.partition_seed,
        }
        rows.append(
            dict(zip(("model", "task"), section_key(trial.config), strict=True))
            | {"stage": stage, "origin": trial.suggestion.origin, "system": trial.config.system}
            | {"chosen": trial.suggestion.chosen, **training, **_result_columns(result)}
            | {"low": low, "high": high, "front": on_front}
        )
    rows += [{"stage": "search", **_result_columns(result)} for result in study.refused]
    others = dict.fromkeys(name for row in rows for name in row if name not in (*FIXED, *LAST))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIXED, *sorted(others), *LAST], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _result_columns(result: TrialResult) -> dict[str, Any]:
    of_test = {f"test_{name}": value for name, value in result.test_metrics.items()}
    kept = ("state", "failure", "adapter_parameters", "head_parameters", "seconds", "error")
    told = {name: getattr(result, name) for name in kept}
    return {"trial": result.number, **result.metrics, **of_test, **told}
