"""The ledger after a crash at any point between asking for a trial and telling its result."""

from __future__ import annotations

import json
from collections import Counter
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
from e2lora.search.ledger import MOST_ANSWERED, LedgerSearch
from e2lora.search.plans import checked_configurations, require_sound
from e2lora.search.unchanged import ChangedSpace, require_same_space
from e2lora.tracking import Tracker
from tests.small import small_trial, study


def space(trial: Any) -> TrialConfig:
    topology = trial.suggest_categorical("topology", ("none", "all"))
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    return small_trial(topology, learning_rate=rate)


POINT = {"topology": "all", "learning_rate": 1e-3}
STUDY = replace(study, space=space, points=(POINT,), num_trials=3)


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
    folder: StudyFolder,
    plans: Plans,
    num_trials: int | None = 3,
    study: Study = STUDY,
    **options: Any,
) -> LedgerSearch:
    def run(job: Any) -> None:
        raise JobFailed("the profile could not be measured")

    pool: Any = SimpleNamespace(broker_name="broker", run=run)
    return LedgerSearch(
        study, folder, plans, pool, num_trials, **{"open_slots": lambda: 9, **options}
    )


def states(search: LedgerSearch) -> list[TrialState]:
    return [trial.state for trial in search._ledger.get_trials() if trial.state.value != 4]


def finish(
    folder: StudyFolder, number: int, accuracy: float, state: Any = "complete", failure: Any = None
) -> None:
    result = TrialResult(
        number=number,
        state=state,
        failure=failure,
        metrics={"accuracy": accuracy},
        adapter_parameters=10,
        head_parameters=2,
        seconds=1.0,
        attempts=1,
    )
    write_json(folder.trial(number).result_file, result)
    folder.tune_trial(number).mkdir(parents=True, exist_ok=True)


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
    assert searcher(folder, plans, num_trials=2).num_to_run == 1
    assert searcher(folder, plans, num_trials=4).num_to_run == 3


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


def test_trial_that_tune_has_no_record_of_is_given_to_it_and_not_run(
    folder: StudyFolder, plans: Plans
) -> None:
    search = searcher(folder, plans, num_trials=2)
    for number, name in enumerate("ab"):
        search.suggest(name)
        finish(folder, number, 0.5)
    search.on_trial_complete("a", None)  # the driver dies before it hears of b
    for number in (0, 1):
        folder.tune_trial(number).rmdir()
    resumed = searcher(folder, plans, num_trials=2)
    assert (resumed.num_to_run, resumed.num_suggestions) == (0, 2)
    assert [resumed.suggest(name)["trial"] for name in "xy"] == [0, 1]
    assert resumed.suggest("z") == Searcher.FINISHED
    resumed.on_trial_complete("x", None)
    assert [trial.values for trial in resumed._ledger.trials] == [[0.5, 10.0]] * 2


def test_ended_trial_is_recorded_as_it_ended_whatever_would_be_refused_today(
    folder: StudyFolder, plans: Plans
) -> None:
    search = searcher(folder, plans, num_trials=1)
    search.suggest("a")
    finish(folder, 0, 0.5)
    search.on_trial_complete("a", None)
    folder.tune_trial(0).rmdir()
    kept = folder.trial(0).result_file.read_bytes()

    def refuse(trial: Any) -> TrialConfig:
        raise ValueError("no such thing any more")

    resumed = searcher(folder, plans, num_trials=1, study=replace(STUDY, space=refuse))
    assert resumed.suggest("x")["trial"] == 0
    assert folder.trial(0).result_file.read_bytes() == kept
    assert states(resumed) == [TrialState.COMPLETE]


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

    def longer(trial: Any) -> TrialConfig:
        config = space(trial)
        training = config.training.model_copy(update={"max_steps": 9})
        return config.model_copy(update={"training": training})

    changed = replace(STUDY, space=longer)
    with pytest.raises(ChangedSpace, match=r"training.max_steps: was '6', is '9'"):
        searcher(folder, plans, study=changed).suggest("a")
    finish(folder, 0, 0.5)  # and so it is when every trial has ended
    with pytest.raises(ChangedSpace, match=r"trial 0 differs in training.max_steps: was '6'"):
        require_same_space(changed, folder)
    require_same_space(STUDY, folder)


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
    chosen: list[float] = []
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
        budgets=(),
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
    assert "can't be trained. (drawn {'topology': 'none', 'learning_rate'" in note
    refused_point = {"topology": "none", "learning_rate": 1e-3}
    with pytest.raises(ValueError, match=r"can't be trained\. \(point \{'topology': 'none'"):
        checked_configurations(replace(STUDY, points=(refused_point,)), plans)
    only = replace(STUDY, points=(), space=lambda trial: small_trial("none"))
    with pytest.raises(ValueError, match=r"drawn"):
        checked_configurations(only, plans)


# ---- the order of trials -------------------------------------------------------------------------


def fair(trial: Any) -> TrialConfig:
    topology = trial.suggest_categorical("topology", ("none", "all"))
    budget = trial.suggest_categorical("budget", (9_216, 18_432))
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    config = small_trial(topology, learning_rate=rate)
    plan = config.plan.model_copy(update={"target_parameters": budget})
    return config.model_copy(update={"plan": plan})


FAIR = replace(
    STUDY,
    space=fair,
    budgets=(9_216, 18_432),
    cells=tuple({"topology": t, "budget": b} for b in (9_216, 18_432) for t in ("none", "all")),
    grid={"learning_rate": (1e-3, 3e-3)},
    points=({"topology": "all", "budget": 9_216, "learning_rate": 5e-4},),
    num_trials=11,
)


def test_quota_of_every_cell_comes_before_points_and_these_before_the_sampler(
    folder: StudyFolder, plans: Plans
) -> None:
    search = searcher(folder, plans, 11, FAIR, open_slots=lambda: 99)
    numbers = [search.suggest(str(n))["trial"] for n in range(11)]
    origins = [folder.trial(number).suggestion().origin for number in numbers]
    assert origins == ["quota"] * 8 + ["point"] + ["sampler"] * 2
    rates = [folder.trial(n).config().training.learning_rate for n in numbers[:8]]
    assert rates == [1e-3] * 4 + [3e-3] * 4, "all cells at one rate before any at the next"


def test_rank_of_each_system_is_the_one_that_comes_nearest_to_its_budget(
    folder: StudyFolder, plans: Plans
) -> None:
    search = searcher(folder, plans, 4, FAIR)
    for n in range(4):
        told = search.suggest(str(n))
        config = folder.trial(told["trial"]).config()
        # MiniLM: 6 layers, query and value of 384 x 384
        per_rank = 9_216 if config.plan.topology == "none" else 1_536
        assert config.plan.r == config.plan.target_parameters // per_rank
        assert told["adapter_parameters"] == config.plan.target_parameters
        assert config.plan.lora_alpha == 2.0 * config.plan.r, "the scale stays"
        assert folder.trial(told["trial"]).plan().options == config.plan


def test_resumed_trial_has_the_rank_it_had(folder: StudyFolder, plans: Plans) -> None:
    searcher(folder, plans, 11, FAIR).suggest("a")
    before = folder.trial(0).config()
    assert searcher(folder, plans, 11, FAIR).suggest("a")["trial"] == 0
    assert folder.trial(0).config() == before
    require_same_space(FAIR, folder)


def test_no_more_trials_are_open_than_groups_can_run(folder: StudyFolder, plans: Plans) -> None:
    slots = 1
    search = searcher(folder, plans, open_slots=lambda: slots)
    assert search.suggest("a")["trial"] == 0
    assert search.suggest("b") is None
    slots = 2  # a node came
    assert search.suggest("b")["trial"] == 1
    finish(folder, 0, 0.5)
    search.on_trial_complete("a", None)
    assert search.suggest("c")["trial"] == 2


def test_no_trial_begins_when_the_hours_are_over(folder: StudyFolder, plans: Plans) -> None:
    over = False
    search = searcher(folder, plans, is_over=lambda: over)
    search.suggest("a")
    over = True
    assert search.suggest("b") == Searcher.FINISHED
    assert search.num_open == 3


def test_trials_that_crashed_are_tried_again_where_that_is_asked_for(
    folder: StudyFolder, plans: Plans
) -> None:
    study = replace(FAIR, points=(), grid={"learning_rate": (1e-3,)}, num_trials=4)
    search = searcher(folder, plans, 4, study)
    for n, failure in enumerate(["memory", "diverged", "lost", None]):
        search.suggest(str(n))
        finish(folder, n, 0.5, "failed" if failure else "complete", failure)
        search.on_trial_complete(str(n), None)
    assert searcher(folder, plans, 4, study).num_suggestions == 0
    for _ in range(2):  # asked for twice, it is tried once
        search = searcher(folder, plans, 4, study, retry_failed=True)
        assert search.num_suggestions == 2
    numbers = [search.suggest(name)["trial"] for name in "ab"]
    assert numbers == [4, 5]
    for number, original in zip(numbers, (0, 2), strict=True):
        again, before = folder.trial(number), folder.trial(original)
        assert again.config() == before.config()
        assert again.suggestion().origin == "quota"
        finish(folder, number, 0.75)
    resumed = searcher(folder, plans, 4, study)
    assert (resumed.num_open, resumed.num_failed) == (0, 1), "the one that diverged"


# ---- what needs no training ----------------------------------------------------------------------


def test_suggestion_over_the_limit_is_answered_and_costs_no_trial(
    folder: StudyFolder, plans: Plans
) -> None:
    limited = replace(FAIR, max_parameters=10_000, num_trials=5)
    search = searcher(folder, plans, 5, limited)
    started = [search.suggest(str(n))["trial"] for n in range(5)]
    assert {folder.trial(n).config().plan.target_parameters for n in started} == {9_216}
    told = json.loads(folder.answered_file.read_text())
    assert {answer["params"]["budget"] for answer in told} == {18_432}
    assert "18,432 adapter parameters exceed the limit of 10,000" in told[0]["reason"]
    numbers = {answer["number"] for answer in told}
    assert not any(folder.trial(n).path.exists() for n in numbers)
    assert {search._ledger.trials[n].state for n in numbers} == {TrialState.PRUNED}
    assert searcher(folder, plans, 5, limited).num_suggestions == 5, "those that run, and no more"


def test_repeated_suggestion_has_the_result_of_the_trial_that_it_repeats(
    folder: StudyFolder, plans: Plans
) -> None:
    """Its original has ended, or goes on, or went on when the driver was killed."""

    def repeats(trial: Any) -> TrialConfig:
        trial.suggest_int("says nothing", 0, 9)
        return small_trial("all")

    points = tuple({"says nothing": n} for n in range(3))
    repeated = replace(STUDY, space=repeats, points=points)
    search = searcher(folder, plans, 2, repeated)
    assert search.suggest("a")["trial"] == 0
    assert search.suggest("b") == Searcher.FINISHED, "nothing else is to be had"
    assert search.is_exhausted
    assert states(search)[:3] == [TrialState.RUNNING] * 3
    resumed = searcher(folder, plans, 2, repeated)
    assert resumed.suggest("a")["trial"] == 0
    finish(folder, 0, 0.75)
    resumed.on_trial_complete("a", None)
    assert all(trial.values == [0.75, 10.0] for trial in resumed._ledger.trials)
    assert len(resumed._ledger.trials) == 1 + MOST_ANSWERED
    assert [trial.number for trial in folder.trial_folders()] == [0]


def test_grid_tries_every_combination_once_and_ends(folder: StudyFolder, plans: Plans) -> None:
    def finite(trial: Any) -> TrialConfig:
        topology = trial.suggest_categorical("topology", ("none", "all"))
        return small_trial(topology, trial.suggest_int("r", 1, 2))

    study = replace(STUDY, space=finite, points=({"topology": "all", "r": 2},), sampler="grid")
    search = searcher(folder, plans, 20, study)
    while (told := search.suggest(str(len(folder.trial_folders())))) != Searcher.FINISHED:
        number = told["trial"]
        finish(folder, number, 0.5)
        search.on_trial_complete(str(len(folder.trial_folders()) - 1), None)
    configs = [trial.config() for trial in folder.trial_folders()]
    assert {(c.plan.topology, c.plan.r) for c in configs} == {
        *(("none", 1), ("none", 2), ("all", 1), ("all", 2))
    }
    assert len(configs) == 4
    assert search.num_open == 0, "no more trials than there are combinations"
    with pytest.raises(ValueError, match="every number that it suggests needs a step"):
        require_sound(replace(STUDY, sampler="grid"))


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random"])
def test_every_sampler_goes_on_where_failed_stopped_and_answered_trials_are(
    sampler: str, folder: StudyFolder, plans: Plans
) -> None:
    study = replace(FAIR, sampler=sampler, points=(), max_parameters=10_000)
    search = searcher(folder, plans, 16, study)
    for n in range(16):
        told = search.suggest(str(n))
        state = ("complete", "stopped", "failed")[n % 3]
        finish(folder, told["trial"], 0.5 + n / 100, state)
        search.on_trial_complete(str(n), None)
    counts = Counter(trial.state for trial in search._of_study())
    assert [counts[state] for state in (TrialState.COMPLETE, TrialState.PRUNED)] == [6, 5]
    assert counts[TrialState.FAIL] == 5
    assert all(t.values is None for t in search._of_study() if t.state != TrialState.COMPLETE)


def test_ledger_may_be_a_database_that_studies_share(plans: Plans, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    one, other = (StudyFolder(tmp_path / name, "study") for name in ("a", "b"))
    searcher(one, plans, storage=url).suggest("a")
    assert searcher(other, plans, storage=url).suggest("a")["trial"] == 0, "each has its own"
    resumed = searcher(one, plans, storage=url)
    assert [resumed.suggest(name)["trial"] for name in "ab"] == [0, 1]
    assert not one.journal.exists()
    with pytest.raises(ValueError, match="a database that Optuna can use"):
        searcher(one, plans, storage="nosql://nowhere")
