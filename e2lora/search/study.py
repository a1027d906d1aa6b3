"""Runs a study: preflight, worker groups, Tune over the ledger, tracking, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from e2lora.cluster import HEAD, require_shared_storage, slots
from e2lora.config import GroupSpec, Study, TrialConfig
from e2lora.pool import Pool
from e2lora.records import StudyFolder, StudyRecord, write_json
from e2lora.report import render_report
from e2lora.search.plans import Plans, configurations_of_points, require_declared
from e2lora.search.progress import Progress
from e2lora.search.trials import thin_trial
from e2lora.tracking import Tracker, default_tracking_uri


@dataclass(frozen=True)
class StudyOutcome:
    """What a run of a study came to; ``interrupted`` studies go on with the same command."""

    folder: StudyFolder
    num_trials: int
    num_complete: int
    interrupted: bool

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return 130
        return 0 if self.num_complete >= self.num_trials else 1


def run_study(
    study: Study,
    space: str,
    name: str,
    storage: Path,
    num_trials: int | None = None,
    isolated: bool = False,
) -> StudyOutcome:
    """Run or resume a study until it holds ``num_trials`` trials; Ray must be initialised.

    Args:
        space: where the study was imported from; recorded.
        storage: a folder that all nodes of the cluster share.

    Raises:
        ValueError, OSError, RuntimeError: anything that can be known to be wrong beforehand,
            before any training starts.
    """
    started = time.monotonic()
    folder = StudyFolder(storage.expanduser().resolve(), name)
    num_trials = num_trials or study.num_trials
    folder.path.mkdir(parents=True, exist_ok=True)
    with _held_alone(folder):
        return _run_alone(study, space, folder, num_trials, isolated, started)


@contextmanager
def _held_alone(folder: StudyFolder) -> Iterator[None]:
    """One process at a time may run a study; the lock goes with the process that holds it.

    Raises:
        ValueError: another one runs it now.
    """
    lock = FileLock(folder.path / ".lock", blocking=False)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ValueError(
            f"a study is run by one process at a time; another one runs {folder.path} now. Wait "
            "for it, or give this one another --study name."
        ) from error


def _run_alone(
    study: Study,
    space: str,
    folder: StudyFolder,
    num_trials: int,
    isolated: bool,
    started: float,
) -> StudyOutcome:
    record = _record_of(study, space, folder)
    plans = Plans(folder)
    configs = _preflight(study, plans, folder)
    write_json(folder.record_file, record)
    tracker = Tracker(default_tracking_uri(folder.path.parent), folder, record)
    spec = GroupSpec.of(configs[0].training) if configs else None
    print(_opening(study, folder, num_trials, spec, isolated), flush=True)
    warm = None if isolated else spec
    with Pool(folder.name, folder.path / "ray", isolated, warm) as pool:
        plans.measure_profiles(configs, pool)
        interrupted = _tune(study, folder, plans, pool, tracker, num_trials, spec)
    tracker.mirror_all()
    report = render_report(folder, num_trials)
    tracker.finish(
        [report.html, *report.pictures, report.csv], "KILLED" if interrupted else "FINISHED"
    )
    results = [trial.result() for trial in folder.trial_folders()]
    complete = sum(result is not None and result.state == "complete" for result in results)
    print(f"\n{report.table}\n\n{report.verdict}\n")
    print(f"{complete} of {num_trials} trials complete in {time.monotonic() - started:.0f} s")
    print(f"report   {folder.report / 'report.html'}")
    print(f"plans, adapters, results   {folder.trials}")
    print(tracker.describe(), flush=True)
    return StudyOutcome(folder, num_trials, complete, interrupted)


def _record_of(study: Study, space: str, folder: StudyFolder) -> StudyRecord:
    """What study.json is to say; if there is one, it must say the same.

    Raises:
        ValueError: the folder belongs to another study.
    """
    record = StudyRecord(
        name=folder.name,
        space=space,
        models=study.models,
        tasks=study.tasks,
        objectives=study.objectives,
        budgets=study.budgets,
        seeds=study.seeds,
    )
    if folder.record_file.exists() and folder.record() != record:
        raise ValueError(
            f"a study goes on only with the space it began with; {folder.path} was made from "
            f"{folder.record().space}, with other models, tasks, objectives, budgets or seeds "
            f"than {space} has now. Give this one another --study name."
        )
    return record


def _preflight(study: Study, plans: Plans, folder: StudyFolder) -> list[TrialConfig]:
    """Check all that can be checked before a worker starts; the points' configurations."""
    require_shared_storage(folder.path)
    configs = configurations_of_points(study)
    require_declared(study, configs)
    for config in configs:
        plans.check(config)
    return configs


def _opening(
    study: Study, folder: StudyFolder, num_trials: int, spec: GroupSpec | None, isolated: bool
) -> str:
    groups = f"{slots(spec)} worker group(s) of {spec.num_workers} worker(s)" if spec else ""
    return (
        f"study {folder.name}: {num_trials} trials, {len(study.points)} of them given, "
        f"{len(study.models)} model(s) x {len(study.tasks)} task(s), {groups}"
        f"{', each trial in a fresh group' if isolated else ''}\n"
        f"in {folder.path}"
    )


def _tune(
    study: Study,
    folder: StudyFolder,
    plans: Plans,
    pool: Pool,
    tracker: Tracker,
    num_trials: int,
    spec: GroupSpec | None,
) -> bool:
    """Run what is left of the study; True if it was interrupted."""
    import optuna
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    from e2lora.search.ledger import LedgerSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = LedgerSearch(study, folder, plans, pool, num_trials)
    tracker.mirror_all()
    remaining = searcher.num_suggestions
    if remaining == 0:
        print("every trial of this study has ended already; the report is made again", flush=True)
        return False
    progress = Progress(folder, pool, tracker, num_trials)
    tuner = tune.Tuner(
        tune.with_resources(thin_trial, HEAD),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=remaining,
            max_concurrent_trials=max(1, slots(spec) if spec else 1),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:05d}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.path),
            verbose=0,
            callbacks=[progress, JsonLoggerCallback()],
            failure_config=tune.FailureConfig(max_failures=3),
        ),
    )
    with progress:
        tuner.fit()
    pool.require_healthy()
    return searcher.num_open > 0
