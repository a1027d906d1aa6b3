"""A study on disk → tables, pictures, verdict.

Reads what trials left in the study's folder, and nothing else: no cluster, no database. So it can
be made at any moment of a study, and again years later.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from e2lora.config import Objective, TrialConfig
from e2lora.figures import draw_plan, draw_similarity
from e2lora.front import Point, draw_front, styles_of
from e2lora.moments import GradientProfile
from e2lora.records import StudyFolder, StudyRecord, TrialFolder, TrialResult
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
    progress = _progress([result for _, _, result in trials], trials_planned)
    ended = sum(result is not None for _, _, result in trials)
    verdict = write_verdict(sections, progress, interim=ended < (trials_planned or len(trials)))

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
        table="\n\n".join(_text_section(section) for section in sections),
        verdict=verdict,
    )
    report.csv.write_text(_csv(trials, sections), encoding="utf-8")
    markdown = "\n\n".join([progress, *(_markdown_section(s) for s in sections)])
    report.markdown.write_text(markdown + "\n", encoding="utf-8")
    report.html.write_text(_html(record, sections, pictures, verdict), encoding="utf-8")
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
                outcomes = folder.outcomes()
                scored.append(
                    Scored(
                        number=result.number,
                        config=config,
                        value=result.metrics[metric.name],
                        parameters=result.adapter_parameters,
                        seconds=result.seconds,
                        outcomes=None if outcomes is None else tuple(outcomes),
                    )
                )
                baselines.append(result.metrics.get(BASELINE))
        scored.sort(key=lambda t: (t.system.casefold(), t.r, t.config.training.learning_rate))
        # The baseline is a share of right answers: of no use beside another kind of metric.
        shown = scored and metric.direction == "maximize" and all(t.interval for t in scored)
        baseline = baselines[0] if shown and len(set(baselines)) == 1 else None
        sections.append(Section(model, task, metric, tuple(scored), tuple(unscored), baseline))
    return sections


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
        draw_plan(files[-1], plan, f"{best.system} r={best.r} (trial {best.number})")
    profile = _profile_of(folder, section, plan.profile_fingerprint if plan else None)
    if profile:
        files.append(folder.report / f"similarity{suffix}.png")
        draw_similarity(files[-1], profile, "rmi", section.title)
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


def _header(section: Section) -> list[str]:
    interval = any(t.interval for t in section.trials)
    metric = section.metric.name + (" (95 % interval)" if interval else "")
    return ["", "system", "r", "learning rate", "parameters", metric, "time", "trial"]


def _rows(section: Section) -> Iterable[list[str]]:
    for t in section.trials:
        interval = f" ({t.interval.low:.3f}–{t.interval.high:.3f})" if t.interval else ""
        yield [
            "*" if t.number in section.front else "",
            t.system,
            str(t.r),
            f"{t.config.training.learning_rate:.2g}",
            f"{t.parameters:,}",
            f"{t.value:.4f}{interval}",
            f"{t.seconds:.0f} s" if t.seconds < 600 else f"{t.seconds / 60:.0f} min",
            str(t.number),
        ]


def _footnotes(section: Section) -> Iterable[str]:
    if section.trials:
        yield "* on the front: every trial that is better has more adapter parameters"
    else:
        yield "No trial is complete yet."
    if section.baseline is not None:
        yield f"majority baseline: {section.baseline:.4f}"
    for t in section.unscored:
        error = " ".join(t.error.split())
        yield f"not scored: trial {t.number}, {t.config.system} r={t.config.plan.r}: {error}"


RIGHT_ALIGNED = {"r", "learning rate", "parameters", "time", "trial"}


def _text_section(section: Section) -> str:
    header, rows = _header(section), list(_rows(section))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [section.title]
    for row in [header, ["-" * width for width in widths], *rows] if rows else []:
        cells = (
            cell.rjust(width) if name in RIGHT_ALIGNED else cell.ljust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_footnotes(section)])


def _markdown_section(section: Section) -> str:
    header, rows = _header(section), list(_rows(section))
    rule = ["---:" if name in RIGHT_ALIGNED else "---" for name in header]
    lines = [f"| {' | '.join(row)} |" for row in [header, rule, *rows]] if rows else []
    notes = [f"- {note}".replace("- *", "- \\*") for note in _footnotes(section)]
    return "\n".join([f"## {section.title}", "", *lines, "", *notes])


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
            [result.number, result.state, *_cell(config), config.system, config.plan.r]
            + [config.training.learning_rate, config.seed]
            + [result.adapter_parameters, result.head_parameters, result.seconds]
            + [result.metrics.get(name, "") for name in names]
            + list(interval or ("", ""))
            + [int(result.number in section.front) if section else "", result.error or ""]
        )
    return text.getvalue()


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; font-weight: 600 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd }
.right { text-align: right } .front td { font-weight: 600 }
img { max-width: 100%; display: block; margin: 1.2rem 0 }
small, .notes { color: #666; font-size: .85rem }
"""


def _html(
    record: StudyRecord, sections: Sequence[Section], pictures: Sequence[list[Path]], verdict: str
) -> str:
    """One page with everything in it: it can be mailed or stored alone."""
    objectives = ", ".join(f"{o.name} ({o.direction})" for o in record.objectives)
    facts = f"Space: {record.space}. Objectives: {objectives}. Seeds: {list(record.seeds)}."
    title = escape(f"Study {record.name}")
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f"<style>{CSS}</style>\n<h1>{title}</h1>\n<p><small>{escape(facts)}</small></p>",
        f"<h2>Verdict</h2>\n{_html_lines(verdict)}",
    ]
    for section, files in zip(sections, pictures, strict=True):
        parts.append(f"<h2>{escape(section.title)}</h2>\n{_html_table(section)}")
        for file in files:
            data = base64.b64encode(file.read_bytes()).decode()
            parts.append(f'<img alt="{escape(file.stem)}" src="data:image/png;base64,{data}">')
    return "\n".join([*parts, "</html>\n"])


def _html_lines(text: str) -> str:
    """Lines as paragraphs; ``#`` begins a heading and ``-`` an item."""
    patterns = [("# ", "<h3>{}</h3>"), ("- ", "<ul><li>{}</li></ul>"), ("", "<p>{}</p>")]
    lines = []
    for line in text.splitlines():
        prefix, pattern = next(pair for pair in patterns if line.startswith(pair[0]))
        lines.append(pattern.format(escape(line.removeprefix(prefix))))
    return re.sub(r"</ul>\s*<ul>", "\n", "\n".join(lines))


def _html_table(section: Section) -> str:
    header = _header(section)
    kinds = [' class="right"' if name in RIGHT_ALIGNED else "" for name in header]
    lines = []
    for row in _rows(section):
        cells = (f"<td{kind}>{escape(c)}</td>" for kind, c in zip(kinds, row, strict=True))
        opening = '<tr class="front">' if row[0] else "<tr>"
        lines.append(f"{opening}{''.join(cells)}</tr>")
    heads = "".join(f"<th{kind}>{escape(n)}</th>" for kind, n in zip(kinds, header, strict=True))
    table = f"<table><tr>{heads}</tr>\n{chr(10).join(lines)}\n</table>\n" if lines else ""
    notes = "<br>\n".join(escape(note) for note in _footnotes(section))
    return f'{table}<p class="notes">{notes}</p>'
