"""What a study would cost, told before anything of it is trained: ``--dry-run``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from e2lora.config import Study
from e2lora.pool import Pool
from e2lora.preflight import Plans, with_absolute_paths
from e2lora.search.estimate import Planned, estimate
from e2lora.search.plans import checked_configurations, configuration_of_point, require_sound
from e2lora.search.seeds import num_runs


def dry_run(study: Study, storage: Path, num_trials: int | None, num_seeds: int) -> str:
    """Cells with their counts, hours and memory, by a few steps of each kind of trial.

    Raises:
        ValueError, OSError, RuntimeError: what would keep the study from starting.
    """
    require_sound(study)
    storage = storage.expanduser().resolve()
    storage.mkdir(parents=True, exist_ok=True)
    num_further = max(0, (num_trials or 0) - len(study.given))
    with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=storage) as name:
        passing = Path(name)
        plans = Plans(passing / "profiles")
        checked_configurations(study, plans)
        with Pool("dry-run", passing / "ray") as pool:
            planned = _planned(study, plans, pool, num_seeds)
            told = estimate(planned, num_further, plans, pool, passing)
    seeds = "" if num_seeds else "; with --seeds 5 each cell would have five runs more, or so"
    return f"{told.table()}\nnothing was trained (dry run){seeds}"


def _planned(study: Study, plans: Plans, pool: Pool, num_seeds: int) -> list[Planned]:
    """Cells, each with its quota and its runs over seeds, and points."""
    first = study.quota[: len(study.cells)]
    quota = len(study.quota) // max(1, len(first))
    numbers = [(point, True) for point in first] + [(point, False) for point in study.points]
    planned = []
    for point, is_cell in numbers:
        config = with_absolute_paths(configuration_of_point(study, point))
        config, plan = plans.planned(config, pool)
        trials = quota + (num_runs(config, num_seeds) if num_seeds else 0) if is_cell else 1
        label = f"{config.label}, {config.task.display_name}"
        planned.append(Planned(label, config, plans.count(config, plan), trials))
    return planned
