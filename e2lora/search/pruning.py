"""Whether a trial is hopeless beside others: a pure function of their evaluations.

Optuna's pruners decide, on a study in memory that is made of the evaluations alone: the search's
own ledger may have several objectives, of which pruners know nothing, and a resumed search decides
as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner

from e2lora.config import Pruner

Curve = Sequence[tuple[int, float]]
"""Step and metric of a trial's evaluations, in order of steps."""


def is_hopeless(
    curve: Curve,
    complete: Sequence[Curve],
    others: Sequence[Curve],
    pruner: Pruner,
    direction: Literal["maximize", "minimize"],
) -> bool:
    """Whether the trial should end at the last step of its curve.

    Args:
        complete, others: of all other trials of the same model and task: those that ran to their
            end, and those that were stopped or go on.

    >>> good, bad = [(10, 0.8), (20, 0.9)], [(10, 0.5)]
    >>> pruner = Pruner(name="median", min_steps=10)
    >>> is_hopeless(bad, [good] * 5, [], pruner, "maximize")
    True
    >>> is_hopeless(good[:1], [bad] * 5, [], pruner, "maximize")
    False
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, pruner=_pruner(pruner))
    for ended in complete:
        trial, _ = _told(study, ended)
        study.tell(trial, ended[-1][1])
    for other in others:
        _told(study, other)
    return _told(study, curve)[1]


def _told(study: optuna.Study, curve: Curve) -> tuple[optuna.Trial, bool]:
    """A trial that was told all of a curve, and whether it should end at the last step.

    The pruner is asked at each step, once: asha keeps its rungs so.
    """
    trial, should_end = study.ask(), False
    for step, value in curve:
        trial.report(value, step)
        should_end = bool(trial.should_prune())
    return trial, should_end


def _pruner(pruner: Pruner) -> BasePruner:
    if pruner.name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=pruner.min_steps - 1)
    return SuccessiveHalvingPruner(
        min_resource=pruner.min_steps, reduction_factor=pruner.reduction_factor
    )
