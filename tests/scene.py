"""A cluster of three nodes, a tracking server and a storage; and what must hold after a study."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import torch
from mlflow.tracking import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from e2lora.adapters import count_parameters
from e2lora.adapters.storage import load_adapter
from e2lora.models import load_base
from e2lora.records import StudyFolder
from e2lora.tasks import load_task
from tests.chaos_space import KINDS
from tests.several_nodes import (
    ROOT,
    OwnNetwork,
    SeveralNodes,
    end,
    free_port,
    job_folder,
    processes_with,
    wait_until,
)

NAME = "chaos"


@dataclass
class Scene:
    """A cluster, a tracking server and a storage, with a study that can be submitted to it."""

    folder: Path
    storage: Path
    network: OwnNetwork | None = None
    tracking_port: int = field(default_factory=free_port)
    submissions: int = 0
    cluster: SeveralNodes = field(init=False)
    tracking: subprocess.Popen[Any] = field(init=False)
    running: subprocess.Popen[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.moments = self.folder / "moments"
        self.moments.mkdir()
        self.job = job_folder(self.folder / "job", ROOT / "tests" / "chaos_space.py")
        self.start_tracking()
        wait_until(self._tracking_answers, 90, "the tracking server answers")
        self.start_cluster()

    def start_cluster(self) -> None:
        """Of three nodes, one of them without CPUs; or of two."""
        self.cluster = SeveralNodes(
            self.folder,
            {
                "MLFLOW_TRACKING_URI": self.tracking_uri,
                "E2LORA_MOMENTS": str(self.moments),
                "E2LORA_STORAGE_PATIENCE_S": "3",
                "PYTHONPATH": f"{ROOT / 'tests' / 'moments'}",
                "OMP_NUM_THREADS": "1",
            },
            address=OwnNetwork.HERE if self.network else "127.0.0.1",
        )
        if self.network:
            self.cluster.add(OwnNetwork.THERE, self.network.there, num_cpus=2)
        else:
            self.cluster.add("127.0.0.2")
            self.cluster.add("127.0.0.3")

    @property
    def tracking_uri(self) -> str:
        return f"http://127.0.0.1:{self.tracking_port}"

    def study(self, name: str = NAME) -> StudyFolder:
        return StudyFolder(self.storage, name)

    def _tracking_answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.tracking_port)) == 0

    def start_tracking(self) -> None:
        self.tracking = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--port", str(self.tracking_port)),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"),
                *("--artifacts-destination", str(self.folder / "artefacts")),
            ],
            stdout=(self.folder / "mlflow.txt").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def submit(self, study: str = NAME) -> None:
        self.submissions += 1
        self.running = self.cluster.submit(
            self.job,
            *("jobs/search.py", "--space", "my_space", "--study", study),
            *("--storage", str(self.storage)),
            name=f"chaos-{self.submissions}",
        )

    def said(self) -> str:
        files = sorted(self.folder.glob("chaos-*.txt"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def close(self) -> None:
        self.cluster.__exit__()
        end(self.tracking)


# ---- what must hold afterwards ----------------------------------------------------------------


def numbers_of(study: StudyFolder) -> list[Any]:
    """All that the configurations decide, of every trial."""
    numbers = []
    for trial in study.trial_folders():
        result = trial.result()
        assert result is not None
        assert result.state == "complete", result.error
        numbers.append(
            (trial.steps()["loss"], trial.evaluations(), trial.outcomes(), result.metrics)
        )
    return numbers


def require_everywhere_once(scene: Scene, name: str = NAME) -> None:
    """Each trial is once in the ledger, on disk, in Ray's folder, in MLflow."""
    study, count = scene.study(name), len(KINDS)
    storage = JournalStorage(JournalFileBackend(str(study.journal)))
    ledger = optuna.load_study(study_name=name, storage=storage).get_trials()
    assert [trial.number for trial in ledger] == list(range(count))
    assert {trial.state for trial in ledger} == {optuna.trial.TrialState.COMPLETE}
    assert [trial.number for trial in study.trial_folders()] == list(range(count))
    in_ray = sorted(path.name for path in (study.path / "tune").glob("trial-*"))
    assert in_ray == [f"trial-{number:05d}" for number in range(count)]
    client = MlflowClient(scene.tracking_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "e2lora"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("e2lora.study") == str(study.path)]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    shown = {int(run.data.tags["e2lora.trial"]): run for run in children}
    assert sorted(shown) == list(range(count))
    assert len(children) == count
    for trial in ledger:
        result = study.trial(trial.number).result()
        assert result is not None
        assert trial.values == [result.metrics["accuracy"], result.adapter_parameters]
        run = shown[trial.number]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["accuracy"] == result.metrics["accuracy"]


def require_shared_as_planned(study: StudyFolder) -> None:
    """What was saved is one tensor for each group when it is loaded again."""
    for trial in study.trial_folders():
        config, result = trial.config(), trial.result()
        assert result is not None
        task = load_task(config.task)
        base = load_base(config.model, task.auto_class, task.num_labels, torch.float32)
        loaded = load_adapter(base.model, trial.adapter)
        assert count_parameters(loaded) == (result.adapter_parameters, result.head_parameters)


LEFT = """
import json, ray
from ray.util.placement_group import placement_group_table
ray.init(log_to_driver=False)
held = [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
print(json.dumps([held, ray.available_resources().get("CPU"), ray.cluster_resources().get("CPU")]))
"""


def require_nothing_left(scene: Scene) -> None:
    """Placement groups and CPUs are free, and no training worker lives."""

    def left() -> list[Any]:
        asked = subprocess.run(
            [sys.executable, "-c", LEFT],
            env=scene.cluster.client_environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        return json.loads(asked.stdout.splitlines()[-1])

    deadline = time.monotonic() + 120
    while True:
        groups, free, there = left()
        workers = [p for p in processes_with("RayTrainWorker") if _is_below(p, scene)]
        if not groups and free == there == 2.0 and not workers:
            return
        assert time.monotonic() < deadline, (groups, free, there, workers)
        time.sleep(1)


def _is_below(process: psutil.Process, scene: Scene) -> bool:
    try:
        return any(p.pid in _pids_of(scene) for p in process.parents())
    except psutil.Error:
        return False


def _pids_of(scene: Scene) -> set[int]:
    return {scene.cluster.head.pid, *(node.pid for node in scene.cluster.nodes.values())}
