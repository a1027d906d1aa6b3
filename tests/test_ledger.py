"""The ledger after a crash at any point between asking for a trial and telling its result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from mlflow.tracking import MlflowClient
from optuna.trial import TrialState
from ray.tune.search import Searcher

from e2lora.config import Study, TrialConfig
from e2lora.pool import JobFailed
from e2lora.preflight import Plans
from e2lora.records import StudyFolder, StudyRecord, TrialResult, write_json
from e2lora.report import render_report
from e2lora.search.ledger import ChangedSpace, LedgerSearch
from e2lora.search.plans import checked_configurations
from e2lora.tracking import Tracker
from tests.small import small_trial, study


def space(trial: Any) -> TrialConfig:
    return small_trial(trial.suggest_categorical("topology", ("none", "all")))


STUDY = replace(study, space=space, points=({"topology": "all"},), num_trials=3)


class Crash(Exception):
    """The driver is gone."""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    """One for all tests: it holds the model's structure."""
    plans = Plans(tmp_path_factory.mktemp("profiles"))
    plans.check = lambda config: None  # type: ignore[method-assign]  # asks a cluster
    return plans


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path, "study")


def searcher(
    folder: StudyFolder, plans: Plans, num_trials: int = 3, study: Study = STUDY
) -> LedgerSearch:
    def run(job: Any) -> None:
        raise JobFailed("the profile could not be measured")

    pool: Any = SimpleNamespace(broker_name="broker", run=run)
    return LedgerSearch(study, folder, plans, pool, num_trials)


def states(search: LedgerSearch) -> list[TrialState]:
    return [trial.state for trial in search._ledger.get_trials() if trial.state.value != 4]


def finish(folder: StudyFolder, number: int, accuracy: float) -> None:
    result = TrialResult(
        number=number,
        state="complete",
        metrics={"accuracy": accuracy},
        adapter_parameters=10,
        head_parameters=2,
        seconds=1.0,
        attempts=1,
    )
    write_json(folder.trial(number).result_file, result)


def test_points_come_first_and_a_full_study_suggests_nothing(
    folder: StudyFolder, plans: Plans
) -> None:
    search = searcher(folder, plans, num_trials=2)
    first = search.suggest("a")
    assert folder.trial(first["trial"]).config().plan.topology == "all"
    assert search.suggest("b")["trial"] == 1
    assert search.suggest("c") == Searcher.FINISHED
    finish(folder, 0, 0.5)
    search.on_trial_complete("a", None)
    assert search._ledger.trials[0].values == [0.5, 10.0]
    assert searcher(folder, plans, num_trials=2).num_suggestions == 1
    assert searcher(folder, plans, num_trials=4).num_suggestions == 3


def test_trial_that_was_asked_for_but_never_written_is_asked_for_again(
    folder: StudyFolder, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise Crash

    search = searcher(folder, plans)
    with monkeypatch.context() as patch, pytest.raises(Crash):  # noqa: PT012
        patch.setattr("e2lora.search.ledger.write_json", crash)
        search.suggest("a")
    assert states(search) == [TrialState.RUNNING]
    resumed = searcher(folder, plans)
    again = resumed.suggest("a")
    assert again["trial"] == 0
    assert folder.trial(0).config().plan.topology == "all"
    assert states(resumed) == [TrialState.RUNNING]


def test_unfinished_trial_keeps_number_and_configuration(folder: StudyFolder, plans: Plans) -> None:
    before = searcher(folder, plans)
    configs = [folder.trial(before.suggest(name)["trial"]).config() for name in "ab"]
    resumed = searcher(folder, plans)
    suggestions = [resumed.suggest(name) for name in "xyz"]
    assert [s["trial"] for s in suggestions] == [0, 1, 2]
    assert [folder.trial(n).config() for n in (0, 1)] == configs


def test_result_that_was_written_but_not_told_is_told_without_running(
    folder: StudyFolder, plans: Plans
) -> None:
    searcher(folder, plans).suggest("a")
    finish(folder, 0, 0.75)
    resumed = searcher(folder, plans)
    assert resumed._ledger.trials[0].values == [0.75, 10.0]
    assert resumed.suggest("b")["trial"] == 1


def test_interrupted_trial_and_one_whose_watcher_died_stay_open(
    folder: StudyFolder, plans: Plans
) -> None:
    search = searcher(folder, plans)
    search.suggest("a")
    search.suggest("b")
    search.on_trial_complete("a", None)
    search.on_trial_complete("b", None, error=True)
    assert states(search) == [TrialState.RUNNING, TrialState.RUNNING]
    assert search.num_open == 3


def test_configuration_that_can_not_be_trained_is_failed_and_the_next_one_is_taken(
    folder: StudyFolder, plans: Plans
) -> None:
    def faulty(trial: Any) -> TrialConfig:
        chosen = trial.suggest_categorical("topology", ("none", "all", "e2", "zigzag"))
        return small_trial(chosen)

    points = ({"topology": "zigzag"}, {"topology": "e2"}, {"topology": "none"})
    search = searcher(folder, plans, study=replace(STUDY, space=faulty, points=points))
    assert search.suggest("a")["trial"] == 2
    assert states(search) == [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING]
    reasons = [folder.trial(n).result() for n in (0, 1)]
    assert ["zigzag" in str(r and r.error) for r in reasons] == [True, False]
    assert "could not be measured" in str(reasons[1] and reasons[1].error)


def test_space_that_changed_since_is_refused_with_the_difference(
    folder: StudyFolder, plans: Plans
) -> None:
    searcher(folder, plans).suggest("a")
    changed = replace(STUDY, space=lambda trial: small_trial("all", max_steps=9))
    with pytest.raises(ChangedSpace, match=r"training.max_steps: was '6', is '9'"):
        searcher(folder, plans, study=changed).suggest("a")


def test_space_that_offers_other_choices_since_is_refused_and_fails_no_trial(
    folder: StudyFolder, plans: Plans
) -> None:
    searcher(folder, plans).suggest("a")

    def wider(trial: Any) -> TrialConfig:
        return small_trial(trial.suggest_categorical("topology", ("none", "all", "e2")))

    resumed = searcher(folder, plans, study=replace(STUDY, space=wider))
    with pytest.raises(ChangedSpace, match="other choices"):
        resumed.suggest("a")
    assert TrialState.FAIL not in states(resumed)


def test_resumed_sampler_does_not_repeat_itself(folder: StudyFolder, plans: Plans) -> None:
    def wide(trial: Any) -> TrialConfig:
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        return small_trial("none", learning_rate=rate)

    wide_study = replace(STUDY, space=wide, points=())
    chosen = []
    for number in range(3):
        search = searcher(folder, plans, num_trials=number + 1, study=wide_study)
        search.suggest(f"trial {number}")
        finish(folder, number, 0.5)
        search.on_trial_complete(f"trial {number}", None)
        chosen.append(folder.trial(number).config().training.learning_rate)
    assert len(set(chosen)) == 3


def test_ledger_opens_in_plain_optuna(folder: StudyFolder, plans: Plans) -> None:
    searcher(folder, plans).suggest("a")
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder.journal))
    )
    loaded = optuna.load_study(study_name="study", storage=storage)
    assert [direction.name for direction in loaded.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_trials_that_cannot_be_trained_are_told_by_report_and_tracking(
    folder: StudyFolder, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is refused for what it is, and one for which the user's own space fails."""

    def failing(trial: Any) -> TrialConfig:
        if trial.number == 1:
            raise RuntimeError("out of ideas")
        return small_trial("all" if trial.number == 2 else "none")

    def check(config: TrialConfig) -> None:
        if config.plan.topology == "none":
            raise ValueError("such a plan can't be trained.")

    monkeypatch.setattr(plans, "check", check)
    failing_study = replace(STUDY, space=failing, points=())
    search = searcher(folder, plans, num_trials=3, study=failing_study)
    assert search.suggest("a")["trial"] == 2
    assert states(search) == [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING]
    finish(folder, 2, 0.5)
    record = StudyRecord(
        name="study",
        space="any",
        models=STUDY.models,
        tasks=STUDY.tasks,
        objectives=STUDY.objectives,
        budgets=(4,),
        seeds=(0,),
    )
    write_json(folder.record_file, record)
    report = render_report(folder, 3)
    assert "3 of 3 planned trials have ended: 1 complete, 2 failed" in report.verdict
    assert "Trial 1 had no configuration" in report.verdict
    assert "RuntimeError: out of ideas" in report.verdict
    assert "not scored: trial 0, LoRA r=4: such a plan can't be trained." in report.table
    tracker = Tracker(f"sqlite:///{folder.path / 'mlflow.db'}", folder, record)
    tracker.mirror_all()
    client = MlflowClient(f"sqlite:///{folder.path / 'mlflow.db'}")
    runs = client.search_runs([tracker.experiment_id])
    states_of = {run.info.run_name.split()[0]: run.info.status for run in runs}
    assert {states_of[f"0000{n}"] for n in (0, 1)} == {"FAILED"}


def test_point_that_cannot_be_trained_ends_the_study_and_a_draw_is_only_told(
    plans: Plans, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(config: TrialConfig) -> None:
        if config.plan.topology == "none":
            raise ValueError("such a plan can't be trained.")

    monkeypatch.setattr(plans, "check", check)
    configs = checked_configurations(STUDY, plans)
    refused = 5 - len(configs)
    assert 0 < refused < 5
    assert all(config.plan.topology == "all" for config in configs)
    note = capsys.readouterr().out
    assert f"note: {refused} of 4 configurations drawn" in note
    assert "can't be trained. (drawn {'topology': 'none'})" in note
    with pytest.raises(ValueError, match=r"can't be trained\. \(point \{'topology': 'none'\}\)"):
        checked_configurations(replace(STUDY, points=({"topology": "none"},)), plans)
    only = replace(STUDY, points=(), space=lambda trial: small_trial("none"))
    with pytest.raises(ValueError, match=r"drawn"):
        checked_configurations(only, plans)
