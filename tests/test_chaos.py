"""Whatever is killed, and whenever: the same command goes on, and every number is the same.

A study on three nodes is submitted as a user submits it. At a moment in the life of a trial
(a worker waits there, see `tests/moments`) something is killed, filled or cut off; what an operator
would bring back is brought back, and the command is given again until it ends well. Then the study
must be that of an undisturbed run, and nothing may be left on the cluster.

`E2LORA_CHAOS_TABLE=FILE` keeps the table that is printed at the end, case by case.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from e2lora.text_table import text_table
from tests.chaos_space import KINDS
from tests.conftest import needs_root
from tests.scene import (
    Scene,
    numbers_of,
    require_everywhere_once,
    require_nothing_left,
    require_shared_as_planned,
)
from tests.several_nodes import (
    OwnNetwork,
    end,
    kill_9,
    processes_with,
    wait_until,
)

pytestmark = pytest.mark.chaos

MOMENTS = ("profiling", "step", "checkpoint", "evaluation")
SEED = int(os.environ.get("E2LORA_CHAOS_SEED", "0"))
MOST_SUBMISSIONS = 4


# ---- what is killed ---------------------------------------------------------------------------


def kill_worker(scene: Scene, worker: psutil.Process) -> None:
    kill_9(worker)


def kill_node(scene: Scene, worker: psutil.Process) -> None:
    """The raylet, and with it all that runs on its node; another node comes."""
    raylet = worker.parent()
    assert raylet is not None
    assert "raylet" in raylet.name()
    (address,) = [a for a in scene.cluster.nodes if f"--node_ip_address={a}" in raylet.cmdline()]
    scene.cluster.kill(address)
    scene.cluster.add("127.0.0.4")


def kill_driver(scene: Scene, worker: psutil.Process) -> None:
    drivers = [p for p in processes_with("jobs/search.py") if _is_of(p, scene) and _is_python(p)]
    assert drivers
    for process in drivers:
        if process.is_running():
            kill_9(process)


def _is_of(process: psutil.Process, scene: Scene) -> bool:
    line = process.cmdline()
    return str(scene.storage) in line and "submit" not in line


def _is_python(process: psutil.Process) -> bool:
    return "python" in process.name()


def stop_job(scene: Scene, worker: psutil.Process) -> None:
    scene.cluster.command("job", "stop", f"chaos-{scene.submissions}")


def kill_head(scene: Scene, worker: psutil.Process) -> None:
    """The whole cluster goes; another one takes its place."""
    scene.cluster.__exit__()
    end(scene.running)
    scene.start_cluster()


def kill_tracking(scene: Scene, worker: psutil.Process) -> None:
    """It comes back after a while."""
    end(scene.tracking)
    (scene.moments / "go").touch()
    time.sleep(8)
    scene.start_tracking()


def fill_disk(scene: Scene, worker: psutil.Process) -> None:
    """Room is made once the job has ended for want of it."""
    filler = scene.storage / "filler"
    with filler.open("wb") as out:
        try:
            while True:
                out.write(b"0" * 65536)
                out.flush()
        except OSError:
            pass
    (scene.moments / "go").touch()
    scene.running.wait(240)
    assert scene.running.returncode != 0, scene.said()
    assert "No space left" in scene.said()
    filler.unlink()


def cut_node_off(scene: Scene, worker: psutil.Process) -> None:
    """Its processes run on, and write to the storage; another node comes."""
    assert scene.network is not None
    scene.network.cut()
    scene.cluster.add(OwnNetwork.BESIDE, scene.network.here, num_cpus=2)


VICTIMS: dict[str, Callable[[Scene, psutil.Process], None]] = {
    "train worker": kill_worker,
    "node": kill_node,
    "Tune driver": kill_driver,
    "submitted job": stop_job,
    "head and nodes": kill_head,
    "MLflow server": kill_tracking,
    "disk full": fill_disk,
    "node's network": cut_node_off,
}


def has_ended(scene: Scene) -> bool:
    ended = [trial.result_file.exists() for trial in scene.study().trial_folders()]
    return len(ended) == len(KINDS) and all(ended)


# ---- the suite --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The numbers of a study that nothing befell, on such a cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    scene = Scene(folder, folder / "storage")
    try:
        scene.submit()
        assert scene.running.wait(300) == 0, scene.said()
        require_everywhere_once(scene)
        return numbers_of(scene.study())
    finally:
        scene.close()


@pytest.fixture(scope="module")
def told() -> Iterator[list[list[str]]]:
    """Rows of the table of what was killed when, and what happened."""
    rows: list[list[str]] = []
    yield rows
    print(f"\n{table_of(rows)}", file=sys.__stdout__, flush=True)


def table_of(rows: list[list[str]]) -> str:
    header = ["killed", "at", "submitted", "attempts", "seconds", "outcome"]
    return text_table(header, rows, right=[2, 3, 4])


@pytest.fixture
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder; for a disk that fills up, a small file system of its own."""
    folder = tmp_path / "storage"
    folder.mkdir()
    small = request.node.callspec.params["victim"] == "disk full"
    if small:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)])
        if made.returncode:
            needs_root("a small file system", f"mount ended with {made.returncode}")
    yield folder
    if small:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[OwnNetwork | None]:
    """Of one node, for a cable that is cut."""
    if request.node.callspec.params["victim"] != "node's network":
        yield None
        return
    try:
        made = OwnNetwork()
    except (OSError, subprocess.CalledProcessError) as error:
        needs_root("a network namespace (with `ip`)", error)
    yield made
    made.close()


CASES = [(victim, moment) for victim in VICTIMS for moment in MOMENTS]


@pytest.mark.parametrize(("victim", "moment"), CASES)
def test_study_goes_on_after(
    victim: str,
    moment: str,
    undisturbed: list[Any],
    told: list[list[str]],
    storage: Path,
    network: OwnNetwork | None,
    tmp_path: Path,
) -> None:
    began = time.monotonic()
    row = [victim, moment, "", "", "", "FAILED"]
    told.append(row)
    scene = Scene(tmp_path, storage, network)
    try:
        (scene.moments / "wanted").write_text(moment)
        scene.submit()
        reached = scene.moments / "reached"
        wait_until(lambda: reached.exists() or scene.running.poll() is not None, 240, moment)
        assert reached.exists(), scene.said()
        time.sleep(random.Random(f"{SEED}{victim}{moment}").uniform(0, 1))
        VICTIMS[victim](scene, psutil.Process(int(reached.read_text())))
        (scene.moments / "go").touch()
        while scene.running.wait(400) != 0 or not has_ended(scene):  # a stopped job's code is 0
            assert scene.submissions < MOST_SUBMISSIONS, scene.said()
            scene.submit()
        assert numbers_of(scene.study()) == undisturbed, scene.said()
        require_everywhere_once(scene)
        require_shared_as_planned(scene.study())
        if network:
            network.mend()  # what is left of the node learns that it was given up
        require_nothing_left(scene)
        attempts = [trial.result() for trial in scene.study().trial_folders()]
        row[2] = str(scene.submissions)
        row[3] = " ".join(str(result.attempts) for result in attempts if result)
        row[5] = "same numbers"
    finally:
        row[4] = f"{time.monotonic() - began:.0f}"
        if file := os.environ.get("E2LORA_CHAOS_TABLE"):  # now: the suite itself may be cut off
            Path(file).write_text(f"{table_of(told)}\n")
        scene.close()
        shutil.rmtree(scene.job, ignore_errors=True)
