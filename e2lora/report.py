"""A study on disk → tables, pictures, verdict.

Reads what trials left in the study's folder, and nothing else: no cluster, no database. So it can
be made at any moment of a study, and again years later.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2lora.config import Objective, PlanConfig, TrialConfig
from e2lora.figures import draw_ranks, draw_similarity
from e2lora.front import Point, draw_front, styles_of
from e2lora.moments import GradientProfile
from e2lora.plan import SharingPlan, build_plan
from e2lora.records import StudyFolder, StudyRecord, TrialFolder, TrialResult
from e2lora.tables import html_page, markdown_section, text_section
from e2lora.verdict import REFERENCE, Scored, Section, Unscored, write_verdict

PARAMETERS = "adapter_parameters"
BASELINE = "majority_baseline"  # a metric that tasks may report: the score without any learning


@dataclass(frozen=True)
class Report:
    """Where a report lies, and what it says: the tables as text for a terminal, and the verdict."""

    html: Path
    pictures: tuple[Path, ...]
    csv: Path
    markdown: Path
    table: str
    verdict: str


def render_report(folder: StudyFolder, trials_planned: int | None = None) -> Report:
    """Write ``report.html``, the pictures, ``results.csv`` and ``table.md`` into ``folder.report``.

    Works at any time: trials that have not ended are counted, failed ones are listed with their
    error, and neither is scored. With several models or tasks each pair gets a section of its own,
    and its pictures a number from the second on (``pareto-2.png``).

    Args:
        trials_planned: of the whole study; None where it is not known.

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
    trials = [(trial, trial.config(), trial.result()) for trial in folder.trial_folders()]
    metric = metric_of(record)
    sections = _sections(trials, metric)
    refused = [trial.result() for trial in folder.refused_folders()]
    results = [*(result for _, _, result in trials), *refused]
    progress = _progress(results, trials_planned)
    for result in filter(None, refused):
        progress += f" Trial {result.number} had no configuration: {result.error}"
    ended = sum(result is not None for result in results)
    verdict = write_verdict(
        sections,
        progress,
        interim=ended < (trials_planned or len(trials)),
        notes=[line for splits in folder.splits() for line in splits.told()],
    )

    out = folder.report
    out.mkdir(parents=True, exist_ok=True)
    for name in ("pareto", "plans", "similarity"):
        for stale in out.glob(f"{name}*.png"):  # of an earlier report that had more to show
            stale.unlink()
    pictures = [
        _pictures(folder, section, "" if i == 0 else f"-{i + 1}")
        for i, section in enumerate(sections)
    ]
    report = Report(
        html=out / "report.html",
        pictures=tuple(file for files in pictures for file in files),
        csv=out / "results.csv",
        markdown=out / "table.md",
        table="\n\n".join(text_section(section) for section in sections),
        verdict=verdict,
    )
    report.csv.write_text(_csv(trials, sections), encoding="utf-8")
    markdown = "\n\n".join([progress, *(markdown_section(s) for s in sections)])
    report.markdown.write_text(markdown + "\n", encoding="utf-8")
    report.html.write_text(html_page(record, sections, pictures, verdict), encoding="utf-8")
    return report


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


def _progress(results: Sequence[TrialResult | None], planned: int | None) -> str:
    states = [result.state if result else "running" for result in results]
    ended = len(states) - states.count("running")
    of = f"{ended} of {planned} planned trials have" if planned else f"{ended} trial(s) have"
    text = f"{of} ended: {states.count('complete')} complete, {states.count('failed')} failed"
    running = states.count("running")
    return f"{text}; {running} running or interrupted." if running else f"{text}."


Trial = tuple[TrialFolder, TrialConfig, TrialResult | None]


def _sections(trials: Sequence[Trial], metric: Objective) -> list[Section]:
    """One per model and task, in the order of their first trials."""
    cells: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        cells.setdefault(_cell(trial[1]), []).append(trial)
    sections = []
    for (model, task), members in cells.items():
        scored, unscored, baselines = [], [], []
        for folder, config, result in members:
            if result is None:
                continue
            if result.state == "failed":
                unscored.append(
                    Unscored(result.number, config, result.error or "no error recorded")
                )
            elif metric.name not in result.metrics:
                error = f"complete, but without {metric.name!r}: has {sorted(result.metrics)}"
                unscored.append(Unscored(result.number, config, error))
            else:
                outcome, outcomes = _outcomes_for(metric, folder.outcomes())
                scored.append(
                    Scored(
                        number=result.number,
                        config=config,
                        value=result.metrics[metric.name],
                        parameters=result.adapter_parameters,
                        seconds=result.seconds,
                        outcomes=None if outcomes is None else tuple(outcomes),
                        outcome=outcome,
                    )
                )
                baselines.append(result.metrics.get(BASELINE))
        scored.sort(key=lambda t: (t.system.casefold(), t.r or 0, t.config.training.learning_rate))
        # The baseline is a share of right answers: of no use beside another kind of metric.
        shown = scored and metric.direction == "maximize" and all(t.interval for t in scored)
        baseline = baselines[0] if shown and len(set(baselines)) == 1 else None
        sections.append(Section(model, task, metric, tuple(scored), tuple(unscored), baseline))
    return sections


def _outcomes_for(
    metric: Objective, outcomes: Mapping[str, list[float]]
) -> tuple[str, list[float] | None]:
    """The metric's own outcomes, or the task's first ones where it is no mean over rows."""
    name = metric.name if metric.name in outcomes else next(iter(outcomes), "")
    return name, outcomes.get(name)


def _cell(config: TrialConfig) -> tuple[str, str]:
    return config.model.name, config.task.display_name


def _pictures(folder: StudyFolder, section: Section, suffix: str) -> list[Path]:
    files: list[Path] = []
    if section.trials:
        files.append(folder.report / f"pareto{suffix}.png")
        others = sorted({t.system for t in section.trials} - {REFERENCE}, key=str.casefold)
        points = [
            Point(
                number=t.number,
                system=t.system,
                r=t.r,
                parameters=t.parameters,
                value=t.value,
                interval=t.interval,
                best=t.number in section.best_numbers,
                on_front=t.number in section.front,
            )
            for t in section.trials
        ]
        styles = styles_of([REFERENCE, *others])
        draw_front(files[0], points, styles, section.metric.name, section.title, section.baseline)
    best = section.best(lambda t: t.config.plan.topology == "e2")
    trial = folder.trial(best.number) if best else None
    plan = trial.plan() if trial and trial.plan_file.exists() else None
    if best and plan:
        files.append(folder.report / f"plans{suffix}.png")
        draw_ranks(files[-1], {"": plan}, f"{best.config.label} (trial {best.number})")
    profile = _profile_of(folder, section, plan.profile_fingerprint if plan else None)
    if profile:
        files.append(folder.report / f"similarity{suffix}.png")
        shown = plan or _plan_of(profile)
        draw_similarity(files[-1], profile, {"": shown}, section.title)
    return files


def _profile_of(
    folder: StudyFolder, section: Section, fingerprint: str | None
) -> GradientProfile | None:
    """The profile that the shown plan was made from; before there is one, one of this model."""
    for file in sorted(folder.profiles.glob("*.json")):
        profile = GradientProfile.model_validate_json(file.read_text(encoding="utf-8"))
        provenance = (profile.provenance.model, profile.provenance.task)
        if fingerprint in (None, profile.fingerprint()) and (
            fingerprint or provenance == (section.model, section.task)
        ):
            return profile
    return None


def _plan_of(profile: GradientProfile) -> SharingPlan:
    """Where E² would cut, whatever the rank."""
    targets = [entry.target for entry in profile.layers]
    return build_plan(targets, PlanConfig(topology="e2", r=1), profile)


def _csv(trials: Sequence[Trial], sections: Sequence[Section]) -> str:
    """One line per ended trial, with all its metrics."""
    scored = {t.number: (t, section) for section in sections for t in section.trials}
    names = sorted({name for *_, result in trials if result for name in result.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fixed = "trial,state,model,task,system,r,learning_rate,seed,adapter_parameters,head_parameters"
    writer.writerow([*fixed.split(","), "seconds", *names, "low", "high", "front", "error"])
    for _, config, result in trials:
        if result is None:
            continue
        t, section = scored.get(result.number, (None, None))
        interval = t.interval if t else None
        writer.writerow(
            [result.number, result.state, *_cell(config), config.system, config.base_rank]
            + [config.training.learning_rate, config.seed]
            + [result.adapter_parameters, result.head_parameters, result.seconds]
            + [result.metrics.get(name, "") for name in names]
            + list(interval or ("", ""))
            + [int(result.number in section.front) if section else "", result.error or ""]
        )
    return text.getvalue()
