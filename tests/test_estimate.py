"""What a study will cost: the arithmetic, and against trials that were really run."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2lora.config import GroupSpec
from e2lora.search.estimate import (
    STEPS_BETWEEN,
    Estimate,
    Measured,
    Planned,
    Row,
    read,
    shortened,
)
from tests.small import small_trial

ONE = small_trial()
TWO = small_trial(num_workers=2)


def row(config: object, num_trials: int, seconds: float, memory: float = 1.0) -> Row:
    training = (ONE if config is ONE else TWO).training
    planned = Planned("LoRA", ONE if config is ONE else TWO, 768, num_trials)
    return Row(planned, 6, seconds, memory, GroupSpec.of(training))


def told(rows: list[Row], num_further: int, slots: tuple[int, int] = (2, 1)) -> Estimate:
    kinds = dict(zip((row.spec for row in rows), slots, strict=False))
    return Estimate(tuple(rows), num_further, kinds)


def test_worker_hours_count_every_worker_of_every_trial() -> None:
    estimate = told([row(ONE, 6, 600.0), row(TWO, 3, 1200.0, memory=2.5)], num_further=0)
    assert estimate.worker_hours == pytest.approx((6 * 600 + 3 * 1200 * 2) / 3600)
    assert estimate.memory_gib == 2.5
    assert estimate.num_trials == 9


def test_wall_time_is_that_of_the_slots_and_at_least_one_trial() -> None:
    estimate = told([row(ONE, 6, 600.0), row(TWO, 3, 1200.0)], num_further=0)
    assert estimate.wall_hours == pytest.approx((6 * 600 / 2 + 3 * 1200) / 3600)
    alone = told([row(ONE, 1, 600.0)], num_further=0, slots=(8, 0))
    assert alone.wall_hours == pytest.approx(600 / 3600)


def test_trials_of_the_sampler_cost_what_the_others_do_on_average() -> None:
    rows = [row(ONE, 3, 100.0), row(ONE, 1, 500.0)]
    assert told(rows, 4).worker_hours == pytest.approx(2 * told(rows, 0).worker_hours)
    assert told(rows, 4).num_trials == 8


def test_table_names_what_is_planned_and_the_sum() -> None:
    table = told([row(ONE, 6, 600.0)], num_further=2).table()
    assert "LoRA" in table
    assert "768" in table
    assert "8 trials, 2 of them the sampler's: 1.33 worker-hours; 0.67 hours on 2 group(s)" in table


def test_short_trial_has_two_evaluations_and_keeps_what_a_step_costs() -> None:
    long = small_trial(max_steps=500, eval_every=50, warmup_steps=100).training
    short = shortened(long)
    assert (short.num_steps, short.eval_every) == (2 * STEPS_BETWEEN, STEPS_BETWEEN)
    assert short.global_batch_size == long.global_batch_size
    epochs = small_trial(max_steps=None, num_epochs=2, warmup_steps=0).training
    assert shortened(epochs).num_steps == 2 * STEPS_BETWEEN


def test_evaluations_that_were_heard_of_at_once_are_taken_to_cost_half_of_the_rest() -> None:
    history = {"seconds": [1.0] * 8, "peak_memory_gib": [1.5] * 8}
    assert read(history, 20.0, {2: 5.0}) == Measured(1.0, 6.0, 0.0, 1.5)
    apart = read(history, 20.0, {1: 5.0, 2: 11.0})
    assert apart == Measured(1.0, 2.0, 8.0, 1.5)
    assert apart.seconds(8, 4) == 20.0, "of itself it says what it took"


@pytest.mark.long
def test_estimate_is_within_half_as_much_again_of_what_trials_take(tmp_path: Path) -> None:
    import ray

    from e2lora.broker import Job
    from e2lora.pool import Pool
    from e2lora.preflight import Plans
    from e2lora.records import TrialFolder, write_json
    from e2lora.search.estimate import estimate

    configs = [small_trial(seed=seed, max_steps=60, eval_every=30) for seed in range(2)]
    ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
    try:
        plans = Plans(tmp_path / "profiles")
        with Pool("estimate", tmp_path / "ray") as pool:
            planned = [Planned("LoRA", configs[0], 768, len(configs))]
            said = estimate(planned, 0, plans, pool, tmp_path)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["ray"], "nothing is left"
            seconds = 0.0
            for config in configs:
                folder = TrialFolder(tmp_path / str(config.seed))
                config, plan = plans.planned(config, pool)
                write_json(folder.plan_file, plan)
                payload = {"config": config.model_dump_json(), "folder": str(folder.path)}
                spec = GroupSpec.of(config.training)
                seconds += pool.run(Job(folder.path.name, "trial", spec, payload))["seconds"]
        used = pool.utilisation()
    finally:
        ray.shutdown()
    assert seconds / 1.5 < said.worker_hours * 3600 < seconds * 1.5
    assert 0.5 * seconds < used.spent["steps"] + used.spent["other"] < 2 * seconds
    assert used.share("starting") > 0
    assert sum(map(used.share, used.spent)) <= 1.05
