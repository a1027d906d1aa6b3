"""Pictures of scores: over adapter size, over learning rates, and what decided them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2lora.figures import COLOURS, FAINT, INK, make_panels, save_figure, write_headline
from e2lora.front import label_sizes
from e2lora.importance import Importances
from e2lora.statistics import Interval

Styles = Mapping[str, tuple[str, str]]
"""System → colour and marker."""


@dataclass(frozen=True)
class Size:
    """A system at one of its sizes."""

    parameters: int
    value: float
    interval: Interval | None


def draw_sizes(
    file: Path, lines: Mapping[str, Sequence[Size]], styles: Styles, metric: str, title: str
) -> None:
    """The metric over adapter parameters (log), a line per system; the first stands out.

    Systems stand a little beside one another, so that the bars of equal sizes can be told apart.
    """
    figure, (axes,) = make_panels(1, width=8.6, height=4.6)
    label_sizes(axes)
    sizes = [size.parameters for line in lines.values() for size in line]
    width = 0.006 * math.log(max(sizes) / min(sizes)) + 0.004
    for place, (system, line) in enumerate(lines.items()):
        colour, marker = styles[system]
        side = math.exp((place - (len(lines) - 1) / 2) * width)
        x = [size.parameters * side for size in line]
        first = place == 0
        axes.plot(
            x,
            [size.value for size in line],
            color=colour,
            marker=marker,
            ms=_points(marker),
            mec="white",
            mew=0.7,
            lw=2.2 if first else 1.1,
            zorder=6 if first else 4,
            label=system,
        )
        for position, size in zip(x, line, strict=True):
            if size.interval is not None:
                axes.plot([position] * 2, size.interval, color=colour, lw=1.3, alpha=0.45, zorder=3)
    axes.set_ylabel(metric)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    write_headline(figure, f"{title}: {metric} over adapter size")
    save_figure(figure, file)


def _points(marker: str) -> float:
    """How large a marker is, so that all look alike."""
    return 11 if marker == "*" else 6


@dataclass(frozen=True)
class Curve:
    """A system at one size over learning rates; ``others``: trials beside the grid."""

    label: str
    points: Sequence[tuple[float, float]]
    others: Sequence[tuple[float, float]] = ()


def draw_learning_rates(
    file: Path, panels: Mapping[str, Sequence[Curve]], metric: str, title: str
) -> None:
    """The metric over the learning rate (log), a panel per system, a line per size.

    All panels have the same axes; the ring is the best of a line.
    """
    columns = next((n for n in (4, 3, 5) if len(panels) % n == 0), min(4, len(panels)))
    figure, grid = make_panels(len(panels), 3.1, 2.3, columns=columns)
    curves = [curve for lines in panels.values() for curve in lines]
    rates = sorted({rate for curve in curves for rate, _ in curve.points})
    every = [point for curve in curves for point in (*curve.points, *curve.others)]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    colours = {label: COLOURS[(1 + k) % len(COLOURS)] for k, label in enumerate(labels)}
    shown = _apart(rates)
    for axes, (system, lines) in zip(grid, panels.items(), strict=True):
        for curve in lines:
            colour = colours[curve.label]
            if curve.others:
                x, y = zip(*curve.others, strict=True)
                axes.scatter(x, y, s=9, color=colour, alpha=0.45, linewidths=0, zorder=3)
            if curve.points:
                x, y = zip(*curve.points, strict=True)
                axes.plot(x, y, color=colour, marker="o", ms=4, lw=1.4, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(left / 1.25, right * 1.25)
        axes.minorticks_off()
        axes.set_xticks(shown, [f"{rate:.2g}" for rate in shown])
        margin = 0.06 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
        axes.set_title(system, loc="left", fontsize=9.5)
    for place, axes in enumerate(grid):
        if place % columns == 0:
            axes.set_ylabel(metric)
        if place >= len(grid) - columns:
            axes.set_xlabel("learning rate (log scale)")
    proxies = [grid[0].plot([], [], color=colours[label], lw=2, label=label)[0] for label in labels]
    figure.legend(
        handles=proxies,
        loc="outside lower left",
        ncols=min(6, len(labels)),
        frameon=False,
        fontsize=8.5,
        title="budget"
        + ("; dots: trials beside the grid" if any(c.others for c in curves) else ""),
        title_fontsize=8.5,
        alignment="left",
    )
    write_headline(figure, f"{title}: {metric} at each learning rate")
    save_figure(figure, file)


def _apart(rates: Sequence[float]) -> list[float]:
    """Those that can carry a label each: at least a factor of 1.6 and a sixth of the axis apart.

    >>> _apart([1e-3, 1.1e-3, 3e-3])
    [0.001, 0.003]
    >>> _apart([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    [0.0001, 0.001, 0.01, 0.1]
    """
    kept: list[float] = []
    for rate in rates:
        if not kept or rate / kept[-1] >= max(1.6, (rates[-1] / rates[0]) ** (1 / 6)):
            kept.append(rate)
    return kept


def draw_standings(
    file: Path,
    standings: Mapping[str, Size],
    styles: Styles,
    metric: str,
    title: str,
    baseline: float | None = None,
) -> None:
    """The metric of each system, in the order given, from the top; the dashed line is a baseline.

    The bars are the systems' intervals, the numbers their adapter parameters.
    """
    figure, (axes,) = make_panels(1, width=7.4, height=1.0 + 0.27 * len(standings))
    edge = axes.get_yaxis_transform()
    for place, (system, size) in enumerate(standings.items()):
        colour, marker = styles[system]
        if size.interval is not None:
            axes.plot(size.interval, [place] * 2, color=colour, lw=2.2, alpha=0.45, zorder=3)
        look = {"color": colour, "marker": marker, "ms": _points(marker), "mec": "white"}
        axes.plot(size.value, place, **look, zorder=4)
        told = f"{size.parameters:,}"
        axes.text(1.01, place, told, transform=edge, va="center", fontsize=8, color=FAINT)
    if baseline is not None:
        axes.axvline(baseline, color=FAINT, lw=1.1, ls=(0, (5, 4)), zorder=1)
        told, top = f"majority baseline {baseline:.3f}", axes.get_xaxis_transform()
        axes.text(baseline, 1.01, told, transform=top, ha="center", fontsize=8, color=FAINT)
    axes.set_yticks(range(len(standings)), list(standings))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(metric)
    write_headline(figure, f"{title}: {metric} of each system, and its adapter parameters")
    save_figure(figure, file)


def draw_importances(file: Path, found: Importances, metric: str, title: str) -> None:
    """Bars: the share of the variance of the metric that each suggestion explains alone."""
    shares = list(reversed(found.shares))
    figure, (axes,) = make_panels(1, width=7.4, height=0.9 + 0.36 * len(shares))
    for place, share in enumerate(shares):
        colour = COLOURS[5] if share.is_conditional else COLOURS[1]
        axes.barh(place, share.alone, height=0.62, color=colour, zorder=2)
        ends = [max(share.alone - 1.96 * share.error, 0.0), share.alone + 1.96 * share.error]
        axes.plot(ends, [place] * 2, color=INK, lw=1.2, zorder=3)
        told = f"{share.alone:.0%}" + (f" (of {share.n} trials)" if share.is_conditional else "")
        axes.text(ends[1] + 0.012, place, told, va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(shares)), [share.name for share in shares])
    axes.set_xlim(0, min(1.0, max(share.alone for share in shares)) + 0.22)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"share of the variance of {metric} that it explains alone")
    figure.supxlabel(
        f"{found.together:.0%} is explained only by several together; R² of unseen trials "
        f"{found.r2:.2f}, n = {found.n}; line: 95 % over trees; light: only where it is suggested",
        x=0.012,
        ha="left",
        fontsize=7.5,
        color=FAINT,
    )
    write_headline(figure, f"{title}: what decided {metric}")
    save_figure(figure, file)
