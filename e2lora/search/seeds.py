"""The second stage of a study: the chosen configurations, trained again over seeds.

It is a study of its own below the first one's folder, whose points are the chosen trials at fresh
seeds: the seed that a configuration was chosen at has favoured it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from e2lora.comparisons import NUM_DRAWS
from e2lora.config import Study, TrialConfig
from e2lora.records import StudyFolder
from e2lora.scored import Section
from e2lora.sections import read_study

MOST = 10**6  # bounds of suggestions: they must not change when a study is extended


def study_over_seeds(study: Study, folder: StudyFolder, num_seeds: int) -> Study:
    """Every chosen configuration at every seed; all of them at the first seed come first."""
    configs = {n: folder.trial(n).config() for n in chosen_numbers(read_study(folder).sections)}
    runs = [
        (draw, number, seed)
        for number, config in configs.items()
        for draw, seed in enumerate(_seeds_of(config, num_seeds))
    ]

    def space(trial: Any) -> TrialConfig:
        number = trial.suggest_int("trial", 0, MOST)
        seed = trial.suggest_int("seed", 0, MOST)
        draw = trial.suggest_int("draw", 0, MOST)
        return _at(folder.trial(number).config(), seed, draw)

    return Study(
        space=space,
        models=tuple(config.model for config in configs.values()),
        tasks=tuple(config.task for config in configs.values()),
        objectives=study.objectives,
        budgets=study.budgets,
        points=tuple(
            {"trial": number, "seed": seed, "draw": draw} for draw, number, seed in sorted(runs)
        ),
        seeds=tuple(dict.fromkeys(seed for _, _, seed in runs)),
    )


def chosen_numbers(sections: Iterable[Section]) -> list[int]:
    """Trials that stand for a cell, or that no other beats in metric and size."""
    numbers: set[int] = set()
    for section in sections:
        numbers |= section.front
        numbers |= {cell.chosen.number for cell in section.cells if cell.chosen}
    return sorted(numbers)


def num_runs(config: TrialConfig, num_seeds: int) -> int:
    """Of a chosen configuration: every draw of a random partition is a run."""
    return max(num_seeds, NUM_DRAWS) if config.plan.topology == "random" else num_seeds


def _seeds_of(config: TrialConfig, num_seeds: int) -> list[int]:
    """One for each run."""
    return [config.seed + 1 + i % num_seeds for i in range(num_runs(config, num_seeds))]


def _at(config: TrialConfig, seed: int, draw: int) -> TrialConfig:
    changed: dict[str, Any] = {"seed": seed}
    if config.plan.partition_seed is not None:
        drawn = config.plan.partition_seed + draw
        changed["plan"] = config.plan.model_copy(update={"partition_seed": drawn})
    return config.model_copy(update=changed)
