"""Tables of text, for terminals."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> str:
    """Aligned columns; a cell may have several lines.

    Args:
        right: places of the columns that are aligned to the right.

    >>> print(text_table(["plan", "r"], [["e2,\\nas published", "16"]], right=[1]))
    plan           r
    ------------  --
    e2,           16
    as published
    """
    split = [[cell.split("\n") for cell in row] for row in (header, *rows)]
    columns = zip(*split, strict=True)
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    lines = []
    for row in (split[0], [["-" * width] for width in widths], *split[1:]):
        for parts in zip_longest(*row, fillvalue=""):
            cells = (
                part.rjust(width) if place in right else part.ljust(width)
                for place, (part, width) in enumerate(zip(parts, widths, strict=True))
            )
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
