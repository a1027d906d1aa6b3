"""Searches of a known function, through Ray, Tune, the ledger and the broker as they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from optuna._hypervolume import compute_hypervolume
from optuna.trial import TrialState

from e2lora.config import Pruner, Study, TrialConfig
from e2lora.records import StudyFolder
from e2lora.sections import read_study
from tests.small import small_trial
from tests.small import study as small_study
from tests.synthetic import run_synthetic

STEPS = (2, 4, 6)


def space(trial: Any) -> TrialConfig:
    topology = trial.suggest_categorical("topology", ("none", "all"))
    block_size = None
    if topology == "all" and trial.suggest_categorical("blocks", (False, True)):
        topology, block_size = "blocks", trial.suggest_categorical("block_size", (2, 3))
    r = trial.suggest_int("r", 1, 16, log=True)
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)
    return small_trial(topology, r, block_size, learning_rate=rate, eval_every=2)


STUDY: Study = replace(small_study, space=space, points=())


def final_value(config: TrialConfig) -> float:
    """Best at a learning rate of 0.003; size helps, with diminishing returns."""
    groups = {"none": 12, "all": 2, "blocks": 12 // (config.plan.block_size or 1)}
    size = groups[config.plan.topology] * config.plan.r
    off = math.log10(config.training.learning_rate) - math.log10(3e-3)
    return 0.5 + 0.4 * (1 - math.exp(-size / 30)) * math.exp(-(off**2))


def curve(config: TrialConfig) -> list[tuple[int, float]]:
    """Its order among configurations is the same at every step."""
    return [(step, final_value(config) * (step / STEPS[-1]) ** 0.2) for step in STEPS]


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def hypervolume(folder: StudyFolder) -> float:
    """Of accuracy and log size, both scaled to [0, 1], against the worst corner."""
    results = [trial.result() for trial in folder.trial_folders()]
    losses = np.array(
        [
            (1 - r.metrics["accuracy"], math.log(r.adapter_parameters / 1_536) / math.log(96))
            for r in results
            if r is not None and r.state == "complete"
        ]
    )
    return float(compute_hypervolume(losses, np.array([1.0, 1.0])))


@pytest.mark.long
def test_tpe_finds_a_better_front_than_random_at_equal_trials(tmp_path: Path) -> None:
    volumes: dict[str, list[float]] = {"tpe": [], "random": []}
    for sampler, found in volumes.items():
        for seed in range(3):
            folder = StudyFolder(tmp_path, f"{sampler}-{seed}")
            study = replace(STUDY, sampler=sampler, seeds=(0, seed)[-1:], num_trials=40)
            study = replace(study, space=_at_seed(seed))
            assert run_synthetic(study, folder, curve).num_complete == 40
            found.append(hypervolume(folder))
    assert np.mean(volumes["tpe"]) > np.mean(volumes["random"]) + 0.01, volumes
    assert min(volumes["tpe"]) > np.mean(volumes["random"]), volumes


def _at_seed(seed: int) -> Any:
    return lambda trial: space(trial).model_copy(update={"seed": seed})


@pytest.mark.slow
def test_tune_hears_of_a_trial_that_ended_when_the_driver_was_killed(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "unheard")
    run_synthetic(replace(STUDY, num_trials=2), folder, curve)
    kept = folder.tune_trial(1) / "result.json"
    before = [json.loads(line) for line in kept.read_text().splitlines()]
    shutil.rmtree(folder.tune_trial(1))  # Tune writes now and then: as if killed before
    written = folder.trial(1).result_file.stat().st_mtime_ns

    def never(config: TrialConfig) -> Any:
        raise AssertionError("it has ended")

    assert run_synthetic(replace(STUDY, num_trials=2), folder, never).num_complete == 2
    after = [json.loads(line) for line in kept.read_text().splitlines()]
    told = ("accuracy", "step", "adapter_parameters", "ended")
    assert [[t[name] for name in told] for t in after] == [[t[n] for n in told] for t in before]
    assert folder.trial(1).result_file.stat().st_mtime_ns == written


@pytest.mark.slow
def test_stopped_trials_are_pruned_without_values_and_the_winner_stays(tmp_path: Path) -> None:
    pruner = Pruner(name="median", min_steps=2)
    study = replace(STUDY, sampler="random", num_trials=20)
    whole, pruned = StudyFolder(tmp_path, "whole"), StudyFolder(tmp_path, "pruned")
    run_synthetic(study, whole, curve)
    search = run_synthetic(replace(study, pruner=pruner), pruned, curve, seconds_per_step=1.0)
    trials = search._ledger.get_trials()
    stopped = [t.number for t in trials if t.state == TrialState.PRUNED]
    assert len(stopped) >= 2
    assert {t.state for t in trials} == {TrialState.PRUNED, TrialState.COMPLETE}
    for number in stopped:
        folder = pruned.trial(number)
        result = folder.result()
        assert trials[number].values is None
        assert not trials[number].intermediate_values
        assert result is not None
        assert result.state == "stopped"
        assert {"accuracy"} == set(result.metrics), "what it had come to is on record"
        assert result.adapter_parameters == folder.plan().parameters
        assert folder.evaluations()[-1].step < STEPS[-1]
    best = [section.best() for folder in (whole, pruned) for section in read_study(folder).sections]
    assert best[0] is not None
    assert best[1] is not None
    assert (best[0].number, best[0].value) == (best[1].number, best[1].value)
    scored = {t.number for section in read_study(pruned).sections for t in section.trials}
    assert not scored & set(stopped), "only whole trials are compared"


@pytest.mark.slow
def test_trials_of_the_quota_are_never_stopped(tmp_path: Path) -> None:
    cells = ({"topology": "none", "r": 8}, {"topology": "all", "blocks": False, "r": 1})
    study = replace(
        STUDY,
        cells=cells,
        grid={"learning_rate": (1e-5, 1e-4, 1e-3, 3e-3)},
        pruner=Pruner(name="asha", min_steps=2),
        num_trials=8,
    )
    search = run_synthetic(study, StudyFolder(tmp_path, "quota"), curve)
    assert search.num_complete == 8
