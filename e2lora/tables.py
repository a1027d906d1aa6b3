"""Tables as text, Markdown and HTML; a whole report as one Markdown file, and as one page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from e2lora.text_table import text_table


@dataclass(frozen=True)
class Table:
    """Cells of text, and what a reader must know of them.

    Attributes:
        right: names of the columns that are aligned to the right.
        strong: places of the rows that stand out.
        is_long: folded up at first, where that can be.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    strong: frozenset[int] = frozenset()
    is_long: bool = False

    def without_empty_columns(self) -> Table:
        """Columns in which no row says anything are left out.

        >>> Table("t", ("a", "b"), (("1", ""), ("2", ""))).without_empty_columns().header
        ('a',)
        """
        kept = [place for place in range(len(self.header)) if any(row[place] for row in self.rows)]
        return Table(
            self.title,
            tuple(self.header[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
            self.right,
            self.notes,
            self.strong,
            self.is_long,
        )


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Chapter:
    """What a report shows of one section, in order: tables, pictures, and sentences."""

    title: str
    parts: tuple[Table | Picture | str, ...]

    @property
    def pictures(self) -> list[Path]:
        return [part.file for part in self.parts if isinstance(part, Picture)]


def as_text(table: Table) -> str:
    right = [place for place, name in enumerate(table.header) if name in table.right]
    lines = [table.title, text_table(table.header, table.rows, right)] if table.rows else []
    return "\n".join([*(lines or [table.title]), *table.notes])


def as_markdown(table: Table) -> str:
    rule = ["---:" if name in table.right else "---" for name in table.header]
    rows = [table.header, rule, *table.rows] if table.rows else []
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    notes = [f"- {note}".replace("- *", "- \\*") for note in table.notes]
    parts = [f"### {table.title}", "\n".join(lines), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def markdown_report(
    title: str, facts: str, chapters: Sequence[Chapter], verdict: Sequence[str]
) -> str:
    """Everything of the report but its pictures, which it names as files beside it."""
    parts = [f"# {title}", facts, "## Verdict"]
    parts += [f"##{line}" if line.startswith("# ") else line for line in verdict]
    for chapter in chapters:
        parts += [f"## {chapter.title}", *map(_markdown_part, chapter.parts)]
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", text)


def _markdown_part(part: Table | Picture | str) -> str:
    if isinstance(part, Picture):
        return f"![{part.caption}]({part.file.name})\n\n*{part.caption}*"
    return as_markdown(part) if isinstance(part, Table) else part


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 74rem; margin: 2rem auto;
       padding: 0 1rem }
h1, h2, h3, h4 { line-height: 1.2; font-weight: 600 } h2 { margin-top: 3rem; padding-top: .6rem;
       border-top: 2px solid #222 } h3 { margin-top: 2.2rem } h4 { margin: 1.2rem 0 .3rem }
nav a { margin-right: 1.2rem } a { color: #0072b2 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th { vertical-align: bottom; color: #555; font-weight: 600; border-bottom: 2px solid #bbb }
th, td { padding: .25rem .85rem .25rem 0; text-align: left; border-bottom: 1px solid #e4e4e4 }
td { white-space: nowrap } td:last-child { white-space: normal }
tr.begins td { border-top: 2px solid #bbb }
.right { text-align: right } .strong td { font-weight: 600 }
figure { margin: 2rem 0 } img { max-width: 100%; display: block }
figcaption, small, .notes { color: #666; font-size: .85rem }
summary { cursor: pointer; color: #0072b2 }
@media print { details > * { display: block } nav { display: none } }
"""


def html_page(title: str, facts: str, chapters: Sequence[Chapter], verdict: Sequence[str]) -> str:
    """One page with everything in it: it can be mailed or stored alone."""
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{CSS}</style>\n<h1>{escape(title)}</h1>\n<p><small>{escape(facts)}</small></p>",
    ]
    if len(chapters) > 1:
        links = (f'<a href="#{n}">{escape(c.title)}</a>' for n, c in enumerate(chapters, 1))
        parts.append(f"<nav>{' '.join(links)}</nav>")
    parts.append(f"<h2>Verdict</h2>\n{_html_lines(verdict)}")
    for number, chapter in enumerate(chapters, 1):
        parts.append(f'<h2 id="{number}">{escape(chapter.title)}</h2>')
        parts += map(_html_part, chapter.parts)
    return "\n".join([*parts, "</html>\n"])


def _html_part(part: Table | Picture | str) -> str:
    if isinstance(part, str):
        return f'<p class="notes">{escape(part)}</p>'
    return _html_table(part) if isinstance(part, Table) else _html_picture(part)


def _html_lines(lines: Sequence[str]) -> str:
    """Lines as paragraphs; ``#`` begins a heading and ``-`` an item."""
    patterns = [("# ", "<h3>{}</h3>"), ("- ", "<ul><li>{}</li></ul>"), ("", "<p>{}</p>")]
    written = []
    for line in lines:
        prefix, pattern = next(pair for pair in patterns if line.startswith(pair[0]))
        written.append(pattern.format(escape(line.removeprefix(prefix))))
    return re.sub(r"</ul>\s*<ul>", "\n", "\n".join(written))


def _html_table(table: Table) -> str:
    kinds = [' class="right"' if name in table.right else "" for name in table.header]
    lines = []
    for place, row in enumerate(table.rows):
        cells = (f"<td{kind}>{escape(c)}</td>" for kind, c in zip(kinds, row, strict=True))
        # A first cell that says something after rows that did not begins a new group.
        begins = place and row[0] and any(not other[0] for other in table.rows)
        names = ["strong"] * (place in table.strong) + ["begins"] * bool(begins)
        opening = f'<tr class="{" ".join(names)}">' if names else "<tr>"
        lines.append(f"{opening}{''.join(cells)}</tr>")
    heads = "".join(f"<th{k}>{escape(n)}</th>" for k, n in zip(kinds, table.header, strict=True))
    body = f"<table><tr>{heads}</tr>\n{chr(10).join(lines)}\n</table>" if lines else ""
    notes = "<br>\n".join(escape(note) for note in table.notes)
    inner = f'<div class="wide">{body}</div>\n<p class="notes">{notes}</p>'
    if table.is_long and len(lines) > 12:
        inner = f"<details><summary>{len(lines)} rows</summary>\n{inner}</details>"
    return f"<h3>{escape(table.title)}</h3>\n{inner}"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
