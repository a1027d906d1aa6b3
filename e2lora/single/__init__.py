"""One run: checked like a study's trial, trained by a worker group of its own, kept in a folder.

    STORAGE/NAME/
      trial.json  plan.json  profile.json  metrics.jsonl  steps.json  result.json
      outcomes.json  predictions.jsonl  test_outcomes.json  test_predictions.jsonl
      checkpoints/  adapter/  ray/

The same call again resumes the run from its newest checkpoint, whatever ended it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from e2lora.broker import Job
from e2lora.checkup import require_sound_cluster
from e2lora.cluster import connect
from e2lora.command import held_alone
from e2lora.config import TrialConfig
from e2lora.plan import SharingPlan
from e2lora.pool import JobFailed, Pool
from e2lora.preflight import Plans, differences, with_absolute_paths
from e2lora.recording import record
from e2lora.records import TrialFolder, write_json, write_text
from e2lora.single.choice import Choice
from e2lora.single.progress import Pulse, evaluation_line, summary
from e2lora.tracking import RunTracker, default_tracking_uri


@dataclass(frozen=True)
class Run:
    """What is to be trained, and where.

    Attributes:
        min_workers: with how few workers it may go on when nodes are lost; None: with none less
            than the configuration's.
    """

    choice: Choice
    name: str
    storage: Path
    min_workers: int | None = None

    @property
    def folder(self) -> TrialFolder:
        return TrialFolder(self.storage.expanduser().resolve() / self.name)


class PlansOfRun(Plans):
    """One run has one profile, beside its plan."""

    def profile_file(self, config: TrialConfig) -> Path:
        return self._profiles / "profile.json"


def train(run: Run) -> int:
    """Train, resume or show a run; prints, and returns an exit code.

    0: it has ended. 1: it failed, with the reason printed.

    Raises:
        ValueError, OSError, RuntimeError: anything that can be known to be wrong beforehand, before
            any training starts; or workers that can't be had.
    """
    folder, config = run.folder, with_absolute_paths(run.choice.config)
    _require_own_folder(folder, config)
    result = folder.result()
    if result is not None and result.state == "complete":
        print(f"the run {run.name} has ended: nothing is left to train", flush=True)
        return _told(folder, _caught_up(folder))
    connect()
    plans = PlansOfRun(folder.path, run.min_workers)
    plans.check(config)
    require_sound_cluster(folder.path.parent, [plans.group_spec(config)])
    folder.path.mkdir(parents=True, exist_ok=True)
    with held_alone(folder.path, "a run", "--name"):
        tracker = RunTracker(default_tracking_uri(folder.path.parent), folder)
        _say_what_was_before(folder, config)
        folder.result_file.unlink(missing_ok=True)  # of a run that failed
        write_json(folder.config_file, config)
        print(_announcement(run, config, plans.num_steps(config)), flush=True)
        try:
            _train_on_a_group(run, plans, config, tracker)
        finally:
            tracker.finish()
    return _told(folder, tracker.describe())


def _train_on_a_group(run: Run, plans: Plans, config: TrialConfig, tracker: RunTracker) -> None:
    folder, spec = run.folder, plans.group_spec(config)
    with Pool(run.name, folder.path / "ray") as pool, Pulse(pool, plans.num_steps(config)):
        pool.warm(spec, 1)
        config, plan = _planned(run.choice, folder, plans, config, pool)
        write_json(folder.plan_file, plan)
        write_json(folder.config_file, config)
        tracker.mirror()
        payload = {"config": config.model_dump_json(), "folder": str(folder.path)}
        if config.task.test_split:
            payload["test"] = "once, by the weights that are kept"
        told = len(folder.evaluations())
        for update in pool.updates(Job(f"trial-{run.name}", "trial", spec, payload)):
            record(folder, 0, update)
            evaluations = folder.evaluations()
            for evaluation in evaluations[told:]:
                print(evaluation_line(evaluation), flush=True)
            told = max(told, len(evaluations))
            tracker.mirror()


def _planned(
    choice: Choice, folder: TrialFolder, plans: Plans, config: TrialConfig, pool: Pool
) -> tuple[TrialConfig, SharingPlan]:
    """The run's own plan, where it goes on; else the study's; else a new one. Says which.

    With the configuration at the plan's base rank.

    Raises:
        ValueError: the gradients can't be measured, or the plan doesn't fit.
    """
    if folder.plan_file.exists():
        plan = folder.plan()
        return config.model_copy(update={"plan": config.plan.at_rank(plan.options.r)}), plan
    profile = choice.profiles and Plans(choice.profiles).profile_file(config)
    if profile and profile.exists() and config.plan.needs_profile:
        write_text(plans.profile_file(config), profile.read_text(encoding="utf-8"))
    if choice.trial and choice.trial.plan_file.exists() and not choice.changed_parts:
        plan = choice.trial.plan()
        print(f"plan {plan.fingerprint()}: taken over from the study as it is", flush=True)
        return config, plan
    try:
        config, plan = plans.planned(config, pool)
    except JobFailed as error:
        raise ValueError(f"the gradient profile could not be measured: {error}") from error
    changed = " and another ".join(choice.changed_parts)
    why = f" anew, since the study's trial has another {changed}" if changed else ""
    print(f"plan {plan.fingerprint()}: made{why}", flush=True)
    return config, plan


def _require_own_folder(folder: TrialFolder, config: TrialConfig) -> None:
    """A name belongs to one configuration; how the work is spread may change.

    Raises:
        ValueError: the folder is a study's, or another run's; with the fields that differ.
    """
    if (folder.path / "study.json").exists():
        raise ValueError(
            f"a run needs a folder of its own; {folder.path} holds a study. Give it another --name."
        )
    if folder.config_file.exists() and folder.config().identity() != config.identity():
        raise ValueError(
            f"a run goes on only with the configuration it began with; {folder.path} differs in "
            f"{'; '.join(differences(folder.config(), config))}. Give this one another --name."
        )


def _caught_up(folder: TrialFolder) -> str:
    """Mirror what an outage may have kept from MLflow; where to look there."""
    try:
        tracker = RunTracker(default_tracking_uri(folder.path.parent), folder)
    except ValueError as error:  # the run has ended: it can be told without
        return f"warning: {error}"
    tracker.finish()
    return tracker.describe()


def _say_what_was_before(folder: TrialFolder, config: TrialConfig) -> None:
    result = folder.result()
    if result is not None:
        reason = (result.error or "").splitlines()[-1:]
        print(f"it failed before and is tried again: {''.join(reason)[:300]}", flush=True)
    elif folder.config_file.exists():
        print("it was interrupted and goes on from its newest checkpoint", flush=True)
    if folder.config_file.exists() and (changed := differences(folder.config(), config)):
        print(f"the work is spread in another way: {'; '.join(changed)}", flush=True)


def _announcement(run: Run, config: TrialConfig, num_steps: int) -> str:
    training = config.training
    few = "" if run.min_workers is None else f"{run.min_workers} to "
    epochs = "" if training.num_epochs is None else f" ({training.num_epochs:g} epochs)"
    length = f"{num_steps} steps{epochs}"
    return (
        f"run {run.name}: {config.label} on {config.task.display_name}, {length}, "
        f"{few}{training.num_workers} worker(s), from {run.choice.source}\nin {run.folder.path}"
    )


def _told(folder: TrialFolder, tracked: str) -> int:
    result = folder.result()
    assert result is not None
    if result.state == "failed":
        print(f"\nthe run failed: {result.error}\n{tracked}", flush=True)
        return 1
    print(f"\n{summary(folder)}\n{tracked}", flush=True)
    return 0
