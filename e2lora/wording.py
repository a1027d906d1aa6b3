"""A cell and its numbers in words, as sentences of a verdict have them."""

from __future__ import annotations

from e2lora.comparisons import NUM_DRAWS, Rows, is_random, num_draws, values_by_seed
from e2lora.scored import Cell, range_of
from e2lora.statistics import mean_and_sd, seed_interval


def named(cell: Cell) -> str:
    return f"{cell.system} at {cell.budget:,}"


def size_of(cell: Cell) -> str:
    assert cell.chosen
    text = f"{cell.chosen.parameters:,} parameters"
    if cell.misses_budget:
        side = "above" if cell.deviation > 0 else "below"
        text += f", {abs(cell.deviation):.0%} {side} the budget"
    return text


def spread_of(cell: Cell, rows: Rows) -> str:
    """Mean, standard deviation and interval over seeds."""
    by_seed = values_by_seed(cell, rows)
    if len(by_seed) < 2:
        return f"{next(iter(by_seed.values())):.4f} with one seed"
    mean, sd = mean_and_sd(list(by_seed.values()))
    low, high = seed_interval(list(by_seed.values()), within=range_of(cell.runs))
    return (
        f"mean {mean:.4f}, sd {sd:.4f} over {len(by_seed)} seeds (95 % interval {low:.4f} to "
        f"{high:.4f})"
    )


def described(cell: Cell, of_one_trial: bool, rows: Rows) -> str:
    assert cell.chosen
    parts = [size_of(cell)]
    if of_one_trial:
        parts.insert(0, f"{cell.chosen.value:.4f}, best of {cell.effort} tries")
    else:
        parts.insert(0, ("on test rows " if rows == "test" else "") + spread_of(cell, rows))
        if rows == "validation" and len(values_by_seed(cell, "test")) > 1:
            parts.insert(1, f"on test rows {spread_of(cell, 'test')}")
    if is_random(cell):
        draws = num_draws(cell)
        few = f": not a complete control, which takes {NUM_DRAWS}" if draws < NUM_DRAWS else ""
        parts.append(f"{draws} draw(s) of a partition{few}")
    return f"{cell.system} ({'; '.join(parts)})"


def p_told(value: float) -> str:
    """A p-value as a report prints it.

    >>> p_told(0.0002), p_told(0.0423)
    ('< 0.001', '= 0.042')
    """
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
