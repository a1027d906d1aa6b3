"""The picture of a front: a metric against adapter parameters, one mark per trial."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from e2lora.figures import COLOURS, FAINT, INK, make_panels, save_figure
from e2lora.statistics import Interval

# Eight colours and nine marks have no common divisor: 72 systems each get their own pair.
MARKERS = ("*", "o", "s", "^", "D", "v", "P", "X", "p")
MOST_LABELS = 16  # beyond, they hide what they name
HALO = withStroke(linewidth=2.5, foreground="white")  # keeps text legible on lines


@dataclass(frozen=True)
class Point:
    """One scored trial in the picture of the front; ``best`` of its system and base rank."""

    number: int
    system: str
    r: int | None
    parameters: int
    value: float
    interval: Interval | None
    best: bool
    on_front: bool


def short_count(value: float, _: object = None) -> str:
    """A number of parameters as a tick says it.

    >>> short_count(768), short_count(20_000), short_count(1_500_000)
    ('768', '20k', '1.5M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw_front(
    file: Path,
    points: Sequence[Point],
    styles: dict[str, tuple[str, str]],
    metric: str,
    title: str,
    baseline: float | None = None,
    bars: str = "95 % intervals over validation items",
) -> None:
    """The metric against adapter parameters (log), with the non-dominated points as a step line.

    Args:
        styles: colour and marker of each system, from :func:`styles_of`.
        bars: what the points' intervals are.
        baseline: a score that needs no training, drawn as a dashed line, or, where that would
            squeeze everything else, named at the lower edge.
    """
    figure, (axes,) = make_panels(1, width=8.6, height=4.9)
    axes.set_xscale("log")
    left = min(p.parameters for p in points) / 1.5
    right = max(p.parameters for p in points) * 1.5
    axes.set_xlim(left, right)
    _set_height(axes, points, baseline)
    systems = {p.system for p in points}
    places = _side_by_side(points, min(0.017, 0.12 / len(systems)) * math.log(right / left))
    scale = min(1.0, 6 / len(systems))  # of marks, where many stand side by side
    for system in [name for name in styles if any(p.system == name for p in points)]:
        colour, marker = styles[system]
        size = scale * (190 if marker == "*" else 75)
        for best in (False, True):
            chosen = [p for p in points if p.system == system and p.best == best]
            axes.scatter(
                [places[p] for p in chosen],
                [p.value for p in chosen],
                s=size if best else size / 3,
                c=colour,
                marker=marker,
                alpha=None if best else 0.4,
                edgecolors="white",
                linewidths=0.9 if best else 0,
                zorder=(6 if marker == "*" else 5) if best else 3,
                label=system if best else None,
            )
            for p in chosen:
                if best and p.interval is not None:
                    axes.plot(
                        [places[p]] * 2, p.interval, color=colour, lw=1.5, alpha=0.5, zorder=2
                    )
    front = sorted({(p.parameters, p.value) for p in points if p.on_front})
    steps = list(zip(*[*front, (right, front[-1][1])], strict=True))
    axes.step(*steps, where="post", color=INK, lw=1.1, zorder=1, label="front")
    label_sizes(axes)
    axes.set_ylabel(metric)
    axes.set_title(f"{title}: {metric} against adapter size", loc="left", fontsize=11, color=INK)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    told = f"bars: {bars}; " if any(p.best and p.interval for p in points) else ""
    labelled = [p for p in points if p.best]
    if len(labelled) > MOST_LABELS:
        labelled = [p for p in labelled if p.on_front]
    of_front = "" if len(labelled) == sum(p.best for p in points) else " (of the front)"
    note = f"r: base rank{of_front}; {told}small: other trials; like sizes stand side by side"
    figure.supxlabel(note, x=0.012, ha="left", fontsize=7.5, color=FAINT)
    _place_labels(figure, axes, labelled, places, styles, steps)
    save_figure(figure, file)


def label_sizes(axes: Any) -> None:
    """A horizontal axis of adapter parameters."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(short_count))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trainable adapter parameters (log scale)")


def _set_height(axes: Any, points: Sequence[Point], baseline: float | None) -> None:
    """Limits of the vertical axis, and the baseline."""
    ends = [end for p in points for end in (p.interval if p.best and p.interval else (p.value,))]
    low, high = min(ends), max(ends)
    near = baseline is not None and -0.5 <= (low - baseline) / (high - low or 1.0) <= 0.5
    if baseline is not None and near:
        low, high = min(low, baseline), max(high, baseline)
        axes.axhline(baseline, color=FAINT, lw=1.1, ls=(0, (5, 4)), zorder=1)
    margin = 0.08 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    if baseline is not None:
        where = "" if near else "↓ below: " if baseline < low else "↑ above: "
        axes.annotate(
            f"{where}majority baseline {baseline:.3f}",
            (0.005, baseline if near else low - margin),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8,
            color=FAINT,
            path_effects=[HALO],
        )


def _side_by_side(points: Sequence[Point], width: float) -> dict[Point, float]:
    """Where to draw each point along the axis, so that equal sizes don't hide each other.

    Of points closer than ``width`` (in log parameters) the first on the front keeps its place.
    """
    places: dict[Point, float] = {}
    cells: list[tuple[float, dict[str, int]]] = []  # log size, and the slot of each system in it
    for p in sorted(points, key=lambda p: (not p.on_front, not p.best, p.parameters)):
        size = math.log(p.parameters)
        near = [slots for centre, slots in cells if abs(centre - size) < width]
        if not near:
            cells.append((size, {}))
        slots = near[0] if near else cells[-1][1]
        slot = slots.setdefault(p.system, len(slots))
        side = -1 if slot % 2 else 1  # 0, −1, +1, −2, …
        places[p] = p.parameters * math.exp(side * ((slot + 1) // 2) * width)
    return places


def styles_of(systems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each system; the first is the one that stands out."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return dict(zip(dict.fromkeys(systems), pairs, strict=False))


def _place_labels(
    figure: Figure,
    axes: Any,
    points: Sequence[Point],
    places: dict[Point, float],
    styles: dict[str, tuple[str, str]],
    steps: Sequence[tuple[float, ...]],
) -> None:
    """Write ``r=…`` beside each point, at the free place nearest to it."""
    figure.draw_without_rendering()
    to_pixels, unit, frame = axes.transData.transform, figure.dpi / 72, axes.get_window_extent()
    pixels = [to_pixels((places[p], p.value)) for p in points]
    taken = [_box(x, y, 11 * unit, 11 * unit) for x, y in pixels]
    for p, (x, _) in zip(points, pixels, strict=True):
        if p.interval is not None:
            low, high = (to_pixels((1.0, y))[1] for y in p.interval)
            taken.append(_box(x, (low + high) / 2, 2 * unit, high - low))
    corners = [to_pixels(corner) for corner in zip(*steps, strict=True)]
    for (x, y), (next_x, _) in itertools.pairwise(corners):
        taken.append(_box((x + next_x) / 2, y, next_x - x, 2 * unit))
    for p, (x, y) in zip(points, pixels, strict=True):
        text = axes.annotate(
            "" if p.r is None else f"r={p.r}",
            (places[p], p.value),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=styles[p.system][0],
            fontweight="bold" if p.on_front else "normal",
            path_effects=[HALO],
            zorder=6,
        )
        size = text.get_window_extent()
        spots = [_box(x + u * unit, y + v * unit, size.width, size.height) for u, v in _OFFSETS]
        # What lies outside the frame counts as covered. Offsets go outwards and argmin keeps
        # the first of equals: the nearest free spot.
        covered = [
            sum(_common(spot, other) for other in taken) - _common(spot, frame) for spot in spots
        ]
        best = int(np.argmin(np.round(covered, 3)))
        text.set_position(_OFFSETS[best])
        taken.append(spots[best])


_OFFSETS = [
    (sx * reach * 1.5, sy * reach)
    for reach in (11.0, 15.0, 20.0, 26.0)
    for sx, sy in (
        (1, 0),
        (-1, 0),
        (0.85, 0.8),
        (-0.85, 0.8),
        (0.85, -0.8),
        (-0.85, -0.8),
    )
]


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    """A box around (x, y), in pixels."""
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _common(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share."""
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else float(both.width * both.height)
