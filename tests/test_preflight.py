"""Bad input is refused before anything is trained: one paragraph that says what to do, exit 2."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from filelock import FileLock

from e2lora.config import CalibrationConfig, Objective, Study, TrialConfig
from e2lora.search.entry import Words, search_command
from tests.small import small_trial, study


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def run_command(space: str, storage: Path, name: str | None = None) -> int:
    return search_command(Words(space=space, storage=storage, study=name))


def with_part(config: TrialConfig, part: str, **options: Any) -> TrialConfig:
    changed = getattr(config, part).model_copy(update=options)
    return config.model_copy(update={part: changed})


def study_of(config: Callable[[], TrialConfig]) -> Study:
    """A study of one point, whose models and tasks are those of its configuration."""
    try:
        built = config()
    except ValueError:  # the configuration itself is what is refused
        built = small_trial()
    return replace(
        study,
        space=lambda trial: config(),
        models=(built.model,),
        tasks=(built.task,),
        points=({},),
    )


def missing_field(folder: Path) -> str:
    rows = ['{"text": "good", "label": 1}', '{"text": "bad"}'] * 200
    (folder / "train.jsonl").write_text("\n".join(rows))
    return str(folder)


def no_weights(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    return str(folder)


FAULTS: dict[str, tuple[Callable[[Path], TrialConfig], tuple[str, ...]]] = {
    "unknown topology": (lambda _: small_trial("zigzag"), ("topology", "zigzag", "'blocks'")),
    "unknown key": (lambda _: small_trial(learning_rat=1.0), ("learning_rat", "1.0")),
    "target that matches nothing": (
        lambda _: with_part(small_trial(), "adapter", target_modules=("q_proj",)),
        ("q_proj", "matches none", "query, value"),
    ),
    "rank above the weight's size": (lambda _: small_trial(r=385), ("r=385", "384 x 384", "384")),
    "rank above the size, with E²": (lambda _: small_trial("e2", r=385), ("r=385", "384")),
    "ranks by gradients where the family has its own": (
        lambda _: with_part(small_trial("e2"), "adapter", family="adalora"),
        ("AdaLoRA", "allocates its own", "allocation='uniform'"),
    ),
    "initial rank above the weight's size": (
        lambda _: with_part(small_trial(r=300), "adapter", family="adalora"),
        ("init_r=450", "384 x 384", "Lower r"),
    ),
    "gradient of too low a rank to start from": (
        lambda _: with_part(small_trial(r=200), "adapter", family="lora_ga"),
        ("LoRA-GA", "200", "384"),
    ),
    "initialisation from a layer's weight for several": (
        lambda _: with_part(
            small_trial("blocks", block_size=2), "adapter", init_lora_weights="pissa"
        ),
        ("'pissa'", "layers [0, 1]", "topology 'none'"),
    ),
    "block longer than the stack": (
        lambda _: small_trial("blocks", block_size=7),
        ("block_size=7", "6 layers"),
    ),
    "model folder without weights": (
        lambda folder: with_part(small_trial(), "model", name=no_weights(folder)),
        ("weights", "safetensors", "save_pretrained"),
    ),
    "model that isn't there": (
        lambda folder: with_part(small_trial(), "model", name=str(folder / "absent")),
        ("absent",),
    ),
    "data file with a missing field": (
        lambda folder: with_part(small_trial(), "task", data=missing_field(folder)),
        ("label", "None", "row 1"),
    ),
    "data without the column": (
        lambda _: with_part(small_trial(), "task", text_column="sentence"),
        ("sentence", "text_column", "'text'"),
    ),
    "more workers than the cluster has": (
        lambda _: small_trial(num_workers=4),
        ("4 worker(s)", "2 CPU", "num_workers"),
    ),
    "more calibration samples than rows": (
        lambda _: with_part(
            small_trial("e2"), "plan", calibration=CalibrationConfig(num_samples=10**6)
        ),
        ("num_samples=1000000", "Lower"),
    ),
    "a GPU where there is none": (
        lambda _: small_trial(gpus_per_worker=1),
        ("1 GPU", "gpus_per_worker"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_before_training(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, named = FAULTS[fault]
    space = types.ModuleType("faulty_space")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    space.study = study_of(lambda: make(inputs))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faulty_space", space)
    code = run_command("faulty_space", tmp_path, "faulty")
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1, f"one paragraph, not {said!r}"
    for part in named:
        assert part in said
    assert not (tmp_path / "faulty" / "trials").exists()


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ("search_spaces.absent", "search_spaces.quickstart"),
        ("e2lora.config", "must define `study`"),
    ],
)
def test_unknown_space_is_refused(
    space: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(space, tmp_path) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("with_points", [True, False])
def test_objective_that_no_task_reports_is_refused(
    with_points: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    space = types.ModuleType("faulty_space")
    space.study = replace(  # type: ignore[attr-defined]
        study,
        objectives=(Objective(name="recall", direction="maximize"),),
        points=study.points if with_points else (),
    )
    monkeypatch.setitem(sys.modules, "faulty_space", space)
    assert run_command("faulty_space", tmp_path) == 2
    assert "'recall'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a/b", "../up", "", " "])
def test_study_name_that_is_no_name_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tests.small", tmp_path, name or "/") == 2
    assert "--study" in capsys.readouterr().err


def test_tracking_server_that_does_not_answer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run_command("tests.small", tmp_path) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_study_that_another_process_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held").mkdir()
    with FileLock(tmp_path / "held" / ".lock"):
        assert run_command("tests.small", tmp_path, "held") == 2
    assert "one process at a time" in capsys.readouterr().err


def test_study_of_another_space_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # never gets to training
    run_command("tests.small", tmp_path, "one")
    assert run_command("search_spaces.quickstart", tmp_path, "one") == 2
    assert "another --study name" in capsys.readouterr().err
