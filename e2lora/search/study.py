"""Runs a study: preflight, worker groups, Tune over the ledger, seeds, tracking, report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from e2lora.checkup import require_sound_cluster
from e2lora.cluster import HEAD, slots
from e2lora.command import held_alone
from e2lora.config import GroupSpec, Study
from e2lora.pool import Pool
from e2lora.preflight import Plans
from e2lora.records import StudyFolder, StudyRecord, write_json
from e2lora.report import render_report
from e2lora.search.ledger import LedgerSearch
from e2lora.search.plans import checked_configurations, given_configurations, require_sound
from e2lora.search.progress import Progress
from e2lora.search.seeds import study_over_seeds
from e2lora.search.trials import thin_trial
from e2lora.search.unchanged import ChangedSpace, require_same_space
from e2lora.tracking import Tracker, default_tracking_uri
from e2lora.tracking.registry import register_winner
from e2lora.winner import best_trial


@dataclass(frozen=True)
class Options:
    """How a study is run: what is not part of it.

    Attributes:
        num_trials: to override the study's own.
        num_seeds: that the chosen configurations are trained again over; 0: none.
        max_hours: after which no trial begins.
        register: name of a model in MLflow's registry that the winner becomes.
        ledger: URL of a database for the ledger; None: a journal in the study's folder.
        may_grow: an autoscaler brings the nodes that the cluster lacks.
    """

    num_trials: int | None = None
    num_seeds: int = 0
    isolated: bool = False
    retry_failed: bool = False
    max_hours: float | None = None
    ledger: str | None = None
    register: str | None = None
    may_grow: bool = False


@dataclass(frozen=True)
class StudyOutcome:
    """What a run of a study came to; an ``unfinished`` one goes on with the same command."""

    folder: StudyFolder
    num_failed: int
    unfinished: bool

    @property
    def exit_code(self) -> int:
        if self.unfinished:
            return 130
        return 1 if self.num_failed else 0


def run_study(
    study: Study, space: str, name: str, storage: Path, options: Options = Options()
) -> StudyOutcome:
    """Run or resume a study until it holds its trials; Ray must be initialised.

    Args:
        space: where the study was imported from; recorded.
        storage: a folder that all nodes of the cluster share.

    Raises:
        ValueError, OSError, RuntimeError: anything that can be known to be wrong beforehand,
            before any training starts.
    """
    started = time.monotonic()
    folder = StudyFolder(storage.expanduser().resolve(), name)
    record = record_of(study, space, folder)
    require_sound(study)
    require_same_record(folder, record)
    require_same_space(study, folder)
    plans = Plans(folder.profiles, may_grow=options.may_grow)
    configs = checked_configurations(study, plans)
    kinds = tuple(dict.fromkeys(GroupSpec.of(config.training) for config in configs))
    require_sound_cluster(folder.path.parent, kinds)
    folder.path.mkdir(parents=True, exist_ok=True)
    with held_alone(folder.path, "a study", "--study"):
        write_json(folder.record_file, record)
        write_json(folder.data_file, [splits.model_dump() for splits in plans.splits])
        tracker = Tracker(default_tracking_uri(folder.path.parent), folder, record)
        pool = Pool(name, folder.path / "ray", options.isolated)
        stage = Stage(plans, pool, tracker, kinds, options, started)
        with pool:
            search = stage.run("trials", study, folder, options.num_trials or study.num_trials)
            searches = [search]
            if options.num_seeds and not search.num_open:
                again = study_over_seeds(study, folder, options.num_seeds)
                write_json(folder.seeds.record_file, record_of(again, space, folder.seeds))
                searches.append(stage.run("runs over seeds", again, folder.seeds, None))
        tracker.mirror_all()
        report = render_report(folder, search.num_trials)
        artefacts = [report.html, report.markdown, report.csv, *report.pictures]
        num_open = sum(search.num_open for search in searches)
        winner = best_trial(folder)[0] if search.num_complete else None
        tracker.finish(artefacts, "KILLED" if num_open else "FINISHED", winner)
    print(f"\n{report.table}\n\n{report.verdict}\n")
    for what, searched in zip(("trials", "runs over seeds"), searches, strict=False):
        print(f"{searched.num_complete} of {searched.num_trials} {what} complete; ", end="")
    seconds = time.monotonic() - started
    print(f"this run took {seconds:.0f} s")
    if stage.num_run:
        print(pool.utilisation(seconds).line())
    print(f"report   {report.html}")
    print(f"plans, adapters, results   {folder.trials}")
    print(tracker.describe(), flush=True)
    if options.register and winner and not num_open:
        print(f"registered   {register_winner(tracker, winner, options.register)}", flush=True)
    num_failed = sum(search.num_failed for search in searches)
    return StudyOutcome(folder, num_failed, num_open > 0)


def record_of(study: Study, space: str, folder: StudyFolder) -> StudyRecord:
    """What study.json is to say."""
    return StudyRecord(
        name=folder.name,
        space=space,
        models=study.models,
        tasks=study.tasks,
        objectives=study.objectives,
        budgets=study.budgets,
        seeds=study.seeds,
        num_cells=len(study.cells),
        quota=len(study.quota) // max(1, len(study.cells)),
        sampler=study.sampler,
        pruner=study.pruner,
        max_parameters=study.max_parameters,
    )


def require_same_record(folder: StudyFolder, record: StudyRecord) -> None:
    """
    Raises:
        ChangedSpace: the folder belongs to another study; with what differs.
    """
    if not folder.record_file.exists():
        return
    old, new = folder.record().model_dump(mode="json"), record.model_dump(mode="json")
    changed = [f"{key}: was {old[key]}, is {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        raise ChangedSpace(
            f"a study goes on only with the space it began with; {folder.path} differs in "
            f"{'; '.join(changed)}. Go back to that, or give this one another --study name."
        )


@dataclass
class Stage:
    """What the stages of a study share: each is a search over a ledger of its own.

    Attributes:
        num_run: trials that were to be run, in all stages so far.
    """

    plans: Plans
    pool: Pool
    tracker: Tracker
    kinds: tuple[GroupSpec, ...]
    options: Options
    started: float
    num_run: int = 0

    def run(
        self,
        what: Literal["trials", "runs over seeds"],
        study: Study,
        folder: StudyFolder,
        num_trials: int | None,
    ) -> LedgerSearch:
        """Run what is left of a stage, or what an interrupt lets it."""
        search = LedgerSearch(
            study,
            folder,
            self.plans,
            self.pool,
            num_trials,
            storage=self.options.ledger,
            open_slots=lambda: 1 + self.pool.open_slots(self.kinds),  # one waits at the door
            is_over=self._is_over,
            origin="point" if what == "trials" else "seeds",
            retry_failed=self.options.retry_failed,
        )
        self.tracker.mirror_all()
        if not search.num_suggestions:
            print(f"all {what} of this study have ended", flush=True)
            return search
        kind, remaining = self.kinds[0], search.num_to_run
        self.num_run += remaining
        num_groups = min(remaining, slots(kind))
        print(
            f"study {folder.name}: {remaining} {what} to run, on {num_groups} worker group(s) of "
            f"{kind.num_workers} worker(s)"
            f"{', each on a fresh one' if self.options.isolated else ''}\nin {folder.path}",
            flush=True,
        )
        if remaining and not self.options.isolated:
            self.pool.warm(kind, num_groups)
        total, ended = search.num_trials, lambda: search.num_ended
        with Progress(folder, self.pool, self.plans, self.tracker, total, ended) as progress:
            self.plans.measure_profiles(given_configurations(study), self.pool)
            _tune(search, folder, progress)
        self.pool.require_healthy()
        return search

    def _is_over(self) -> bool:
        hours = (time.monotonic() - self.started) / 3600
        return self.options.max_hours is not None and hours > self.options.max_hours


def keep_credentials_out_of_trials() -> None:
    """Tune would hand its trials AWS keys of this process by ``runtime_env``, which Ray logs and
    shows; ours only wait for workers, which have the credentials of their nodes.
    """
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE as HANDED_ON

    HANDED_ON.difference_update({name for name in HANDED_ON if name.startswith("AWS_")})


def _tune(search: LedgerSearch, folder: StudyFolder, progress: Progress) -> None:
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    keep_credentials_out_of_trials()
    # else one thin trial starts after another, and a large cluster fills slowly
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "8")

    def name(trial: Any) -> str:
        return folder.tune_trial(trial.config["trial"]).name

    tune.Tuner(
        tune.with_resources(thin_trial, HEAD),
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=search.num_suggestions,
            reuse_actors=True,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=folder.tune.name,
            storage_path=str(folder.path),
            verbose=0,
            callbacks=[progress, JsonLoggerCallback()],
            failure_config=tune.FailureConfig(max_failures=3),
        ),
    ).fit()
