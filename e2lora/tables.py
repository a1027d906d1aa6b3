"""A section of a report as text, Markdown and HTML; the whole report as one HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from e2lora.records import StudyRecord
from e2lora.text_table import text_table
from e2lora.verdict import Section


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
            "–" if t.r is None else str(t.r),
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
        yield f"not scored: trial {t.number}, {t.config.label}: {error}"


RIGHT_ALIGNED = {"r", "learning rate", "parameters", "time", "trial"}


def text_section(section: Section) -> str:
    header, rows = _header(section), list(_rows(section))
    right = [place for place, name in enumerate(header) if name in RIGHT_ALIGNED]
    lines = [section.title, *([text_table(header, rows, right)] if rows else [])]
    return "\n".join([*lines, *_footnotes(section)])


def markdown_section(section: Section) -> str:
    header, rows = _header(section), list(_rows(section))
    rule = ["---:" if name in RIGHT_ALIGNED else "---" for name in header]
    lines = [f"| {' | '.join(row)} |" for row in [header, rule, *rows]] if rows else []
    notes = [f"- {note}".replace("- *", "- \\*") for note in _footnotes(section)]
    return "\n".join([f"## {section.title}", "", *lines, "", *notes])


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


def html_page(
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
