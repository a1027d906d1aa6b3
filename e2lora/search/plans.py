"""What a study's space returns, checked: points, draws, and what the study declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from e2lora.config import Study, TrialConfig, in_one_paragraph
from e2lora.preflight import Plans
from e2lora.search.samplers import require_enumerable, sampler_of
from e2lora.tasks import Task


def configuration_of(study: Study, trial: Any) -> TrialConfig:
    """What the study's space makes of a trial's suggestions.

    Raises:
        ValueError: whatever the space raises.
    """
    try:
        return study.space(trial)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"a study's space must return a configuration; it raised {type(error).__name__}: "
            f"{error}. Correct the space."
        ) from error


def configuration_of_point(study: Study, point: Mapping[str, Any]) -> TrialConfig:
    """Of one of the study's points.

    Raises:
        ValueError: the space doesn't accept it; the message names the point.
    """
    try:
        return configuration_of(study, optuna.trial.FixedTrial(dict(point)))
    except ValueError as error:
        raise ValueError(f"{in_one_paragraph(error)} (point {dict(point)})") from error


def require_possible_in(study: Study, plans: Plans, config: TrialConfig) -> None:
    """What a study's space returned, checked before anything is trained.

    Raises:
        ValueError, OSError: an undeclared part, an objective that its task doesn't measure, or what
            :meth:`Plans.check` refuses.
    """
    require_declared(study, config)
    plans.check(config)
    _require_known_objectives(study, plans.task(config))


def require_sound(study: Study) -> None:
    """What a study says of itself must hold together.

    Raises:
        ValueError: naming the part that doesn't.
    """
    require_enumerable(study)
    sampler_of(study.sampler, 0)
    if bool(study.cells) != bool(study.grid):
        raise ValueError(
            "a study's `cells` are tried at every combination of its `grid`: it has both or "
            f"neither; got {len(study.cells)} cell(s) and a grid of {list(study.grid)}. Add the "
            "other, e.g. grid={'learning_rate': (1e-4, 3e-4, 1e-3)}."
        )
    twice = sorted({name for cell in study.cells for name in cell} & set(study.grid))
    if twice:
        raise ValueError(
            "what a study's `grid` varies must not be said by its `cells`; got "
            f"{', '.join(twice)} in both. Take it out of one."
        )
    if not study.given and study.num_trials is None:
        raise ValueError(
            "a study needs trials: cells with a grid, points, or `num_trials` for its sampler; it "
            "has none of them. Add one."
        )


def given_configurations(study: Study) -> list[TrialConfig]:
    """Of the quota and the points.

    Raises:
        ValueError: the space doesn't accept one; the message names it.
    """
    return [configuration_of_point(study, point) for point in study.given]


def checked_configurations(study: Study, plans: Plans, num_drawn: int = 4) -> list[TrialConfig]:
    """What the study gives, and some that its space draws at random, without a ledger.

    A space may offer combinations that can't be trained: one that is drawn is told, and is not
    among these. A point must be such as can be trained.

    Raises:
        ValueError, OSError: what the space or :func:`require_possible_in` refuses at a point, or
            at every draw of a study without points.
    """
    configurations = given_configurations(study)
    for point, config in zip(study.given, configurations, strict=True):
        try:
            require_possible_in(study, plans, config)
        except ValueError as error:
            raise ValueError(f"{in_one_paragraph(error)} (point {dict(point)})") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=study.seeds[0]))
    refusals = []
    for trial in (drawing.ask() for _ in range(num_drawn)):
        try:
            config = configuration_of(study, trial)
            require_possible_in(study, plans, config)
            configurations.append(config)
        except ValueError as error:
            refusals.append(f"{in_one_paragraph(error)} (drawn {trial.params})")
    if not configurations:
        raise ValueError(refusals[0])
    if refusals:
        print(
            f"note: {len(refusals)} of {num_drawn} configurations drawn from the space can't be "
            f"trained; such trials will be failed: {refusals[0]}",
            flush=True,
        )
    return configurations


def _require_known_objectives(study: Study, task: Task) -> None:
    known = {**task.directions, "train_loss": "minimize", "adapter_parameters": "minimize"}
    unknown = [o.name for o in study.objectives if o.name not in known]
    if unknown:
        raise ValueError(
            f"a study's objectives must be metrics of its tasks; {task.config.display_name!r} has "
            f"{sorted(known)}, not {unknown}. Correct the study's `objectives`."
        )
    for objective in study.objectives:
        if objective.direction != known[objective.name]:
            better = known[objective.name] or "nothing but compare with"
            raise ValueError(
                f"an objective must point where better lies: {objective.name!r} of "
                f"{task.config.display_name!r} is there to {better}; got "
                f"{objective.direction!r}. Correct the study's `objectives`."
            )


def require_declared(study: Study, config: TrialConfig) -> None:
    """A space may only return models, tasks, budgets and seeds that its study declares.

    Raises:
        ValueError: naming what is not declared.
    """
    target = config.plan.target_parameters
    for name, value, declared in (
        ("model", config.model, study.models),
        ("task", config.task, study.tasks),
        ("seed", config.seed, study.seeds),
        ("target_parameters", target, (None, *study.budgets)),
    ):
        if value not in declared:
            raise ValueError(
                f"the space of a study may only return what the study declares; {name} "
                f"{value!r} is not in {declared!r}. Add it to the study."
            )
