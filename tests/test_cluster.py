"""Checks of a cluster of two nodes, on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from e2lora import cluster as checks
from e2lora.checkup import require_sound_cluster
from e2lora.checkup.node import NodeFacts, facts_here, notes_missing
from e2lora.config import GroupSpec
from tests.small import small_trial


@pytest.fixture(scope="module", autouse=True)
def two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=3)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def test_groups_are_counted_by_what_each_node_can_hold() -> None:
    spec = GroupSpec.of(small_trial(num_workers=2).training)
    assert checks.slots(spec) == 2
    assert checks.slots(spec.model_copy(update={"cpus_per_worker": 2})) == 0, "1 + 3 CPUs"
    assert checks.slots(spec.model_copy(update={"cpus_per_worker": 2, "num_workers": 1})) == 1


def test_what_is_wanted_waits_as_placement_groups_and_is_taken_back() -> None:
    one = GroupSpec.of(small_trial().training)
    wide = one.model_copy(update={"cpus_per_worker": 8, "num_workers": 2})

    def states() -> list[tuple[str, int]]:
        there = ray.util.placement_group_table().values()
        told = [(group["state"], len(group["bundles"])) for group in there]
        return [each for each in told if each[0] != "REMOVED"]

    wanted = checks.Wanted()
    wanted.update({wide: 2})
    wanted.update({wide: 2})
    assert states() == [("PENDING", 2)] * 2, "each once, however often it is said"
    wanted.update({wide: 1})
    assert states() == [("PENDING", 2)]
    wanted.update({})
    assert states() == []


def test_what_is_wanted_gives_room_back_that_it_finds_and_leaves_it_to_others() -> None:
    """Room that the arithmetic says isn't there: a group that is coming up has not taken it yet."""
    one = GroupSpec.of(small_trial().training)
    wanted = checks.Wanted(quiet_seconds=5)
    wanted.update({one: 4})  # all CPUs of the cluster
    assert all(group.wait(30) for _, group in wanted._waiting)
    coming = ray.util.placement_group([{"CPU": 1}] * 4)
    assert not coming.wait(1), "it has to wait for them"
    until = time.monotonic() + 4
    while time.monotonic() < until:
        wanted.update({one: 4})
        time.sleep(0.05)
    assert coming.wait(10)
    time.sleep(1.5)
    wanted.update({one: 4})
    assert len(wanted._waiting) == 4, "after a while it is said again"
    wanted.update({})
    ray.util.remove_placement_group(coming)


def test_every_node_is_asked_and_has_a_name_of_its_own() -> None:
    heard = checks.on_every_node(_twice, 21)
    assert [one.answer for one in heard] == [42, 42]
    assert len({one.address for one in heard}) == 2
    assert [(one.cpus, one.is_head) for one in sorted(heard, key=lambda one: one.cpus)] == [
        (1, True),
        (3, False),
    ]


def test_node_that_fails_or_is_silent_is_told_with_the_reason() -> None:
    heard = checks.on_every_node(_fails)
    assert [one.answer for one in heard] == [None, None]
    assert all("no such thing" in (one.error or "") for one in heard)
    heard = checks.on_every_node(_sleeps, seconds=0.5)
    assert {one.error for one in heard} == {"no answer within 0 s"}


def test_storage_that_all_nodes_see_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    storage = tmp_path / "new" / "storage"
    require_sound_cluster(storage, [GroupSpec.of(small_trial().training)])
    assert list(storage.iterdir()) == []


def test_storage_that_a_node_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is another on each node stands for one on a disk they don't share."""
    monkeypatch.setattr("e2lora.checkup.facts_here", _facts_in_a_folder_of_its_own)
    monkeypatch.setattr("e2lora.checkup.notes_missing", _looks_without_patience)
    with pytest.raises(ValueError, match=r"all must share the storage path.*Give --storage"):
        require_sound_cluster(tmp_path, [])


def test_storage_that_a_node_cannot_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e2lora.checkup.facts_here", _facts_of_a_folder_that_is_not_there)
    monkeypatch.setattr("e2lora.checkup.notes_missing", _looks_without_patience)
    with pytest.raises(ValueError, match=r"must be able to write to .*FileNotFoundError.*Mount it"):
        require_sound_cluster(tmp_path, [])


def _twice(number: int) -> int:
    return 2 * number


def _sleeps() -> None:
    time.sleep(60)


def _fails() -> None:
    raise ValueError("no such thing")


def _facts_in_a_folder_of_its_own(storage: str, look_at_gpus: bool) -> NodeFacts:
    return facts_here(tempfile.mkdtemp(), look_at_gpus)


def _looks_without_patience(storage: str, notes: list[str]) -> list[str]:
    return notes_missing(storage, notes, patience=0.0)


def _facts_of_a_folder_that_is_not_there(storage: str, look_at_gpus: bool) -> NodeFacts:
    return facts_here(f"{storage}/nowhere", look_at_gpus)
