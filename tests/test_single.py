"""One run: what words make of it, what is refused, and how it goes on after a kill."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e2lora.broker import Running
from e2lora.command import pairs_of
from e2lora.config import PARALLELISM, Objective, TrainConfig, TrialConfig
from e2lora.plan import build_plan
from e2lora.records import (
    Evaluation,
    StudyFolder,
    StudyRecord,
    TrialFolder,
    TrialResult,
    write_json,
    write_text,
)
from e2lora.single import Run, train
from e2lora.single.choice import from_file, from_space, from_study, with_fields
from e2lora.single.entry import Words, run_of, train_command
from e2lora.single.progress import Pace, summary
from search_spaces import quickstart
from tests.commands import Command
from tests.made_up import make_targets
from tests.small import small_trial

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "search_spaces.quickstart"
SMALL, LARGE = quickstart.BUDGETS


# ---- words → configuration --------------------------------------------------------------------


def chosen(*words: str, space: str = QUICKSTART) -> TrialConfig:
    return from_space(space, pairs_of("--set", words)).config


def test_no_words_are_the_first_point() -> None:
    assert chosen() == quickstart.space(Suggesting(system="LoRA", budget=SMALL, learning_rate=3e-3))


class Suggesting:
    """A trial with these suggestions, and nothing else: the reference for what is chosen."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._values[name]

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> Any:
        return self._values[name]


@pytest.mark.parametrize(
    ("words", "suggestions"),
    [
        (["system=E²LoRA"], {"system": "E²LoRA", "budget": SMALL, "learning_rate": 3e-3}),
        (
            ["system=E²LoRA", f"budget={LARGE}"],
            {"system": "E²LoRA", "budget": LARGE, "learning_rate": 3e-3},
        ),
        (["learning_rate=0.005"], {"system": "LoRA", "budget": SMALL, "learning_rate": 5e-3}),
    ],
)
def test_what_is_not_given_is_as_in_the_first_point_that_agrees(
    words: list[str], suggestions: dict[str, Any]
) -> None:
    assert chosen(*words) == quickstart.space(Suggesting(**suggestions))


def test_words_with_a_dot_set_fields_of_the_configuration() -> None:
    config = chosen(
        "plan.r=4",
        "training.num_epochs=3",
        "training.num_workers=4",
        "plan.lora_alpha=8.0",
        "model.config_overrides.hidden_dropout_prob=0.0",
        "training.eval_every=50",
        'training.early_stopping={"patience": 2}',
        "training.deepspeed.zero_optimization.overlap_comm=false",
        "task.data=some/where",
        "seed=7",
    )
    training = config.training
    assert (training.num_epochs, training.max_steps, training.num_workers) == (3, None, 4)
    assert training.warmup_steps == 10, "what isn't named stays"
    assert training.early_stopping is not None
    assert training.early_stopping.patience == 2
    assert training.deepspeed == {"zero_optimization": {"overlap_comm": False}}
    assert (config.plan.r, config.plan.lora_alpha, config.seed) == (4, 8.0, 7)
    assert config.plan.target_parameters is None, "a rank that is said follows from no budget"
    assert config.model.config_overrides == {"hidden_dropout_prob": 0.0}
    assert config.task.data == "some/where"


def test_warmup_ratio_takes_the_place_of_steps_and_both_together_are_refused() -> None:
    assert chosen("training.warmup_ratio=0.1").training.warmup_steps == 0
    with pytest.raises(ValueError, match="given by one of `max_steps` and `num_epochs`"):
        chosen("training.num_epochs=3", "training.max_steps=100")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "topology=e2",
            ["topology=e2", "system: LoRA, blocks", "budget: 18432, 73728", "0.001 to"],
        ),
        ("system=DoRA", ["offers for system", "ShareLoRA-A, E²LoRA", "got DoRA"]),
        ("budget=3", ["offers for budget: 18432, 73728", "got 3"]),
        ("learning_rate=0.5", ["learning_rate: 0.001 to 0.01", "got 0.5"]),
        ("learning_rate=high", ["learning_rate: 0.001 to 0.01", "got high"]),
        ("training.steps=9", ["training has no 'steps'", "max_steps, num_epochs"]),
        ("optimizer.name=sgd", ["no 'optimizer'", "model, task, adapter, plan, training, seed"]),
        ("training.max_steps.x=9", ["training.max_steps is a value of its own"]),
        ("training.max_steps=many", ["training.max_steps", "got 'many'"]),
        ("training.early_stopping={x", ["must be JSON", "Quote it for the shell"]),
        ("r", ["KEY=VALUE", "'r'"]),
    ],
)
def test_word_that_means_nothing_is_refused_with_what_there_is(
    word: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(Words(sets=[word])) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for part in said:
        assert part in message


def test_space_without_points_wants_every_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "study", replace(quickstart.study, cells=(), grid={}))
    with pytest.raises(ValueError, match=r"learning_rate \(0.001 to 0.01\) is in neither"):
        chosen("system=LoRA", f"budget={SMALL}")
    config = chosen("system=LoRA", f"budget={SMALL}", "learning_rate=0.002")
    assert config.plan.target_parameters == SMALL


# ---- recorded trials and studies --------------------------------------------------------------


def make_study(storage: Path, direction: str = "maximize") -> StudyFolder:
    """Four trials: scores 0.7, 0.9 (failed since), 0.8 and 0.8."""
    folder = StudyFolder(storage, "done")
    objectives = (
        Objective(name="accuracy", direction=direction),  # type: ignore[arg-type]
        Objective(name="adapter_parameters", direction="minimize"),
    )
    config = small_trial()
    record = StudyRecord(
        name="done",
        space="tests.small",
        models=(config.model,),
        tasks=(config.task,),
        objectives=objectives,
        budgets=(4,),
        seeds=(0,),
    )
    write_json(folder.record_file, record)
    for number, score in enumerate((0.7, 0.9, 0.8, 0.8)):
        trial = folder.trial(number)
        write_json(trial.config_file, small_trial(r=number + 1))
        write_json(trial.plan_file, build_plan(make_targets(6), small_trial(r=number + 1).plan))
        failed = number == 1
        result = TrialResult(
            number=number,
            state="failed" if failed else "complete",
            metrics={"accuracy": score},
            adapter_parameters=10,
            head_parameters=2,
            seconds=1.0,
            attempts=1,
            error="out of memory" if failed else None,
        )
        write_json(trial.result_file, result)
    write_json(folder.trial(4).config_file, small_trial(r=5))  # it goes on
    return folder


def test_best_is_the_first_of_the_complete_trials_that_are_best(tmp_path: Path) -> None:
    choice = from_study(make_study(tmp_path), None, pairs_of("--set", ["training.num_workers=2"]))
    assert choice.config == with_fields(small_trial(r=3), {"training.num_workers": 2})
    assert "trial 2 of study done" in choice.source
    assert "best of 3: accuracy 0.8" in choice.source


def test_lowest_is_best_where_the_objective_is_minimized(tmp_path: Path) -> None:
    assert from_study(make_study(tmp_path, "minimize"), None, {}).config.plan.r == 1


def test_plan_is_kept_unless_what_decides_it_differs(tmp_path: Path) -> None:
    folder = make_study(tmp_path)
    for words, changed in (
        (["training.max_steps=99", "training.learning_rate=0.001"], []),
        (["plan.r=3", "task.validation_size=32", "seed=1"], ["task", "plan", "seed"]),
        (["adapter.family=dora"], ["adapter"]),
        (["training.precision=bf16"], ["precision"]),
    ):
        assert from_study(folder, 1, pairs_of("--set", words)).changed_parts == changed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (Words(study="gone"), ["no 'gone'", "done"]),
        (Words(study="done", number=9), ["has no 9", "0, 1, 2, 3, 4"]),
        (Words(study="done", number=1, best=True), ["--best and --trial-number", "number 1"]),
        (Words(best=True), ["no --from-study"]),
        (Words(study="done", space="tests.small"), ["--space, --from-study"]),
        (Words(study="done", sets=["r=4"]), ["got r", "no space to ask"]),
        (Words(name="a b"), ["--name", "'a b'"]),
        (Words(workers="2:"), ["--workers", "'2:'"]),
        (Words(workers="4:2"), ["--workers", "'4:2'"]),
        (Words(workers="2", sets=["training.num_workers=2"]), ["--workers", "Leave one out"]),
        (Words(workers="1:7"), ["16 rows", "3, 5, 6, 7 worker(s)", "training.global_batch_size"]),
    ],
)
def test_words_that_contradict_are_refused_before_anything_starts(
    words: Words, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study(tmp_path)
    assert train_command(replace(words, storage=tmp_path)) == 2
    message = capsys.readouterr().err
    for part in said:
        assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done"]


def test_study_without_complete_trials_has_no_best(tmp_path: Path) -> None:
    folder = make_study(tmp_path)
    for trial in folder.trial_folders():
        trial.result_file.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="'done' has none"):
        from_study(folder, None, {})
    assert from_study(folder, 3, {}).config.plan.r == 4


def test_trial_that_is_no_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--trial must be .*absent\.json' is no file"):
        from_file(tmp_path / "absent.json", {})


def test_recorded_trial_is_trained_as_it_stands(tmp_path: Path) -> None:
    file = make_study(tmp_path).trial(2).config_file
    assert from_file(file, {}).config == small_trial(r=3)
    run = run_of(Words(trial=file, storage=tmp_path, workers="1:2"))
    assert run.name.startswith("train-00002-")
    assert (run.min_workers, run.choice.config.training.num_workers) == (1, 2)


def test_more_workers_are_the_same_run() -> None:
    """Its default name tells configurations apart, and not how the work is spread."""
    names = {
        run_of(Words(space="tests.small", sets=sets, workers=workers)).name
        for sets, workers in (([], None), ([], "2"), ([], "1:2"), (["training.zero_stage=2"], None))
    }
    other = run_of(Words(space="tests.small", sets=["training.max_steps=7"])).name
    assert len(names) == 1
    assert other not in names


# ---- folders ----------------------------------------------------------------------------------


def run_in(storage: Path, name: str = "mine", **training: Any) -> Run:
    fields = {f"training.{key}": value for key, value in training.items()}
    choice = from_space("tests.small", {})
    return Run(replace(choice, config=with_fields(choice.config, fields)), name, storage)


def test_name_of_another_configuration_is_refused_with_the_fields_that_differ(
    tmp_path: Path,
) -> None:
    run = run_in(tmp_path)
    write_json(run.folder.config_file, run.choice.config)
    with pytest.raises(ValueError, match="another --name") as error:
        train(run_in(tmp_path, learning_rate=0.5, num_workers=2))
    assert "training.learning_rate: was '0.02', is '0.5'" in str(error.value)


def test_folder_of_a_study_is_refused(tmp_path: Path) -> None:
    make_study(tmp_path)
    with pytest.raises(ValueError, match="holds a study"):
        train(run_in(tmp_path, "done"))


def ended(folder: TrialFolder) -> TrialFolder:
    """As a run leaves it that was evaluated twice and kept the first."""
    evaluations = [
        Evaluation(step=step, metrics={"accuracy": accuracy, "loss": 0.5})
        for step, accuracy in ((3, 0.75), (6, 0.625))
    ]
    write_text(folder.metrics_file, "".join(e.model_dump_json() + "\n" for e in evaluations))
    write_json(folder.steps_file, {"tokens_per_second": [100.0, 300.0], "seconds": [3.0, 1.0]})
    result = TrialResult(
        number=0,
        state="complete",
        metrics=evaluations[0].metrics,
        adapter_parameters=12_288,
        head_parameters=770,
        seconds=4.25,
        attempts=2,
    )
    write_json(folder.result_file, result)
    return folder


def test_summary_has_first_last_and_kept_metrics_pace_and_places(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    write_json(run.folder.config_file, run.choice.config)
    lines = summary(ended(run.folder)).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["metric", "step", "3", "step", "6", "kept"]
    assert ["accuracy", "0.75", "0.625", "0.75"] in cells
    assert ["adapter", "parameters", "12,288"] in cells
    assert ["tokens/s", "150"] in cells
    assert ["adapter", str(tmp_path / "mine" / "adapter")] in cells


@pytest.mark.parametrize(
    ("patience", "said"),
    [
        (1, "loss was best after 3 steps, whose weights are kept; ended after 6"),
        (2, "loss was best after 3 steps, whose weights are kept"),
    ],
)
def test_summary_tells_which_weights_early_stopping_kept_and_that_it_stopped(
    tmp_path: Path, patience: int, said: str
) -> None:
    run = run_in(tmp_path, early_stopping={"patience": patience}, eval_every=3)
    write_json(run.folder.config_file, run.choice.config)
    lines = summary(ended(run.folder)).splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines if line.startswith("early")] == [said]


def test_run_that_has_ended_is_told_though_mlflow_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And without a Ray: there is nothing to train."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/absent/mlflow.db")
    monkeypatch.setattr("e2lora.single.connect", lambda: pytest.fail("it asked for a cluster"))
    run = run_in(tmp_path)
    write_json(run.folder.config_file, run.choice.config)
    ended(run.folder)
    assert train(run) == 0
    told = capsys.readouterr().out
    assert "the run mine has ended" in told
    assert "accuracy" in told
    assert "warning: MLflow must accept" in told


def test_line_tells_step_loss_pace_and_time_to_go_of_this_attempt() -> None:
    now = 0.0
    pace = Pace(100, clock=lambda: now)
    measured = {"loss": 0.5, "tokens_per_second": 1234.0}

    def line(seconds: float, step: int, attempt: int = 1) -> str:
        nonlocal now
        now = seconds
        return pace.line({"trial-x": Running(step, attempt, measured)})

    assert pace.line({}) == "[0:00] the worker group is starting"
    assert pace.line({"profile-x": Running(0, 1, {})}).endswith("measuring the gradient profile")
    assert line(10, 0) == "[0:10] step 0/100  ETA ?"
    assert line(20, 10) == "[0:20] step 10/100  loss 0.5  1,234 tokens/s  ETA ?"
    assert line(30, 20).endswith("ETA 1:20"), "from the first step that was seen"
    assert line(50, 0, attempt=2).endswith("step 0/100  attempt 2  ETA ?")
    assert line(60, 15, attempt=2).endswith("ETA ?"), "a checkpoint was loaded"
    assert line(70, 17, attempt=2).endswith(f"ETA {5 * 83 // 60}:{5 * 83 % 60:02d}")


def test_training_page_has_every_option_and_says_which_only_spread_the_work() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)`( ∥)? \|([^|]*)\|", page, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(TrainConfig.model_fields)
    assert {name for name, mark, _ in rows if mark} == PARALLELISM
    defaults = {name: default.strip() for name, _, default in rows}
    for name, field in TrainConfig.model_fields.items():
        if isinstance(field.default, (int, float, str)):
            shown = field.default if isinstance(field.default, str) else json.dumps(field.default)
            assert defaults[name] in (shown, shown.removesuffix(".0")), name


# ---- whole runs, as a user runs them ----------------------------------------------------------

SETS = ("topology=all", "r=2", "training.max_steps=60", "training.eval_every=10")


def losses_of(folder: TrialFolder) -> list[float]:
    return folder.steps()["loss"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrialFolder:
    """A run of one worker that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(folder, "--space", "tests.small", "--set", *SETS, "--name", "run")
    assert command.wait() == 0, command.said()
    return TrialFolder(command.storage / "run")


@pytest.mark.slow
def test_run_leaves_a_folder_and_one_run_in_mlflow(undisturbed: TrialFolder) -> None:
    from mlflow import MlflowClient

    place = undisturbed.path.parents[1]
    said = (place / "log.txt").read_text()
    for part in ("evaluation after 60 steps", "adapter parameters", "tokens/s", "mlflow ui"):
        assert part in said
    assert [e.step for e in undisturbed.evaluations()] == [10, 20, 30, 40, 50, 60]
    assert len(losses_of(undisturbed)) == 60
    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "e2lora"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in history] == losses_of(undisturbed)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"trial.json", "plan.json", "predictions.jsonl", "adapter"}


@pytest.mark.slow
def test_same_command_after_kill_9_of_the_driver_gives_the_same_numbers(
    undisturbed: TrialFolder, tmp_path: Path
) -> None:
    arguments = ("--space", "tests.small", "--set", *SETS, "--name", "run")
    command = Command(tmp_path, *arguments)
    folder = TrialFolder(command.storage / "run")
    command.wait_until(lambda: len(folder.evaluations()) >= 2)
    command.process.kill()
    command.wait()
    assert folder.result() is None

    command = Command(tmp_path, *arguments)
    assert command.wait() == 0, command.said()
    assert "goes on from its newest checkpoint" in command.said()
    assert losses_of(folder) == losses_of(undisturbed)
    assert folder.evaluations() == undisturbed.evaluations()
    assert folder.outcomes() == undisturbed.outcomes()

    command = Command(tmp_path, *arguments)
    assert command.wait() == 0
    assert "nothing is left to train" in command.said()


@pytest.mark.slow
def test_best_of_a_study_is_trained_on_more_workers_with_the_plan_it_had(tmp_path: Path) -> None:
    search = Command(
        tmp_path, "--space", "tests.small", "--study", "small", "--trials", "3", script="search.py"
    )
    assert search.wait() == 0, search.said()
    study = StudyFolder(search.storage, "small")
    e2 = next(t for t in study.trial_folders() if t.config().plan.topology == "e2")
    arguments = ("--from-study", "small", "--trial-number", str(e2.number), "--workers", "2")
    command = Command(tmp_path, *arguments, "--name", "same")
    assert command.wait() == 0, command.said()
    same = TrialFolder(command.storage / "same")
    assert f"plan {e2.plan().fingerprint()}: taken over" in command.said()
    assert same.plan() == e2.plan()
    assert (same.path / "profile.json").exists()
    assert losses_of(same) == pytest.approx(losses_of(e2), abs=2e-5)

    command = Command(tmp_path, *arguments, "--name", "other", "--set", "plan.r=2")
    assert command.wait() == 0, command.said()
    assert "made anew, since the study's trial has another plan" in command.said()
    other = TrialFolder(command.storage / "other")
    assert other.config().plan.r == 2
    assert json.loads((other.path / "profile.json").read_text()) == json.loads(
        (same.path / "profile.json").read_text()
    ), "the study's profile serves it: nothing that it depends on has changed"
