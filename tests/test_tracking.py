"""The mirror, against real MLflow stores: sqlite files and a server on loopback."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2lora.config import (
    AdapterConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.moments import Target
from e2lora.plan import build_plan
from e2lora.records import (
    Evaluation,
    StudyFolder,
    StudyRecord,
    Suggestion,
    TrialFolder,
    TrialResult,
    write_json,
)
from e2lora.tracking import RunTracker, Tracker, default_tracking_uri
from e2lora.tracking.contents import thinned

MODEL, TASK = ModelConfig(name="tiny-encoder"), TextClassificationConfig(data="glue", subset="sst2")
TARGETS = [
    Target(
        path=f"layer.{layer}.query",
        module_type="layer.*.query",
        layer=layer,
        in_features=32,
        out_features=32,
    )
    for layer in range(4)
]
COMPLETE: dict[str, Any] = {
    "state": "complete",
    "metrics": {"accuracy": 0.75, "loss": 0.25},
    "adapter_parameters": 512,
    "head_parameters": 66,
    "seconds": 12.5,
    "attempts": 2,
}
FAILED: dict[str, Any] = {
    "state": "failed",
    "metrics": {},
    "adapter_parameters": 0,
    "head_parameters": 0,
    "seconds": 3.0,
    "attempts": 3,
    "error": "Traceback\nRuntimeError: it's out of memory",
    "failure": "memory",
}
STOPPED: dict[str, Any] = {**COMPLETE, "state": "stopped"}
Runs = dict[str, dict[str, Any]]


def make_study(storage: Path, name: str = "quick") -> tuple[StudyFolder, StudyRecord]:
    folder = StudyFolder(storage, name)
    record = StudyRecord(
        name=name,
        space="search_spaces/quickstart.py",
        models=(MODEL,),
        tasks=(TASK,),
        objectives=(
            Objective(name="accuracy", direction="maximize"),
            Objective(name="adapter_parameters", direction="minimize"),
        ),
        budgets=(4, 8),
        seeds=(0, 1),
    )
    write_json(folder.record_file, record)
    return folder, record


def write_trial(
    folder: StudyFolder, number: int, accuracies: tuple[float, ...], **plan: Any
) -> TrialFolder:
    """A trial with a plan of blocks, or another, evaluated every 10 steps."""
    options = PlanConfig(**(plan or {"topology": "blocks", "block_size": 2}), r=4)
    config = TrialConfig(
        model=MODEL,
        task=TASK,
        adapter=AdapterConfig(target_modules=("query",)),
        plan=options,
        training=TrainConfig(max_steps=30, learning_rate=1e-3, num_workers=2),
        seed=number,
    )
    trial = folder.trial(number)
    write_json(trial.config_file, config)
    write_json(trial.plan_file, build_plan(TARGETS, options))
    evaluations = [
        Evaluation(step=10 * k, metrics={"accuracy": accuracy, "loss": 1 - accuracy})
        for k, accuracy in enumerate(accuracies, start=1)
    ]
    trial.metrics_file.write_text("".join(e.model_dump_json() + "\n" for e in evaluations))
    return trial


def end_trial(trial: TrialFolder, values: dict[str, Any]) -> None:
    write_json(trial.result_file, TrialResult(number=trial.number, **values))


def read_runs(tracker: Tracker | RunTracker) -> Runs:
    """Everything that MLflow holds of our experiment, by run; read with a client of its own."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracker.tracking_uri)
    runs: Runs = {}
    for run in client.search_runs([tracker.experiment_id]):
        name, run_id = run.info.run_name, run.info.run_id
        assert name not in runs, f"two runs are named {name}"
        runs[name] = {
            "id": run_id,
            "status": run.info.status,
            "end": run.info.end_time,
            "params": dict(run.data.params),
            "tags": dict(run.data.tags),
            "metrics": dict(run.data.metrics),
            "points": {
                metric: [
                    (p.step, p.value, p.timestamp)
                    for p in client.get_metric_history(run_id, metric)
                ]
                for metric in run.data.metrics
            },
            "artifacts": [file.path for file in client.list_artifacts(run_id)],
        }
    return runs


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its schema, which takes some seconds to make: made once."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path) -> str:
    """A database of the test's own."""
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(backend: str, port: int, folder: Path) -> Iterator[str]:
    """`mlflow server` on loopback; its whole process group is stopped in the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", str(folder)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_study_has_one_parent_and_one_child_per_trial(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    first, second = write_trial(folder, 0, (0.5, 0.6, 0.75)), write_trial(folder, 7, (0.6,))
    end_trial(first, COMPLETE)
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(first)
    tracker.mirror_trial(second)

    runs = read_runs(tracker)
    assert sorted(runs) == ["00000 blocks(2) r=4", "00007 blocks(2) r=4", "quick"]
    parent, ended, running = runs["quick"], runs["00000 blocks(2) r=4"], runs["00007 blocks(2) r=4"]
    assert parent["id"] == tracker.parent_run_id
    assert parent["status"] == running["status"] == "RUNNING"
    assert parent["params"] == {
        "study": "quick",
        "space": "search_spaces/quickstart.py",
        "models": "tiny-encoder",
        "tasks": "glue/sst2",
        "budgets": "4, 8",
        "seeds": "0, 1",
        "objectives": "accuracy (maximize), adapter_parameters (minimize)",
    }
    assert ended["status"] == "FINISHED"
    assert ended["params"] == {
        "model": "tiny-encoder",
        "task": "glue/sst2",
        "topology": "blocks",
        "system": "blocks(2)",
        "block_size": "2",
        "r": "4",
        "lora_alpha": "16.0",
        "learning_rate": "0.001",
        "max_steps": "30",
        "global_batch_size": "16",
        "zero_stage": "1",
        "num_workers": "2",
        "seed": "0",
        "family": "lora",
        "target_modules": "query",
    }
    assert ended["metrics"] == {
        "accuracy": 0.75,
        "loss": 0.25,
        "adapter_parameters": 512,
        "head_parameters": 66,
        "seconds": 12.5,
        "attempts": 2,
        "validation/accuracy": 0.75,
        "validation/loss": 0.25,
    }
    assert [p[:2] for p in ended["points"]["validation/accuracy"]] == [
        (10, 0.5),
        (20, 0.6),
        (30, 0.75),
    ]
    assert ended["artifacts"] == ["plan.json", "trial.json"]
    assert ended["tags"]["plan_fingerprint"] == first.plan().fingerprint()
    assert running["tags"]["mlflow.parentRunId"] == parent["id"]
    assert running["tags"]["e2lora.trial"] == running["tags"]["seed"] == "7"


def test_mirroring_twice_changes_nothing(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    end_trial(write_trial(folder, 0, (0.5, 0.75)), COMPLETE)
    end_trial(write_trial(folder, 1, ()), FAILED)
    open_trial = write_trial(folder, 2, (0.5, 0.6))
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(open_trial)
    tracker.mirror_all()
    once = read_runs(tracker)
    tracker.mirror_trial(open_trial)
    tracker.mirror_all()
    assert read_runs(tracker) == once


def test_resumed_study_goes_on_in_its_runs(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    ended, trial = write_trial(folder, 0, (0.5, 0.75)), write_trial(folder, 1, (0.5,))
    end_trial(ended, COMPLETE)
    former = Tracker(uri, folder, record)
    former.mirror_all()
    former.mirror_trial(trial)
    before = read_runs(former)

    write_trial(folder, 1, (0.5, 0.7))
    tracker = Tracker(uri, StudyFolder(tmp_path, "quick"), record)
    tracker.mirror_trial(trial)
    tracker.mirror_all()
    after = read_runs(tracker)
    assert tracker.parent_run_id == former.parent_run_id
    assert after["00000 blocks(2) r=4"] == before["00000 blocks(2) r=4"]
    first, both = before["00001 blocks(2) r=4"], after["00001 blocks(2) r=4"]
    assert first["id"] == both["id"]
    assert both["points"]["validation/accuracy"][:1] == first["points"]["validation/accuracy"]
    assert [point[:2] for point in both["points"]["validation/accuracy"]] == [(10, 0.5), (20, 0.7)]


def test_study_of_equal_name_elsewhere_is_another_study(tmp_path: Path, uri: str) -> None:
    here = Tracker(uri, *make_study(tmp_path / "here"))
    there = Tracker(uri, *make_study(tmp_path / "it's there"))
    assert here.parent_run_id != there.parent_run_id
    again = Tracker(uri, *make_study(tmp_path / "it's there"))
    assert again.parent_run_id == there.parent_run_id


def test_runs_that_a_dead_driver_left_running_are_closed(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    trial = write_trial(folder, 0, (0.5,))
    Tracker(uri, folder, record).mirror_trial(trial)
    tracker = Tracker(uri, folder, record)
    tracker.mirror_all()
    assert read_runs(tracker)["00000 blocks(2) r=4"]["status"] == "KILLED"
    tracker.mirror_trial(trial)  # it was taken up again
    tracker.mirror_all()
    assert read_runs(tracker)["00000 blocks(2) r=4"]["status"] == "RUNNING"


def test_failed_trial_tells_its_error_and_is_not_scored(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    trial = write_trial(folder, 0, ())
    end_trial(trial, FAILED)
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(trial)
    run = read_runs(tracker)["00000 blocks(2) r=4"]
    assert run["status"] == "FAILED"
    assert run["tags"]["e2lora.error"] == run["tags"]["mlflow.note.content"] == FAILED["error"]
    assert run["metrics"] == {"seconds": 3, "attempts": 3}
    assert (run["tags"]["e2lora.state"], run["tags"]["e2lora.failure"]) == ("failed", "memory")

    end_trial(write_trial(folder, 0, (0.75,)), COMPLETE)  # tried again, with success
    tracker.mirror_trial(trial)
    run = read_runs(tracker)["00000 blocks(2) r=4"]
    assert (run["status"], run["metrics"]["attempts"]) == ("FINISHED", 2)
    assert run["tags"]["e2lora.error"] == run["tags"]["mlflow.note.content"] == ""
    assert (run["tags"]["e2lora.state"], run["tags"]["e2lora.failure"]) == ("complete", "")


def test_trial_that_was_stopped_has_no_final_score(tmp_path: Path, uri: str) -> None:
    """What it had reached stands by step, and in no column that whole trials are compared by."""
    folder, record = make_study(tmp_path)
    trial = write_trial(folder, 0, (0.9,))
    end_trial(trial, STOPPED)
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(trial)
    run = read_runs(tracker)["00000 blocks(2) r=4"]
    assert (run["status"], run["tags"]["e2lora.state"]) == ("KILLED", "stopped")
    assert run["metrics"] == {
        "validation/accuracy": 0.9,
        "validation/loss": 1 - 0.9,
        "adapter_parameters": 512,
        "head_parameters": 66,
        "seconds": 12.5,
        "attempts": 2,
    }


def test_budget_and_origin_are_told_and_the_rank_when_it_is_decided(
    tmp_path: Path, uri: str
) -> None:
    """Parameters can't be changed: the rank follows from the budget when there is a plan."""
    folder, record = make_study(tmp_path)
    trial = write_trial(folder, 0, (), topology="all", target_parameters=9000, budget="interval")
    plan = trial.plan_file.read_text()
    trial.plan_file.unlink()
    write_json(trial.suggestion_file, Suggestion(origin="quota", params={"system": "all"}))
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(trial)
    params = read_runs(tracker)["00000 all-shared"]["params"]
    told = {name: params[name] for name in ("budget", "rank_budget", "origin")}
    assert told == {"budget": "9000", "rank_budget": "interval", "origin": "quota"}
    assert not {"r", "lora_alpha"} & params.keys()
    config = trial.config()
    write_json(trial.config_file, config.model_copy(update={"plan": config.plan.at_rank(6)}))
    trial.plan_file.write_text(plan)
    tracker.mirror_trial(trial)
    params = read_runs(tracker)["00000 all-shared"]["params"]
    assert (params["r"], params["lora_alpha"]) == ("6", "24.0")


def test_seed_runs_are_children_apart_from_trials_of_the_same_number(
    tmp_path: Path, uri: str
) -> None:
    folder, record = make_study(tmp_path)
    end_trial(write_trial(folder, 3, (0.75,)), COMPLETE)
    random = {"topology": "random", "num_intervals": 2, "partition_seed": 7}
    random["allocation"] = "uniform"
    seed_run = write_trial(folder.seeds, 3, (0.5, 0.6), **random)
    write_json(seed_run.suggestion_file, Suggestion(origin="seeds", params={}, chosen=2))
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(seed_run)
    tracker.mirror_all()
    name = "00003 seed 3 draw 7 random(2) (uniform) r=4"
    before = read_runs(tracker)
    assert sorted(before) == ["00003 blocks(2) r=4", name, "quick"]
    assert before[name]["status"] == "RUNNING"

    end_trial(seed_run, COMPLETE | {"metrics": {"accuracy": 0.5}, "test_metrics": {"mcc": 0.25}})
    again = Tracker(uri, StudyFolder(tmp_path, "quick"), record)
    again.finish([], "FINISHED")
    runs = read_runs(again)
    searched, run = runs["00003 blocks(2) r=4"], runs[name]
    assert run["id"] == before[name]["id"]
    assert run["tags"]["mlflow.parentRunId"] == searched["tags"]["mlflow.parentRunId"]
    assert [r["tags"]["e2lora.stage"] for r in (searched, run)] == ["search", "seeds"]
    assert run["tags"]["e2lora.chosen"] == "2"
    assert "e2lora.chosen" not in searched["tags"]
    assert (run["params"]["seed"], run["params"]["partition_seed"]) == ("3", "7")
    assert run["params"]["origin"] == "seeds"
    assert (searched["metrics"]["accuracy"], run["metrics"]["accuracy"]) == (0.75, 0.5)
    assert run["metrics"]["test/mcc"] == 0.25
    assert runs["quick"]["metrics"] == {
        "finished_trials": 1,
        "failed_trials": 0,
        "finished_seed_runs": 1,
    }


def test_saved_view_charts_size_against_score_of_whole_trials(tmp_path: Path, uri: str) -> None:
    from mlflow import MlflowClient

    folder, record = make_study(tmp_path)
    for number, values in enumerate((COMPLETE, STOPPED, FAILED, COMPLETE)):
        end_trial(write_trial(folder, number, (0.5,)), values)
    write_trial(folder, 4, (0.5,))
    end_trial(write_trial(folder.seeds, 0, (0.5,)), COMPLETE)
    tracker = Tracker(uri, folder, record)
    tracker.mirror_all()
    client = MlflowClient(tracking_uri=uri)
    tags = client.get_experiment(tracker.experiment_id).tags
    views = {
        view["name"]: json.loads(zlib.decompress(base64.b64decode(view["state"][8:])))
        for tag, value in tags.items()
        if tag.startswith("mlflow.sharedViewState.")
        for view in [json.loads(value)]
    }
    assert set(views) == {"quick", "quick: seed runs"}
    shown = {
        name: client.search_runs([tracker.experiment_id], view["searchFilter"])
        for name, view in views.items()
    }
    assert {run.data.tags["e2lora.trial"] for run in shown["quick"]} == {"0", "3"}
    assert [run.data.tags["e2lora.stage"] for run in shown["quick: seed runs"]] == ["seeds"]
    scatter, parallel = views["quick"]["compareRunCharts"]
    axes = [scatter["xaxis"]["key"], scatter["yaxis"]["key"]]
    assert axes == parallel["selectedMetrics"] == ["adapter_parameters", "accuracy"]
    for run in shown["quick"]:
        assert set(axes) <= run.data.metrics.keys()
        assert set(parallel["selectedParams"]) <= run.data.params.keys()

    Tracker(uri, folder, record)  # which finds the views as they are to be, and leaves them
    assert client.get_experiment(tracker.experiment_id).tags == tags


def test_evaluation_made_again_by_a_later_attempt_counts(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    trial = write_trial(folder, 0, (0.5, 0.9))
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(trial)
    write_trial(folder, 0, (0.5, 0.7))
    tracker.mirror_trial(trial)
    metrics = read_runs(tracker)["00000 blocks(2) r=4"]["metrics"]
    assert metrics == {"validation/accuracy": 0.7, "validation/loss": 1 - 0.7}


def test_finished_study_holds_report_records_winner_and_counts(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    winner = write_trial(folder, 0, (0.75,))
    end_trial(winner, COMPLETE)
    winner.adapter.mkdir()
    (winner.adapter / "adapter.safetensors").write_bytes(b"weights")
    end_trial(write_trial(folder, 1, ()), FAILED)
    left_open = write_trial(folder, 2, (0.5,))
    report = folder.report / "report.html"
    report.parent.mkdir()
    report.write_text("<p>E²</p>")
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(left_open)
    tracker.finish([report], "KILLED", winner)
    runs = read_runs(tracker)
    stored = {
        str(file.relative_to(tmp_path / "mlflow-artifacts" / runs["quick"]["id"] / "artifacts"))
        for file in (tmp_path / "mlflow-artifacts" / runs["quick"]["id"]).rglob("*.*")
    }
    assert stored == {
        "report/report.html",
        "study/study.json",
        "winner/adapter/adapter.safetensors",
        "winner/plan.json",
        "winner/result.json",
        "winner/trial.json",
    }
    assert runs["quick"]["tags"]["e2lora.winner"] == "search 0"
    assert runs["quick"]["status"] == runs["00002 blocks(2) r=4"]["status"] == "KILLED"
    assert runs["quick"]["metrics"] == {"finished_trials": 1, "failed_trials": 1}
    assert f"mlflow ui --backend-store-uri {uri}" in tracker.describe()
    assert tracker.parent_run_id in tracker.describe()


def test_trials_mirrored_from_two_threads_have_one_run_each(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    trials = [write_trial(folder, number, (0.5,)) for number in range(3)]
    tracker = Tracker(uri, folder, record)

    def mirror() -> None:
        for trial in trials:
            tracker.mirror_trial(trial)

    threads = [threading.Thread(target=mirror) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = read_runs(tracker)  # which asserts that names are unique
    assert len(runs) == 4
    assert all(len(run["points"].get("validation/accuracy", "1")) == 1 for run in runs.values())


def test_store_that_fails_does_not_stop_a_study(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, elsewhere = tmp_path / "store", tmp_path / "moved"
    place.mkdir()
    shutil.copy(empty_store, place)
    folder, record = make_study(tmp_path)
    trial, other = write_trial(folder, 0, (0.5,)), write_trial(folder, 1, (0.6,))
    tracker = Tracker(f"sqlite:///{place}/mlflow.db", folder, record)
    tracker.mirror_trial(trial)

    place.rename(elsewhere)
    end_trial(write_trial(folder, 0, (0.5, 0.75)), COMPLETE)
    for _ in range(2):
        tracker.mirror_trial(trial)
        tracker.mirror_trial(other)
        tracker.mirror_all()
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"The study goes on; metrics stand in {folder.trials}" in warning
    tracker.finish([], "FINISHED")
    assert "when the study is run again" in capsys.readouterr().err

    elsewhere.rename(place)
    tracker.mirror_all()
    runs = read_runs(tracker)
    ended = runs["00000 blocks(2) r=4"]
    assert (len(runs), ended["status"], ended["metrics"]["accuracy"]) == (3, "FINISHED", 0.75)
    assert [point[:2] for point in ended["points"]["validation/accuracy"]] == [
        (10, 0.5),
        (20, 0.75),
    ]
    assert runs["00001 blocks(2) r=4"]["metrics"]["validation/accuracy"] == 0.6


@pytest.mark.slow  # a server takes 10 s to start, and it is started twice
def test_server_that_dies_does_not_stop_a_study(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, record = make_study(tmp_path)
    trial, other = write_trial(folder, 0, (0.5,)), write_trial(folder, 1, (0.6,))
    seed_run = write_trial(folder.seeds, 0, (0.5,), topology="all")
    port = free_port()
    with running_server(uri, port, tmp_path) as server:
        tracker = Tracker(server, folder, record)
        tracker.mirror_trial(trial)
        tracker.mirror_trial(seed_run)
        assert f"{server}/#/experiments/" in tracker.describe()
        before = read_runs(tracker)

    write_trial(folder, 0, (0.5, 0.75))
    end_trial(trial, COMPLETE)
    tracker.mirror_trial(seed_run)
    write_trial(folder.seeds, 0, (0.5, 0.25), topology="all")
    end_trial(seed_run, COMPLETE)
    for mirror in (tracker.mirror_all, lambda: tracker.mirror_trial(other), tracker.mirror_all):
        mirror()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert f"The study goes on; metrics stand in {folder.trials}" in warnings[0]

    with running_server(uri, port, tmp_path):
        deadline = time.monotonic() + 30
        while len(read_runs(tracker)) < 4 and time.monotonic() < deadline:
            tracker.mirror_trial(other)  # the first calls may come before it is tried again
            time.sleep(0.1)
        runs = read_runs(tracker)
    assert runs["00000 blocks(2) r=4"]["id"] == before["00000 blocks(2) r=4"]["id"]
    assert runs["00000 blocks(2) r=4"]["status"] == "FINISHED"
    assert [p[:2] for p in runs["00000 blocks(2) r=4"]["points"]["validation/accuracy"]] == [
        (10, 0.5),
        (20, 0.75),
    ]
    assert runs["00000 blocks(2) r=4"]["artifacts"] == ["plan.json", "trial.json"]
    name = "00000 seed 0 all-shared r=4"
    assert (runs[name]["id"], runs[name]["status"]) == (before[name]["id"], "FINISHED")
    points = runs[name]["points"]["validation/accuracy"]
    assert [point[:2] for point in points] == [(10, 0.5), (20, 0.25)]
    assert runs["00001 blocks(2) r=4"]["metrics"]["validation/accuracy"] == 0.6


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("http://me:secret@127.0.0.1:{port}", "refused"),
        ("./mlruns", "filesystem tracking backend"),
        ("file:{folder}/mlruns", "filesystem tracking backend"),
        ("sqlite:///{folder}/missing/mlflow.db", "unable to open database file"),
        ("postgres-typo://host/x", "postgres-typo"),
    ],
)
def test_store_that_does_not_answer_is_an_error_before_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    for name in ("MAX_RETRIES", "TIMEOUT"):  # what applies unless the user says otherwise
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    folder, record = make_study(tmp_path)
    started = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(why)) as error:
        Tracker(value.format(port=free_port(), folder=tmp_path), folder, record)
    assert time.monotonic() - started < 20
    message = str(error.value)
    assert "set MLFLOW_TRACKING_URI to a running `mlflow server`" in message
    assert "secret" not in message
    assert "\n" not in message


def test_database_whose_making_is_interrupted_is_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with some of MLflow's tables would be refused by every later command."""
    folder, record = make_study(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def interrupt(engine: Any) -> None:  # the tables are made, not yet brought up to date
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.store.db.utils._upgrade_db", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Tracker(uri, folder, record)
    assert not [file.name for file in tmp_path.iterdir() if "mlflow" in file.name]
    Tracker(uri, folder, record)
    assert [file.name for file in tmp_path.iterdir() if "mlflow" in file.name] == ["mlflow.db"]


def test_tracking_uri_is_the_users_or_lies_where_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "storage"
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(storage) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(copy)
    assert default_tracking_uri(storage) == f"sqlite:///{storage}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_tracking_uri(storage) == "http://tracking:5000"


def make_run(storage: Path, name: str = "mine") -> TrialFolder:
    """The folder of a run that stands alone, as :func:`write_trial` leaves it."""
    trial = write_trial(make_study(storage / "elsewhere")[0], 0, (0.5, 0.6))
    folder = TrialFolder(storage / name)
    shutil.copytree(trial.path, folder.path)
    write_json(folder.steps_file, {"loss": [1.0 / step for step in range(1, 21)]})
    return folder


def test_run_that_stands_alone_is_one_run_with_series_and_artefacts(
    tmp_path: Path, uri: str
) -> None:
    folder = make_run(tmp_path)
    tracker = RunTracker(uri, folder)
    tracker.mirror()
    run = read_runs(tracker)["mine"]
    assert (run["id"], run["status"]) == (tracker.run_id, "RUNNING")
    assert run["params"]["system"] == "blocks(2)"
    assert run["tags"]["e2lora.run"] == str(folder.path)
    assert not {"mlflow.parentRunId", "e2lora.trial"} & set(run["tags"])
    assert [p[:2] for p in run["points"]["validation/accuracy"]] == [(10, 0.5), (20, 0.6)]
    assert [p[:2] for p in run["points"]["train/loss"]] == [(s, 1.0 / s) for s in range(1, 21)]

    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    write_json(folder.result_file, TrialResult(number=0, **COMPLETE))
    RunTracker(uri, folder).finish()  # another process goes on in the same run
    runs = read_runs(tracker)
    assert list(runs) == ["mine"]
    assert (runs["mine"]["id"], runs["mine"]["status"]) == (run["id"], "FINISHED")
    assert runs["mine"]["artifacts"] == ["adapter", "plan.json", "trial.json"]
    assert runs["mine"]["points"]["train/loss"] == run["points"]["train/loss"], "none twice"
    assert tracker.run_id in tracker.describe()


def test_child_of_a_study_has_the_series_that_are_worth_a_column(tmp_path: Path, uri: str) -> None:
    folder, record = make_study(tmp_path)
    trial = write_trial(folder, 0, (0.5,))
    series = {"loss": [2.0, 1.0], "seconds": [0.1, 0.1]}
    write_json(trial.steps_file, series)
    tracker = Tracker(uri, folder, record)
    tracker.mirror_trial(trial)
    points = read_runs(tracker)["00000 blocks(2) r=4"]["points"]
    assert [p[:2] for p in points["train/loss"]] == [(1, 2.0), (2, 1.0)]
    assert "train/seconds" not in points


def test_run_that_was_left_is_closed_and_goes_on(tmp_path: Path, uri: str) -> None:
    tracker = RunTracker(uri, make_run(tmp_path))
    tracker.mirror()
    tracker.finish()
    assert read_runs(tracker)["mine"]["status"] == "KILLED"
    tracker.mirror()
    assert read_runs(tracker)["mine"]["status"] == "RUNNING"


def test_store_that_fails_does_not_stop_a_run(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, elsewhere = tmp_path / "store", tmp_path / "moved"
    place.mkdir()
    shutil.copy(empty_store, place)
    folder = make_run(tmp_path)
    tracker = RunTracker(f"sqlite:///{place}/mlflow.db", folder)
    place.rename(elsewhere)
    tracker.mirror()
    tracker.mirror()
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"The run goes on; metrics stand in {folder.path}" in warning
    elsewhere.rename(place)
    tracker.finish()
    assert read_runs(tracker)["mine"]["metrics"]["validation/accuracy"] == 0.6


def test_long_series_is_thinned_to_the_same_steps_while_it_grows(tmp_path: Path, uri: str) -> None:
    values = [float(step) for step in range(1, 10_001)]
    whole = thinned(values, num_steps=10_000)
    assert len(whole) == 200
    assert whole[-1] == (10_000, 10_000.0)
    assert set(thinned(values[:3_000], num_steps=10_000)) < set(whole)
    seen = {point for end in range(100, 10_001, 100) for point in thinned(values[:end])}
    assert len(seen) < 900, "of epochs: half of them more with every doubling"
    assert thinned([1.0, float("inf"), float("nan"), 2.0]) == [(1, 1.0), (4, 2.0)]

    folder = make_run(tmp_path)  # more than MLflow takes at once
    series = {f"metric_{k}": values[:200] for k in range(7)}
    write_json(folder.steps_file, series)
    tracker = RunTracker(uri, folder)
    tracker.mirror()
    points = read_runs(tracker)["mine"]["points"]
    for k in range(7):
        assert [point[1] for point in points[f"train/metric_{k}"]] == values[:200]


def test_importing_the_room_does_not_import_mlflow() -> None:
    code = "import sys, e2lora.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
