"""Every shipped study: what it gives and what its sampler draws can be trained; cells are fair."""

from __future__ import annotations

import json
import pkgutil
from collections import Counter
from importlib import import_module

import optuna
import pytest

import search_spaces
from e2lora.config import CONTROLS, Study
from e2lora.search.plans import configuration_of, given_configurations, require_declared
from e2lora.search.plans import require_sound as require_sound_study
from e2lora.verdict import REFERENCE

NAMES = sorted(module.name for module in pkgutil.iter_modules(search_spaces.__path__))


def shipped(name: str) -> Study:
    study: Study = import_module(f"search_spaces.{name}").study
    return study


@pytest.mark.parametrize("name", NAMES)
def test_what_a_shipped_study_gives_and_draws_is_a_configuration_it_declares(name: str) -> None:
    study = shipped(name)
    require_sound_study(study)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [configuration_of(study, drawing.ask()) for _ in range(40)]
    for config in (*given_configurations(study), *drawn):
        require_declared(study, config)
    assert len({config.fingerprint() for config in drawn}) > 20, "it draws more than a few"


@pytest.mark.parametrize("name", NAMES)
def test_each_cell_of_a_shipped_study_has_the_same_tries(name: str) -> None:
    study = shipped(name)
    cells = Counter(
        (
            config.model.fingerprint(),
            config.task.fingerprint(),
            config.system,
            config.plan.target_parameters,
        )
        for config in given_configurations(study)[: len(study.quota)]
    )
    assert len(cells) == len(study.cells), "no two cells are the same system at the same budget"
    assert len(set(cells.values())) == 1
    assert all(config is not None for *_, config in cells), "every cell has a budget to meet"
    assert len({json.dumps(point, sort_keys=True) for point in study.quota}) == len(study.quota)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_studies_hold_the_reference_plain_lora_and_both_controls(name: str) -> None:
    systems = {cell["system"] for cell in shipped(name).cells}
    assert {REFERENCE, "LoRA", *CONTROLS} <= systems


@pytest.mark.parametrize("name", NAMES)
def test_shipped_studies_reach_their_budgets_within_their_trials(name: str) -> None:
    study = shipped(name)
    assert study.num_trials is None or study.num_trials >= len(study.given)
    budgets = {config.plan.target_parameters for config in given_configurations(study)}
    assert budgets - {None} == set(study.budgets)
