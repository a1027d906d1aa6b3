"""Pictures of plans and similarities, as PNG files, and what all pictures have in common.

Each function takes values and a file, and draws on a figure of its own: no display and none of
matplotlib's global state is used, so a report can be made anywhere, in any thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from e2lora.moments import GradientProfile
from e2lora.partition import cut_by_similarity, similarity_matrix
from e2lora.plan import SharingPlan

# Okabe & Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000")
INK, FAINT = "#222222", "#8a8a8a"
DPI = 160


def short_type(module_type: str) -> str:
    """What follows the layer's number in a module type.

    >>> short_type("bert.encoder.layer.*.attention.self.query")
    'attention.self.query'
    """
    return module_type.rpartition("*.")[2]


def draw_plan(file: Path, plan: SharingPlan, title: str) -> None:
    """Rank of each layer, a panel per module type; layers that share an adapter are one block."""
    types = plan.module_types
    figure, panels = make_panels(len(types), width=5.6, height=2.5)
    top = max(group.r for group in plan.groups)
    spent = {budget.module_type: budget for budget in plan.budgets}
    for axes, module_type in zip(panels, types, strict=True):
        groups = plan.groups_of(module_type)
        for k, group in enumerate(groups):
            colour = COLOURS[1] if k % 2 == 0 else COLOURS[5]
            axes.bar(group.layers, group.r, width=1.0, color=colour, alpha=0.85, zorder=2)
            for run in _runs(group.layers):
                left, length = run[0] - 0.5, len(run)
                axes.add_patch(
                    Rectangle(
                        (left, 0),
                        length,
                        group.r,
                        fill=False,
                        ec="white",
                        lw=2,
                        zorder=3,
                    )
                )
                for layer in run[1:]:  # a hair line between layers of one block
                    x = [layer - 0.5, layer - 0.5]
                    axes.plot(x, [0, group.r], color="white", lw=0.5, alpha=0.7, zorder=3)
                axes.text(
                    left + length / 2,
                    group.r,
                    f"{group.r}",
                    ha="center",
                    va="bottom",
                    fontsize=9,
                )
        axes.axhline(plan.options.r, color=INK, lw=1, ls=(0, (5, 4)), zorder=4)
        budget = spent.get(module_type)
        note = f", {budget.spent} of {budget.available} spent" if budget else ""
        blocks = f"{len(groups)} block{'s' if len(groups) > 1 else ''}"
        axes.set_title(f"{short_type(module_type)}: {blocks}{note}", loc="left", fontsize=9.5)
        axes.set_ylim(0, top * 1.18)
        axes.set_ylabel("rank")
        axes.set_xlabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        _ticks_at_layers(axes.xaxis, [layer for g in groups for layer in g.layers])
        axes.grid(False, axis="x")
    write_headline(figure, f"{title}: rank per layer (dashed: base rank {plan.options.r})")
    save_figure(figure, file)


def _runs(layers: Sequence[int]) -> list[list[int]]:
    """Adjacent layers of a group together: it need not be contiguous.

    >>> _runs((0, 1, 4))
    [[0, 1], [4]]
    """
    numbered = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    return [[layer for _, layer in run] for _, run in numbered]


def draw_similarity(
    file: Path,
    profile: GradientProfile,
    name: str,
    title: str,
) -> None:
    """Similarity of all pairs of layers, a panel per module type, with the intervals as boxes.

    Args:
        name: one of ``SIMILARITIES``.
    """
    types = profile.by_module_type()
    matrices = {
        module_type: similarity_matrix(name, [entry.moments for entry in entries])
        for module_type, entries in types.items()
    }
    lowest = min(float(matrix.min()) for matrix in matrices.values())
    figure, panels = make_panels(len(types), width=4.1, height=3.7)
    image = None
    for axes, (module_type, entries) in zip(panels, types.items(), strict=True):
        matrix = matrices[module_type]
        image = axes.imshow(matrix, cmap="Blues", vmin=lowest, vmax=1.0)
        for interval in cut_by_similarity(matrix):
            corner, length = interval[0] - 0.5, len(interval)
            box = Rectangle((corner, corner), length, length, fill=False, ec=COLOURS[0], lw=2.2)
            axes.add_patch(box).set_clip_on(False)
        layers = [entry.target.layer for entry in entries]
        places = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 12)).round())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(places, [str(layers[int(place)]) for place in places])
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(short_type(module_type), loc="left", fontsize=9.5)
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
    assert image is not None  # a profile has at least one layer
    bar = figure.colorbar(image, ax=panels, shrink=0.75, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(f"similarity ({name})")
    write_headline(figure, f"{title}: similarity of layers (boxes: intervals)")
    save_figure(figure, file)


def write_headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=11, color=INK)


def _ticks_at_layers(axis: Any, layers: Sequence[int]) -> None:
    step = -(-(max(layers) - min(layers) + 1) // 16)
    axis.set_ticks(range(min(layers), max(layers) + 1, step))


def make_panels(num: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """``num`` axes in up to two columns (three from five panels on); size of a panel in inches."""
    columns = min(num, 2 if num < 5 else 3)
    rows = -(-num // columns)
    figure = Figure(figsize=(columns * width, rows * height + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[num:]:
        spare.remove()
    for axes in grid[:num]:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=8.5, which="both")
        axes.grid(True, color="#e8e8e8", lw=0.7, zorder=0)
        axes.set_axisbelow(True)
    return figure, grid[:num]


def save_figure(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, facecolor="white")
