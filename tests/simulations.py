"""Studies of known truth: outcomes of systems are drawn, so what a verdict must say is known.

A system answers an item right where a sum of normal numbers is above 0: the item's easiness, what
the system is good at, how the seed went (for all systems: the data's order; and for this one), and
chance. So equal systems differ in every run, and in every item, yet not in what they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from e2lora.config import (
    AdapterConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.scored import Scored, Section

ACCURACY = Objective(name="accuracy", direction="maximize")
TASK = TextClassificationConfig(data="reviews")
SYSTEMS: dict[str, dict[str, Any]] = {
    "E²LoRA": {"topology": "e2"},
    "LoRA": {"topology": "none"},
    "all-shared": {"topology": "all"},
    "matched blocks": {"topology": "matched"},
    "random(E²)": {"topology": "random", "partition_seed": 0},
}
ITEM, TASTE, ORDER, SEED, CHANCE = 1.0, 0.5, 0.03, 0.05, 0.5
TOTAL = math.sqrt(ITEM**2 + TASTE**2 + ORDER**2 + SEED**2 + CHANCE**2)


@functools.cache
def config_of(system: str, budget: int, seed: int = 0) -> TrialConfig:
    """One draw per seed of a random partition."""
    options = dict(SYSTEMS[system])
    if "partition_seed" in options:
        options["partition_seed"] = seed
    return TrialConfig(
        model=ModelConfig(name="tiny-encoder"),
        task=TASK,
        adapter=AdapterConfig(target_modules=("query", "value")),
        plan=PlanConfig(r=8, target_parameters=budget, **options),
        training=TrainConfig(max_steps=100, learning_rate=1e-3),
        seed=seed,
    )


def draw_outcomes(
    rng: np.random.Generator,
    num_items: int,
    accuracies: Sequence[float],
    num_seeds: int = 5,
    seed_spread: float = SEED,
) -> NDArray[np.float64]:
    """0 or 1, [systems, seeds, items], of systems with these accuracies over all seeds and items.

    Args:
        seed_spread: of one system's runs, on the scale on which items spread by 1.
    """
    num_systems = len(accuracies)
    total = math.sqrt(TOTAL**2 - SEED**2 + seed_spread**2)
    level = total * stats.norm.ppf(accuracies)
    size = (num_systems, num_seeds, num_items)
    logits = (
        level[:, None, None]
        + ITEM * rng.standard_normal(num_items)
        + TASTE * rng.standard_normal((num_systems, 1, num_items))
        + ORDER * rng.standard_normal((1, num_seeds, 1))
        + seed_spread * rng.standard_normal((num_systems, num_seeds, 1))
        + CHANCE * rng.standard_normal(size)
    )
    return (logits > 0).astype(float)


def section_of(
    outcomes: Mapping[tuple[str, int], NDArray[np.float64]],
    quota: int = 2,
    parameters: Mapping[tuple[str, int], int] | None = None,
    **options: Any,
) -> Section:
    """A study whose cells, (system, budget), have runs with these outcomes, [seeds, items].

    Each cell has had its quota of tries, the first the best, with the outcomes of its first seed.
    """
    trials: list[Scored] = []
    runs: list[Scored] = []
    for (system, budget), table in outcomes.items():
        size = (parameters or {}).get((system, budget), budget)
        first = len(trials)
        for place in range(quota):
            trials.append(
                scored(first + place, config_of(system, budget), table[0], size, origin="quota")
            )
        for seed, row in enumerate(table):
            if len(table) > 1:
                config = config_of(system, budget, seed)
                runs.append(scored(len(runs), config, row, size, origin="seeds", chosen=first))
    given: dict[str, Any] = {
        "model": "tiny-encoder",
        "task": "reviews",
        "metric": ACCURACY,
        "trials": tuple(trials),
        "runs": tuple(runs),
        "quota": quota,
    }
    return Section(**{**given, **options})


def scored(
    number: int,
    config: TrialConfig,
    outcomes: NDArray[np.float64] | Sequence[float],
    parameters: int,
    **options: Any,
) -> Scored:
    """A trial whose metric is the mean of its outcomes, unless it is given."""
    given: dict[str, Any] = {"value": float(np.mean(outcomes)), "outcome": "accuracy", **options}
    return Scored(
        number=number,
        config=config,
        parameters=parameters,
        seconds=60.0,
        outcomes=tuple(np.asarray(outcomes, dtype=float).tolist()),
        **given,
    )


def equal_study(
    rng: np.random.Generator,
    num_items: int,
    accuracies: Sequence[float] = (0.85,) * len(SYSTEMS),
    budgets: Sequence[int] = (50_000, 100_000),
    num_seeds: int = 5,
    seed_spread: float = SEED,
) -> Section:
    """All systems at all budgets, on the same items."""
    names = [(system, budget) for budget in budgets for system in SYSTEMS]
    tables = draw_outcomes(rng, num_items, [*accuracies] * len(budgets), num_seeds, seed_spread)
    return section_of(dict(zip(names, tables, strict=True)))
