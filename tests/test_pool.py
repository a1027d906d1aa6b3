"""Resident worker groups on a Ray of two CPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file

from e2lora.broker import Job
from e2lora.cluster import slots
from e2lora.config import GroupSpec
from e2lora.pool import JobFailed, Pool, trainer_class
from e2lora.preflight import Plans
from e2lora.records import TrialFolder
from tests.small import small_trial

ONE = GroupSpec.of(small_trial().training)
TWO = GroupSpec.of(small_trial(num_workers=2).training)


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def trial_job(folder: Path, number: int, **training: object) -> Job:
    """A trial's job, its configuration and plan written where the group looks for them."""
    from e2lora.plan import build_plan
    from e2lora.records import write_json

    config = small_trial(**training)
    place = TrialFolder(folder / f"{number:05d}")
    plans = Plans(folder / "profiles")
    write_json(place.plan_file, build_plan(plans.targets(config), config.plan))
    write_json(place.config_file, config)
    spec = GroupSpec.of(config.training)
    payload = {"config": config.model_dump_json(), "folder": str(place.path)}
    return Job(f"trial-{number:05d}", "trial", spec, payload)


def test_number_of_groups_follows_from_the_cluster() -> None:
    assert slots(ONE) == 2
    assert slots(TWO) == 1
    assert slots(ONE.model_copy(update={"cpus_per_worker": 2})) == 1
    assert slots(ONE.model_copy(update={"gpus_per_worker": 0.5})) == 0
    assert slots(ONE.model_copy(update={"num_workers": 8, "min_workers": 2})) == 1


def test_no_group_is_taken_away_by_what_asks_another_ray_for_its_controller() -> None:
    def names(trainer: type) -> set[str]:
        return {type(callback).__name__ for callback in trainer(print)._create_default_callbacks()}

    from ray.train.torch import TorchTrainer

    assert names(TorchTrainer) - names(trainer_class()) == {"PlacementGroupCleanerCallback"}


def test_group_that_does_not_come_up_though_there_is_room_is_an_error_and_not_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "_fit", lambda self, name, spec: time.sleep(5))
    job = Job("trial-00000", "trial", ONE, {"folder": str(tmp_path / "00000")})
    with (
        Pool("dead", tmp_path, start_seconds=2) as pool,
        pytest.raises(RuntimeError, match=r"must come up within 2 s.*though there is room"),
    ):
        pool.run(job)


def test_what_others_hold_is_waited_for_told_and_no_longer_asked_for_in_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    @ray.remote(num_cpus=2)
    class Squatter:
        def here(self) -> bool:
            return True

    squatter = Squatter.remote()
    assert ray.get(squatter.here.remote())
    job = Job("trial-00000", "trial", ONE, {"folder": str(tmp_path / "00000")})
    with Pool("held", tmp_path, start_seconds=1) as pool, ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(pool.run, job)
        time.sleep(6)
        assert not waiting.done()
        assert pool.error is None
        assert ray.get(pool.broker.stop.remote(job.key))
        assert waiting.result(60) == {}
    assert "other studies or jobs hold" in capfd.readouterr().err
    for group in pool._groups.values():  # it waits no longer for what it didn't get
        group.thread.join(120)
        assert not group.thread.is_alive()
    ray.kill(squatter)
    require_all_free(2)


def require_all_free(num_cpus: int, timeout: float = 20) -> None:
    """What a pool held or had asked for is given back."""
    deadline = time.monotonic() + timeout
    while True:
        states = {group["state"] for group in ray.util.placement_group_table().values()}
        free = ray.available_resources().get("CPU", 0)
        if states <= {"REMOVED"} and free == num_cpus:
            return
        assert time.monotonic() < deadline, (states, free)
        time.sleep(0.2)


def test_slots_are_those_of_the_kind_that_most_fit_of(tmp_path: Path) -> None:
    pool = Pool("slots", tmp_path)
    assert (pool.open_slots([ONE]), pool.open_slots([TWO]), pool.open_slots([TWO, ONE])) == (
        2,
        1,
        2,
    )
    assert pool.open_slots([]) == 0
    ray.kill(pool.broker)


def test_kind_that_there_are_no_nodes_for_is_told_of_and_in_the_end_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = TWO.model_copy(update={"num_workers": 3})
    job = Job("trial-00000", "trial", three, {"folder": str(tmp_path / "00000")})
    began = time.monotonic()
    with (
        Pool("lacking", tmp_path, node_seconds=1) as pool,
        pytest.raises(RuntimeError, match=r"asks for 3 worker.*for 1 s its nodes have not had"),
    ):
        pool.run(job)
    assert time.monotonic() - began < 30
    assert "waiting for nodes: one asks for 3 worker(s) of 1 CPU" in capsys.readouterr().err
    assert pool._groups == {}
    require_all_free(2)


@pytest.mark.long
def test_kinds_follow_one_another_and_a_failed_job_leaves_its_group_usable(
    tmp_path: Path,
) -> None:
    """One worker, then two on the same CPUs; two workers give the numbers of one."""
    good = trial_job(tmp_path, 0)
    lacking = {**good.payload, "folder": str(tmp_path / "absent" / "00009")}
    jobs = [
        good,
        Job("trial-00009", "trial", ONE, lacking),
        trial_job(tmp_path, 1),
        trial_job(tmp_path, 2, num_workers=2, zero_stage=2),
    ]
    ended: dict[str, Any] = {}
    with Pool("kinds", tmp_path / "ray") as pool:

        def run(job: Job) -> None:
            try:
                ended[job.key] = pool.run(job)
            except JobFailed as error:
                ended[job.key] = str(error)

        threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(240)
    require_all_free(2)
    one, failed, again, two = (ended[job.key] for job in jobs)
    assert isinstance(failed, str)
    assert "plan.json" in failed
    losses = [_losses(tmp_path, number) for number in range(3)]
    assert len(losses[0]) == small_trial().training.num_steps
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], abs=2e-5)
    assert again["metrics"] == one["metrics"]
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]


def _losses(storage: Path, number: int) -> list[float]:
    (newest,) = (storage / f"{number:05d}" / "checkpoints").glob("step-*/state.safetensors")
    return load_file(newest)["history/loss"].tolist()
