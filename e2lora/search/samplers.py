"""Optuna's samplers by name: what chooses the trials that follow a study's quota and points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)

from e2lora.config import SAMPLERS, Study


class Enumeration(BruteForceSampler):
    """Every combination of a finite space once; the search itself sees when there are no more."""

    def after_trial(self, *told: Any) -> None:
        """Optuna's would stop a loop of Optuna's own, which doesn't run here."""


MAKERS: dict[str, Callable[[int], BaseSampler]] = {
    # trials that run count as bad ones, so that groups side by side don't try the same
    "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "gp": lambda seed: GPSampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
    "grid": lambda seed: Enumeration(seed=seed),
}


def sampler_of(name: str, seed: int) -> BaseSampler:
    """
    Raises:
        ValueError: no such sampler.
    """
    if name not in MAKERS:
        raise ValueError(
            f"a study's sampler is one of {', '.join(SAMPLERS)}; got {name!r}. Correct it."
        )
    with warnings.catch_warnings():  # that the one or other may still change
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return MAKERS[name](seed)


def require_enumerable(study: Study) -> None:
    """Refuse a grid over what can't be enumerated.

    Raises:
        ValueError: naming the sampler and the remedy.
    """
    if study.sampler != "grid":
        return
    trying = optuna.create_study(sampler=sampler_of("grid", 0))
    try:
        study.space(trying.ask())
    except ValueError as error:
        if "step must be given" not in str(error):
            return  # what the space itself refuses is told elsewhere
        raise ValueError(
            "sampler 'grid' enumerates the space, so every number that it suggests needs a step, "
            "or choices; this space has one without. Use suggest_categorical or `step=`, or "
            "another sampler."
        ) from error
