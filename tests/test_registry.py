"""A study's winner as a registered model, which answers as its trial did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from e2lora.adapters import adapt, trainable_parameters
from e2lora.adapters.storage import save_adapter
from e2lora.config import (
    AdapterConfig,
    AnyTaskConfig,
    GenerationConfig,
    ImageClassificationConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    RegressionConfig,
    SftConfig,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.generation import write
from e2lora.models import load_base
from e2lora.plan import build_plan
from e2lora.records import StudyFolder, StudyRecord, TrialFolder, TrialResult, write_json
from e2lora.targets import find_targets
from e2lora.tasks import load_task
from e2lora.tracking import Tracker
from e2lora.tracking.predictor import AnsweringRecord, Predictor
from e2lora.tracking.registry import REQUIRED, register_winner
from tests.files import folder_of, in_own_cache
from tests.test_sft import tiny_llama
from tests.test_tracking import empty_store, free_port, running_server, uri  # noqa: F401

WORDS = ("good", "bad", "neither of both, but longer than the others", "fair", "awful")
ROWS: list[dict[str, Any]] = [
    {"one": f"{word} {k}", "two": f"{k} {word[::-1]}", "is": f"class {k % 3}", "value": k / 7}
    for k in range(14)
    for word in WORDS
]
TASKS: dict[str, AnyTaskConfig] = {
    "words": TextClassificationConfig(data="", text_column="one", label_column="is"),
    "pairs": TextClassificationConfig(
        data="", text_column="one", text2_column="two", label_column="is", max_length=24
    ),
    "numbers": RegressionConfig(data="", text_column="one", label_column="value"),
    "answers": SftConfig(
        data="",
        prompt_column="one",
        context_column="two",
        answer_column="is",
        num_shots=1,
        verify="exact",
        generation=GenerationConfig(max_new_tokens=6, temperature=1.0, stop=("e",)),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("llama")
    config = tiny_llama(folder, tied=True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"pad_token": "</s>"}))
    return config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    in_own_cache(tmp_path / "cache", monkeypatch)
    return StudyFolder(tmp_path / "storage", "study")


def make_trial(
    folder: StudyFolder, number: int, task: AnyTaskConfig, model: ModelConfig
) -> tuple[TrialFolder, Any, Any, Any]:
    """A trial as training leaves it, with a random adapter; and task, adapted model, tokenizer."""
    rows = folder_of(folder.path.parent, train=ROWS[:60], validation=ROWS[60:])
    config = TrialConfig(
        model=model,
        task=task.model_copy(update={"data": str(rows), "validation_split": "validation"}),
        adapter=AdapterConfig(target_modules=("q_proj", "v_proj")),
        plan=PlanConfig(topology="all", r=2),
        training=TrainConfig(max_steps=1, learning_rate=1e-3),
        seed=number,
    )
    loaded = load_task(config.task)
    base = load_base(model, loaded.auto_class, loaded.num_labels, torch.float32)
    plan = build_plan(find_targets(base.model, config.adapter.target_modules), config.plan)
    adapted = adapt(base.model, plan, config.adapter, base.head, in_loop=True).eval()
    torch.manual_seed(number)
    for parameter in trainable_parameters(adapted).values():
        parameter.data = torch.randn_like(parameter) / 2
    trial = folder.trial(number)
    save_adapter(trial.adapter, adapted, base, plan, config.adapter, config)
    write_json(trial.config_file, config)
    write_json(trial.plan_file, plan)
    result = TrialResult(
        number=number,
        state="complete",
        metrics={"accuracy": 0.5},
        adapter_parameters=512,
        head_parameters=96,
        seconds=1.0 + number,
        attempts=1,
    )
    write_json(trial.result_file, result)
    return trial, loaded, adapted, base.processor


def make_tracker(
    place: str, folder: StudyFolder, task: AnyTaskConfig, model: ModelConfig
) -> Tracker:
    record = StudyRecord(
        name=folder.name,
        space="search_spaces.quickstart",
        models=(model,),
        tasks=(task,),
        objectives=(Objective(name="accuracy", direction="maximize"),),
        budgets=(),
        seeds=(0,),
    )
    write_json(folder.record_file, record)
    return Tracker(place, folder, record)


def alone(task: Any, adapted: Any, tokenizer: Any, rows: Sequence[Any]) -> list[Any]:
    """What the task itself finds, one row at a time."""
    return [task.score(adapted, task.collate([row], tokenizer))[0].prediction for row in rows]


@pytest.mark.parametrize("kind", ["words", "pairs", "numbers"])
def test_texts_are_answered_as_the_task_scores_them(
    folder: StudyFolder, model: ModelConfig, kind: str
) -> None:
    trial, task, adapted, tokenizer = make_trial(folder, 0, TASKS[kind], model)
    record = AnsweringRecord.of(task.config)
    inputs = {name: [row[name] for row in ROWS[60:]] for name in record.inputs}
    answered = Predictor(trial.adapter, record).predict(inputs)
    features = task.features("validation", tokenizer)
    expected = alone(task, adapted, tokenizer, features)
    if kind == "numbers":
        assert answered["value"] == pytest.approx(expected, abs=1e-4)
        assert len(set(expected)) > 1
        return
    assert answered["label"] == expected
    assert len(set(expected)) > 1, "or any constant would do"
    logits = torch.cat([task._logits(adapted, task.collate([r], tokenizer)) for r in features])
    torch.testing.assert_close(torch.tensor(answered["logits"]), logits, atol=1e-4, rtol=1e-4)


def test_prompts_are_answered_as_when_the_task_is_scored(
    folder: StudyFolder, model: ModelConfig
) -> None:
    trial, task, adapted, tokenizer = make_trial(folder, 0, TASKS["answers"], model)
    record = AnsweringRecord.of(task.config)
    inputs = {name: [row[name] for row in ROWS[60:]] for name in ("one", "two")}
    answers = Predictor(trial.adapter, record).predict(inputs)["answer"]
    generation = task.generation("validation")
    expected = [
        write(adapted, tokenizer, [prompt], generation, [number])[0][0]
        for number, prompt in enumerate(task.prompts("validation", tokenizer))
    ]
    assert answers == expected
    assert len(set(answers)) > 1


def test_registered_winner_has_a_signature_and_one_version_for_each_result(
    folder: StudyFolder,
    model: ModelConfig,
    uri: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow
    import pandas
    from mlflow import MlflowClient

    trial, task, *_ = make_trial(folder, 0, TASKS["pairs"], model)
    tracker = make_tracker(uri, folder, task.config, model)
    first = register_winner(tracker, trial, "pairs")
    assert first == register_winner(tracker, trial, "pairs") == "models:/pairs/1"
    seed_run = folder.seeds.trial(0)
    shutil.copytree(trial.path, seed_run.path)
    result = trial.result()
    assert result is not None
    write_json(seed_run.result_file, result.model_copy(update={"seconds": 9.0}))
    another = make_tracker(uri, folder, task.config, model)
    assert register_winner(another, seed_run, "pairs") == "models:/pairs/2"
    assert register_winner(another, trial, "elsewhere") == "models:/elsewhere/1"

    client = MlflowClient(tracking_uri=uri)
    version = client.get_model_version("pairs", "1")
    run = client.get_run(version.run_id or "")
    assert (run.data.tags["e2lora.trial"], run.data.tags["e2lora.stage"]) == ("0", "search")
    assert run.info.status == "FINISHED"
    assert len(client.search_logged_models([tracker.experiment_id])) == 2, "one for each trial"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # as a user says it
    loaded = mlflow.pyfunc.load_model(first)
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["one", "two"]
    assert signature.outputs.input_names() == ["label", "logits"]
    inputs = {name: [row[name] for row in ROWS[60:]] for name in ("one", "two")}
    expected = Predictor(trial.adapter, AnsweringRecord.of(task.config)).predict(inputs)
    for given in (pandas.DataFrame(inputs), inputs):
        assert loaded.predict(given)["label"].tolist() == expected["label"]
    with pytest.raises(mlflow.MlflowException, match="missing inputs"):
        loaded.predict(pandas.DataFrame({"one": ["a text"]}))


def test_what_can_be_no_model_is_refused_before_anything_is_sent(
    folder: StudyFolder,
    model: ModelConfig,
    uri: str,  # noqa: F811
) -> None:
    trial, task, *_ = make_trial(folder, 0, TASKS["words"], model)
    tracker = make_tracker(uri, folder, task.config, model)
    with pytest.raises(RuntimeError, match=r"register the model 'a/b'.*ask again"):
        register_winner(tracker, trial, "a/b")
    config, result = trial.config(), trial.result()
    assert result is not None
    images = ImageClassificationConfig(data="any")
    write_json(trial.config_file, config.model_copy(update={"task": images}))
    with pytest.raises(ValueError, match=r"text_classification, regression, sft; got 'image_class"):
        register_winner(tracker, trial, "any")
    write_json(trial.result_file, result.model_copy(update={"state": "stopped"}))
    with pytest.raises(ValueError, match=r"ran to its end; .*00000 is stopped"):
        register_winner(tracker, trial, "any")
    write_json(trial.result_file, result)
    shutil.rmtree(trial.adapter)
    with pytest.raises(ValueError, match="adapter is not there"):
        register_winner(tracker, trial, "any")


ELSEWHERE = """
import importlib.machinery, json, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = ("ray", "deepspeed", "optuna", "matplotlib", "datasets")
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

whole = importlib.machinery.PathFinder
sys.meta_path = [Without if finder is whole else finder for finder in sys.meta_path]
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import e2lora
print(json.dumps([e2lora.__file__, model.predict([{"one": sys.argv[2]}])["label"].tolist()]))
"""


@pytest.mark.slow  # starts a server, and a process that imports all anew
def test_registered_model_answers_where_neither_project_nor_ray_is_installed(
    folder: StudyFolder,
    model: ModelConfig,
    uri: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """By a server: the code comes with the model. While that is away, registering says so."""
    trial, task, adapted, tokenizer = make_trial(folder, 0, TASKS["words"], model)
    with running_server(uri, free_port(), tmp_path) as server:
        tracker = make_tracker(server, folder, task.config, model)
        registered = register_winner(tracker, trial, "words")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, registered, ROWS[60]["one"]],
            cwd=elsewhere,
            env=own | {"MLFLOW_TRACKING_URI": server},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        place, labels = json.loads(done.stdout.splitlines()[-1])
        assert "site-packages" not in place
        assert Path(place).parents[1].name == "code", "not this checkout's"
        first = task.features("validation", tokenizer)[:1]
        assert labels == alone(task, adapted, tokenizer, first)
    with pytest.raises(RuntimeError, match=r"MLflow must answer.*http://127\.0\.0\.1.*ask again"):
        register_winner(tracker, trial, "words")


def test_required_packages_are_the_projects_own() -> None:
    """None is recorded that the project doesn't ask for itself."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = {item.partition(">")[0].partition("[")[0] for item in project["dependencies"]}
    assert set(REQUIRED) <= asked
