"""Runs a study: preflight, worker groups, Tune over the ledger, tracking, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from e2lora.cluster import HEAD, require_shared_storage, slots
from e2lora.command import held_alone
from e2lora.config import GroupSpec, Study, TrialConfig
from e2lora.pool import Pool
from e2lora.preflight import Plans
from e2lora.records import StudyFolder, StudyRecord, write_json
from e2lora.report import render_report
from e2lora.search.ledger import LedgerSearch
from e2lora.search.plans import checked_configurations
from e2lora.search.progress import Progress
from e2lora.search.trials import thin_trial
from e2lora.tracking import Tracker, default_tracking_uri


@dataclass(frozen=True)
class StudyOutcome:
    """What a run of a study came to; an ``unfinished`` one goes on with the same command."""

    folder: StudyFolder
    num_trials: int
    num_complete: int
    unfinished: bool

    @property
    def exit_code(self) -> int:
        if self.unfinished:
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
    record = _record_of(study, space, folder)
    require_shared_storage(folder.path.parent)
    plans = Plans(folder.profiles)
    configs = checked_configurations(study, plans)
    folder.path.mkdir(parents=True, exist_ok=True)
    with held_alone(folder.path, "a study", "--study"):
        write_json(folder.record_file, record)
        write_json(folder.data_file, [splits.model_dump() for splits in plans.splits])
        tracker = Tracker(default_tracking_uri(folder.path.parent), folder, record)
        pool = Pool(name, folder.path / "ray", isolated)
        searcher = LedgerSearch(study, folder, plans, pool, num_trials)
        tracker.mirror_all()
        if searcher.num_suggestions:
            _run_trials(study, folder, plans, pool, tracker, searcher, configs, isolated)
        else:
            print("every trial of this study has ended: its report is made again", flush=True)
        report = render_report(folder, num_trials)
        artefacts = [report.html, *report.pictures, report.csv]
        tracker.finish(artefacts, "KILLED" if searcher.num_open else "FINISHED")
    print(f"\n{report.table}\n\n{report.verdict}\n")
    print(f"{searcher.num_complete} of {num_trials} trials complete; this run took ", end="")
    print(f"{time.monotonic() - started:.0f} s")
    print(f"report   {folder.report / 'report.html'}")
    print(f"plans, adapters, results   {folder.trials}")
    print(tracker.describe(), flush=True)
    return StudyOutcome(folder, num_trials, searcher.num_complete, searcher.num_open > 0)


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


def _run_trials(
    study: Study,
    folder: StudyFolder,
    plans: Plans,
    pool: Pool,
    tracker: Tracker,
    searcher: LedgerSearch,
    configs: Sequence[TrialConfig],
    isolated: bool,
) -> None:
    """Run what is left of the study, or what an interrupt lets it."""
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    remaining = searcher.num_suggestions
    kinds = list(dict.fromkeys(GroupSpec.of(config.training) for config in configs))
    concurrent = min(remaining, max(slots(kind) for kind in kinds))
    print(
        f"study {folder.name}: {remaining} trials to run, on {min(remaining, slots(kinds[0]))} "
        f"worker group(s) of {kinds[0].num_workers} worker(s)"
        f"{', each trial on a fresh one' if isolated else ''}\nin {folder.path}",
        flush=True,
    )
    progress = Progress(folder, pool, plans, tracker, searcher.num_trials)
    tuner = tune.Tuner(
        tune.with_resources(thin_trial, HEAD),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=remaining,
            max_concurrent_trials=concurrent,
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
    with pool:
        if not isolated:
            pool.warm(kinds[0], min(remaining, slots(kinds[0])))
        with progress:
            plans.measure_profiles(configs[: len(study.points)], pool)
            tuner.fit()
        pool.require_healthy()
    tracker.mirror_all()
