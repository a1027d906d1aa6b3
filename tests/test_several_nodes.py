"""Studies on a cluster of three nodes: a head that trains nothing, and two nodes of one CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.scene import (
    Scene,
    numbers_of,
    require_everywhere_once,
    require_nothing_left,
    require_shared_as_planned,
)
from tests.several_nodes import wait_until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    made = Scene(folder, folder / "storage")
    yield made
    made.close()


def workers_of(scene: Scene) -> dict[str, int]:
    """Node → training workers there."""
    counts = {}
    for address, node in scene.cluster.nodes.items():
        below = psutil.Process(node.pid).children(recursive=True)
        counts[address] = sum("RayTrainWorker" in " ".join(_command(p)) for p in below)
    return counts


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def alone(scene: Scene) -> list[Any]:
    """The numbers of a study that had the cluster for itself; its trials ran on both nodes."""
    scene.submit()
    wait_until(lambda: all(workers_of(scene).values()), 200, "workers on both nodes")
    head = psutil.Process(scene.cluster.head.pid).children(recursive=True)
    on_head = [p for p in head if "RayTrainWorker" in " ".join(_command(p))]
    assert not on_head, "the head trains nothing"
    assert scene.running.wait(400) == 0, scene.said()
    return numbers_of(scene.study())


def test_submitted_study_spreads_over_nodes_and_a_trial_spans_two_by_zero_3(
    scene: Scene, alone: list[Any]
) -> None:
    """Nodes of one CPU: a trial of two workers can only stand on both."""
    wide = [trial.config().training for trial in scene.study().trial_folders()]
    assert [(t.num_workers, t.zero_stage) for t in wide].count((2, 3)) == 1
    require_everywhere_once(scene)
    require_shared_as_planned(scene.study())
    require_nothing_left(scene)


def test_two_studies_at_once_give_the_numbers_of_one_alone(scene: Scene, alone: list[Any]) -> None:
    scene.submit("first")
    first = scene.running
    scene.submit("second")
    assert [first.wait(600), scene.running.wait(600)] == [0, 0], scene.said()
    for name in ("first", "second"):
        assert numbers_of(scene.study(name)) == alone
        require_everywhere_once(scene, name)
    require_nothing_left(scene)
