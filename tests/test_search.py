"""Whole studies, run as a user runs them: ``python jobs/search.py`` in processes of its own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from e2lora.adapters import FAMILIES, count_parameters
from e2lora.adapters.storage import load_adapter
from e2lora.evaluate import score_rows
from e2lora.models import load_base
from e2lora.records import StudyFolder, TrialFolder
from e2lora.sections import read_study
from e2lora.tasks import TrialData, load_task
from e2lora.tasks.scores import outcomes_of

ROOT = Path(__file__).resolve().parents[1]
NAME = "small"


class Command:
    """``jobs/search.py`` with a test's space, in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, space: str = "tests.small") -> None:
        self.folder = StudyFolder(folder / "results", NAME)
        self.log = folder / "log.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.process = subprocess.Popen(
            [
                sys.executable,
                ROOT / "jobs" / "search.py",
                "--space",
                space,
                "--study",
                NAME,
                *arguments,
            ],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout: float = 300) -> int:
        return self.process.wait(timeout)

    def wait_until(self, happened: Callable[[], Any], timeout: float = 200) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := happened()):
            assert self.process.poll() is None, f"it ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"it took too long:\n{self.log.read_text()}"
            time.sleep(0.1)
        return found

    def num_ended(self) -> int:
        return sum(trial.result_file.exists() for trial in self.folder.trial_folders())

    def training_workers(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(process.cmdline())
        ]


def ledger(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    return optuna.load_study(study_name=folder.name, storage=storage).get_trials()


def mirrored(folder: Path) -> tuple[list[Any], list[Any]]:
    """Parent and child runs in the study's MLflow database."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "e2lora"]
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


def numbers_of(trial: TrialFolder) -> tuple[Any, ...]:
    """All that a trial's configuration decides."""
    result = trial.result()
    assert result is not None
    losses = trial.steps()["loss"]
    return losses, trial.evaluations(), trial.outcomes(), result.metrics


def require_whole(
    folder: Path, study: StudyFolder, num_trials: int, steps: Sequence[int] = (3, 6)
) -> None:
    """No trial is missing or there twice: in the ledger, on disk, in Ray's folder, in MLflow."""
    finished = ledger(study)
    assert [trial.number for trial in finished] == list(range(num_trials))
    assert {trial.state for trial in finished} == {optuna.trial.TrialState.COMPLETE}
    trials = study.trial_folders()
    assert [trial.number for trial in trials] == list(range(num_trials))
    in_ray = sorted(path.name for path in (study.path / "tune").glob("trial-*"))
    assert in_ray == [f"trial-{number:05d}" for number in range(num_trials)]
    parents, children = mirrored(folder)
    assert len(parents) == 1
    assert len(children) == num_trials
    for trial in trials:
        result = trial.result()
        assert result is not None
        assert [e.step for e in trial.evaluations()] == list(steps)
        assert finished[trial.number].values == [
            result.metrics["accuracy"],
            result.adapter_parameters,
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of four trials that ran to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = Command(folder)
    assert command.wait() == 0, command.log.read_text()
    return folder


@pytest.mark.slow
def test_study_runs_to_its_end_and_stands_the_same_everywhere(undisturbed: Path) -> None:
    study = StudyFolder(undisturbed / "results", NAME)
    require_whole(undisturbed, study, num_trials=4)
    assert len(list(study.profiles.glob("*.json"))) == 1, "one profile serves every E² trial"
    for name in ("report.html", "pareto.png"):
        assert (study.report / name).stat().st_size > 1000
    _, children = mirrored(undisturbed)
    for child in children:
        assert {"accuracy", "adapter_parameters"} <= set(child.data.metrics)
        assert {"topology", "model", "task", "seed", "plan_fingerprint"} <= set(child.data.tags)
    log = (undisturbed / "log.txt").read_text()
    for said in (
        "4 of 4 trials complete",
        "report.html",
        "mlflow ui",
        "2 worker group(s)",
        "trial   3",
    ):
        assert said in log


@pytest.mark.slow
def test_same_command_again_runs_nothing_and_more_trials_extend(undisturbed: Path) -> None:
    study = StudyFolder(undisturbed / "results", NAME)
    before = {t.number: t.result_file.read_text() for t in study.trial_folders()}
    command = Command(undisturbed, "--trials", "5")
    assert command.wait() == 0, command.log.read_text()
    after = {t.number: t.result_file.read_text() for t in study.trial_folders()}
    assert {number: after[number] for number in before} == before
    require_whole(undisturbed, study, num_trials=5)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2], ids=["alone", "one-of-two"])
def test_killed_worker_costs_an_attempt_and_changes_no_number(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2LORA_TEST_WORKERS", str(num_workers))
    command = Command(tmp_path, space="tests.longer")
    first = command.folder.trial(0)
    command.wait_until(lambda: len(first.evaluations()) >= 2)  # past a checkpoint, before the end
    command.training_workers()[0].kill()
    assert command.wait() == 0, command.log.read_text()
    assert "ETA" in command.log.read_text()
    require_whole(tmp_path, command.folder, num_trials=3, steps=[10, 20, 30, 40, 50, 60])
    trials = command.folder.trial_folders()
    results = [trial.result() for trial in trials]
    assert sorted(result.attempts for result in results if result) == [1, 1, 2]
    assert numbers_of(trials[0]) == numbers_of(trials[1]) == numbers_of(trials[2])


@pytest.mark.slow
def test_interrupted_and_killed_studies_go_on_with_the_same_command(
    undisturbed: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path)
    command.wait_until(lambda: command.num_ended() >= 1)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.log.read_text()
    kept = command.num_ended()
    assert kept >= 1

    command = Command(tmp_path)
    command.wait_until(lambda: command.num_ended() > kept)
    command.process.kill()
    command.wait()

    command = Command(tmp_path)
    assert command.wait() == 0, command.log.read_text()
    require_whole(tmp_path, command.folder, num_trials=4)
    reference = StudyFolder(undisturbed / "results", NAME)
    for number in range(3):
        assert numbers_of(command.folder.trial(number)) == numbers_of(reference.trial(number))


@pytest.mark.slow
def test_driver_killed_three_times_leaves_twenty_trials_that_went_on_where_they_were(
    tmp_path: Path,
) -> None:
    moments = random.Random(os.environ.get("PYTEST_SEED", "0"))
    begun: dict[int, list[float]] = {}  # trial → seconds of the steps that it had made when killed
    for share in (0.2, 0.5, 0.8):
        command = Command(tmp_path, space="tests.twenty")
        until = round(20 * share) + moments.randint(-2, 2)
        command.wait_until(lambda c=command, n=until: c.num_ended() >= n, timeout=400)
        time.sleep(moments.uniform(0.0, 3.0))
        open_trials = [t for t in command.folder.trial_folders() if t.result() is None]
        command.process.kill()
        command.wait()
        begun |= {t.number: t.steps()["seconds"] for t in open_trials if t.steps()}
    command = Command(tmp_path, space="tests.twenty")
    assert command.wait(400) == 0, command.log.read_text()
    require_whole(tmp_path, command.folder, num_trials=20, steps=(6, 12, 18, 24))
    assert begun, "no trial had come to a checkpoint: the moments prove nothing"
    for number, seconds in begun.items():
        after = command.folder.trial(number).steps()["seconds"]
        assert after[: len(seconds)] == seconds, "its first steps were made once"
    origins = [trial.suggestion().origin for trial in command.folder.trial_folders()]
    assert origins == ["quota"] * 9 + ["point"] + ["sampler"] * 10


@pytest.mark.slow
def test_chosen_trials_run_again_over_seeds_and_are_tagged_so(tmp_path: Path) -> None:
    """Interrupted in the second stage, it goes on there."""
    command = Command(tmp_path, "--trials", "9", "--seeds", "2", space="tests.twenty")
    runs = command.folder.seeds
    command.wait_until(
        lambda: any(t.result_file.exists() for t in runs.trial_folders()), timeout=400
    )
    command.process.kill()
    command.wait()
    command = Command(
        tmp_path, "--trials", "9", "--seeds", "2", "--register", "winner", space="tests.twenty"
    )
    assert command.wait(400) == 0, command.log.read_text()
    (section,) = read_study(command.folder).sections
    chosen = {cell.chosen.number for cell in section.cells if cell.chosen}
    assert len(chosen) == 3
    trials = runs.trial_folders()
    assert {t.suggestion().chosen for t in trials} == chosen | set(section.front)
    for number in chosen:
        mine = [t for t in trials if t.suggestion().chosen == number]
        assert sorted(t.config().seed for t in mine) == [1, 2], "not the seed it was chosen at"
        (system,) = {t.config().system for t in mine}
        assert system == command.folder.trial(number).config().system
    profiles = {t.plan().profile_fingerprint for t in trials if t.config().plan.needs_profile}
    assert len(profiles) == 2, "each seed has its own gradients"
    assert all(len(cell.runs) == 2 for cell in section.cells)
    _, children = mirrored(tmp_path)
    stages = Counter(child.data.tags["e2lora.stage"] for child in children)
    assert stages == {"search": 9, "seeds": len(trials)}
    log = command.log.read_text()
    assert "registered   models:/winner/1" in log
    assert "utilisation" in log


@pytest.mark.slow
def test_dry_run_tells_cells_and_hours_and_leaves_no_study(tmp_path: Path) -> None:
    command = Command(tmp_path, "--dry-run", "--seeds", "5", space="tests.twenty")
    assert command.wait(400) == 0, command.log.read_text()
    log = command.log.read_text()
    assert "35 trials, 10 of them the sampler's" in log  # 3 cells x (3 + 5), a point, 10 more
    assert "18,432" in log
    assert "worker-hours" in log
    assert not list(command.folder.path.parent.iterdir()), "nothing is left"


@pytest.mark.long
def test_isolated_trials_give_the_same_numbers(undisturbed: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, "--isolated", "--trials", "3")
    assert command.wait() == 0, command.log.read_text()
    reference = StudyFolder(undisturbed / "results", NAME)
    for number in range(3):
        assert numbers_of(command.folder.trial(number)) == numbers_of(reference.trial(number))


@pytest.mark.long
def test_study_over_every_family_completes_and_each_trial_can_be_loaded(tmp_path: Path) -> None:
    """Families that change base weights among them: the next trial gets the base as it was."""
    command = Command(tmp_path, space="tests.every_family")
    assert command.wait(600) == 0, command.log.read_text()
    require_whole(tmp_path, command.folder, len(FAMILIES))
    for trial in command.folder.trial_folders():
        config, result = trial.config(), trial.result()
        assert result is not None
        task = load_task(config.task)
        base = load_base(config.model, task.auto_class, task.num_labels, torch.float32)
        loaded = load_adapter(base.model, trial.adapter)
        assert count_parameters(loaded) == (result.adapter_parameters, result.head_parameters)
        data = TrialData.of(task, base.processor)
        scores = score_rows(loaded, data, "validation", base.processor, 64)
        assert outcomes_of(scores) == trial.outcomes(), config.system


@pytest.fixture
def ray_head() -> Iterator[dict[str, str]]:
    """A running Ray of one CPU, as an environment for commands; ended afterwards."""
    ports = free_ports(3)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {
        "RAY_ADDRESS": f"127.0.0.1:{ports[0]}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}",
        "RAY_AUTH_MODE": "disabled",  # a token of the user's, if any, isn't this cluster's
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = subprocess.Popen(
        [
            *ray,
            *("start", "--head", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"),
            *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}"),
            f"--dashboard-agent-listen-port={ports[2]}",
        ],
        env={k: v for k, v in environment.items() if not k.endswith("_ADDRESS")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not answers(ports[1]):
            assert head.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield environment
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_submitted_study_on_a_cluster_whose_only_cpu_is_held_gives_the_same_numbers(
    undisturbed: Path, tmp_path: Path, ray_head: dict[str, str]
) -> None:
    job = tmp_path / "job"  # tests aren't shipped: their space travels as a user's own would
    for room in ("e2lora", "jobs", "search_spaces"):
        shutil.copytree(ROOT / room, job / room)
    shutil.copy(ROOT / "tests" / "small.py", job / "my_space.py")
    submitted = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit"),
            *("--working-dir", str(job), "--"),
            *(sys.executable, "jobs/search.py", "--space", "my_space", "--study", NAME),
            *("--storage", str(tmp_path), "--trials", "3"),
        ],
        cwd=tmp_path,
        env=ray_head,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "1 worker group(s)" in submitted.stdout
    study, reference = StudyFolder(tmp_path, NAME), StudyFolder(undisturbed / "results", NAME)
    for number in range(3):
        assert numbers_of(study.trial(number)) == numbers_of(reference.trial(number))
    assert (tmp_path / "mlflow.db").exists(), "the job's own folder is thrown away"
