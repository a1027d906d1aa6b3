"""Pictures of plans and similarities, as PNG files, and what all pictures have in common.

Each function takes values and a file, and draws on a figure of its own: no display and none of
matplotlib's global state is used, so a report can be made anywhere, in any thread.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from e2lora.moments import GradientProfile, Moments, Target
from e2lora.partition import similarity_matrix
from e2lora.plan import SharingPlan

# Okabe & Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000")
INK, FAINT = "#222222", "#8a8a8a"
DPI = 160


def short_names(module_types: Sequence[str]) -> dict[str, str]:
    """What follows the layer's number in each module type; stacks apart by how their paths begin.

    >>> short_names(["bert.encoder.layer.*.attention.self.query"])
    {'bert.encoder.layer.*.attention.self.query': 'attention.self.query'}
    >>> list(short_names(["encoder.block.*.q", "decoder.block.*.q"]).values())
    ['encoder: q', 'decoder: q']
    """
    ends = {name: name.rpartition("*.")[2] for name in module_types}
    repeated = {end for end, count in Counter(ends.values()).items() if count > 1}
    return {
        name: f"{name.partition('.')[0]}: {end}" if end in repeated else end
        for name, end in ends.items()
    }


def draw_ranks(file: Path, plans: Mapping[str, SharingPlan], title: str) -> None:
    """Rank of each layer; layers that share an adapter are one block. Thin bars: fold to fold.

    A panel per module type; with several plans (by their labels) a column for each.
    """
    types = next(iter(plans.values())).module_types
    several = len(plans) > 1
    figure, panels = make_panels(
        len(types) * len(plans),
        4.8 if several else 5.6,
        2.5,
        columns=len(plans) if several else None,
    )
    names = short_names(types)
    places = ((module_type, label) for module_type in types for label in plans)
    for axes, (module_type, label) in zip(panels, places, strict=True):
        name = f"{label}, {names[module_type]}" if several else names[module_type]
        _draw_ranks_of(axes, plans[label], module_type, name)
    base = sorted({plan.options.r for plan in plans.values()})
    told = f"dashed: base rank {', '.join(map(str, base))}"
    if any(plan.stability for plan in plans.values()):
        told += "; lines: lowest to highest over folds"
    write_headline(figure, f"{title}: rank per layer ({told})")
    save_figure(figure, file)


def _draw_ranks_of(axes: Any, plan: SharingPlan, module_type: str, name: str) -> None:
    groups = plan.groups_of(module_type)
    highest = {layer: group.r for group in groups for layer in group.layers}
    for found in plan.stability.types if plan.stability else ():
        if found.module_type == module_type:
            layers, spread = sorted(highest), (found.lowest_ranks, found.highest_ranks)
            axes.vlines(layers, *spread, color=INK, lw=1, alpha=0.6, zorder=5)
            tops = zip(layers, found.highest_ranks, strict=True)
            highest = {layer: max(highest[layer], top) for layer, top in tops}
    for k, group in enumerate(groups):
        colour = COLOURS[1] if k % 2 == 0 else COLOURS[5]  # by turns: neighbours apart
        axes.bar(group.layers, group.r, width=1.0, color=colour, alpha=0.85, zorder=2)
        for run in _runs(group.layers):
            left, length = run[0] - 0.5, len(run)
            outline = Rectangle((left, 0), length, group.r, fill=False, ec="white", lw=2, zorder=3)
            axes.add_patch(outline)
            for layer in run[1:]:  # a hair line between layers of one block
                x = [layer - 0.5, layer - 0.5]
                axes.plot(x, [0, group.r], color="white", lw=0.5, alpha=0.7, zorder=3)
            top = max(highest[layer] for layer in run[(length - 1) // 2 : length // 2 + 1])
            text = f"{group.r}"
            axes.text(left + length / 2, top, text, ha="center", va="bottom", fontsize=8)
    axes.axhline(plan.options.r, color=INK, lw=1, ls=(0, (5, 4)), zorder=4)
    budget = next((b for b in plan.budgets if b.module_type == module_type), None)
    note = f", {budget.spent} of {budget.available} spent" if budget else ""
    told = f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
    axes.set_title(f"{name}: {told}{note}", loc="left", fontsize=9.5)
    axes.set_ylim(0, 1.18 * max(highest.values()))
    axes.set_ylabel("rank")
    axes.set_xlabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _ticks_at_layers(axes.xaxis, list(highest))
    axes.grid(False, axis="x")


def _runs(layers: Sequence[int]) -> list[list[int]]:
    """Adjacent layers of a group together: it need not be contiguous.

    >>> _runs((0, 1, 4))
    [[0, 1], [4]]
    """
    numbered = itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    return [[layer for _, layer in run] for _, run in numbered]


def draw_similarity(
    file: Path, profile: GradientProfile, plans: Mapping[str, SharingPlan], title: str
) -> None:
    """Similarity of all pairs of layers, with what the plan shares as boxes.

    A panel per module type; with several plans (by their labels) a column for each. A plan that no
    similarity decides is shown over `rmi`. The diagonal is left out: it is the same for all.
    """
    types = next(iter(plans.values())).module_types
    names, columns = short_names(types), len(plans) if len(plans) > 1 else None
    figure, panels = make_panels(len(types) * len(plans), 4.1, 3.7, columns=columns)
    for number, (label, plan) in enumerate(plans.items()):
        own = panels[number :: len(plans)]
        similarity = plan.options.similarity if plan.options.needs_similarity else "rmi"
        images = []
        for axes, module_type in zip(own, types, strict=True):
            members = [t for t in plan.targets if t.module_type == module_type]
            members.sort(key=lambda target: target.layer)
            images.append(axes.imshow(_pairs_shown(profile, members, similarity), cmap="Blues"))
            axes.set_facecolor("#eeeeee")  # what has no number
            _box_groups(axes, [target.layer for target in members], plan, module_type)
            name = f"{label}, {names[module_type]}" if columns else names[module_type]
            axes.set_title(name, loc="left", fontsize=9.5)
        values = np.concatenate([np.ravel(image.get_array().filled(np.nan)) for image in images])
        known = values[np.isfinite(values)] if np.isfinite(values).any() else np.ones(1)
        for image in images:
            image.set_clim(known.min(), max(known.max(), known.min() + 1e-9))
        bar = figure.colorbar(images[0], ax=own, shrink=0.6, pad=0.02, location="bottom")
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(nbins=4)
        bar.ax.tick_params(labelsize=8)
        bar.set_label(f"similarity ({similarity})", fontsize=9)
    write_headline(figure, f"{title}: similarity of layers (boxes: who shares)")
    save_figure(figure, file)


def _pairs_shown(profile: GradientProfile, members: Sequence[Target], similarity: str) -> Any:
    """Similarities of different layers; nothing on the diagonal or without a gradient."""
    alive = [k for k, m in enumerate(profile.moments_of(members)) if m.std > 0]
    shown = np.full((len(members), len(members)), np.nan)
    if alive:
        gradients = profile.gradients_of([members[k] for k in alive])
        shown[np.ix_(alive, alive)] = similarity_matrix(similarity, gradients)
    np.fill_diagonal(shown, np.nan)
    return np.ma.masked_invalid(shown)


def _box_groups(axes: Any, layers: Sequence[int], plan: SharingPlan, module_type: str) -> None:
    position = {layer: k for k, layer in enumerate(layers)}
    for group in plan.groups_of(module_type):
        runs = _runs(sorted(position[layer] for layer in group.layers))
        for rows, columns in itertools.product(runs, runs):  # off the diagonal: scattered groups
            corner = columns[0] - 0.5, rows[0] - 0.5
            size = len(columns), len(rows)
            axes.add_patch(Rectangle(corner, *size, fill=False, ec=COLOURS[0], lw=2.0)).set_clip_on(
                False
            )
    places = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 12)).round())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(places, [str(layers[int(place)]) for place in places])
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")


def draw_entropies(file: Path, profile: GradientProfile, title: str) -> None:
    """Proxy entropy of each layer, a panel per module type; thin lines: each fold alone.

    The rows of a fused projection that make q, k and v have lines of their own.
    """
    types = profile.by_module_type()
    names = short_names(list(types))
    figure, panels = make_panels(len(types), width=4.4, height=2.6)
    for axes, (module_type, entries) in zip(panels, types.items(), strict=True):
        targets = [entry.target for entry in entries]
        layers = [target.layer for target in targets]
        for fold in range(len(profile.folds)):
            values = _entropies(profile.moments_of(targets, fold))
            axes.plot(layers, values, color=COLOURS[5], lw=0.8, zorder=2)
        for number, name in enumerate(entries[0].parts):
            values = _entropies([entry.parts[name] for entry in entries])
            axes.plot(layers, values, color=COLOURS[2 + number], lw=1, ls="--", label=name)
        values = _entropies([entry.moments for entry in entries])
        axes.plot(layers, values, color=COLOURS[1], lw=1.6, marker="o", ms=3.5, zorder=3)
        if entries[0].parts:
            axes.legend(fontsize=8, frameon=False)
        axes.set_title(names[module_type], loc="left", fontsize=9.5)
        axes.set_xlabel("layer")
        axes.set_ylabel("entropy (nats)")
        _ticks_at_layers(axes.xaxis, layers)
    folds = " (thin: each fold alone)" if profile.folds else ""
    write_headline(figure, f"{title}: proxy entropy of the gradients{folds}")
    save_figure(figure, file)


def _entropies(layers: Sequence[Moments]) -> list[float]:
    """A gap where there is no gradient."""
    return [moments.entropy if moments.std > 0 else float("nan") for moments in layers]


def write_headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=11, color=INK)


def _ticks_at_layers(axis: Any, layers: Sequence[int]) -> None:
    step = -(-(max(layers) - min(layers) + 1) // 16)
    axis.set_ticks(range(min(layers), max(layers) + 1, step))


def make_panels(
    num: int, width: float, height: float, columns: int | None = None
) -> tuple[Figure, list[Any]]:
    """``num`` axes, row by row; size of a panel in inches.

    Args:
        columns: None: up to two, or three from five panels on.
    """
    columns = columns or min(num, 2 if num < 5 else 3)
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
