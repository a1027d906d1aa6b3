"""Mirrors studies and single runs into MLflow; the only rooms that know MLflow.

A trial's files say what its run should hold, and what the run lacks is sent. So mirroring again
changes nothing, what is resumed goes on in the same runs, and an outage is made up for later.

    experiment e2lora
      run STUDY                 found by the tag `e2lora.study`, the study's absolute path
        run 00007 E²LoRA r=8    found by `mlflow.parentRunId` and the tags `e2lora.stage`, "search"
        run 00012 seed 3 E²LoRA r=8     or "seeds", and `e2lora.trial`, its number in that stage
      run NAME                  of jobs/train.py, found by the tag `e2lora.run`, its folder
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from e2lora.records import StudyFolder, StudyRecord, TrialFolder, is_thrown_away
from e2lora.tracking.contents import STATE_TAG, Contents, read_trial, study_params
from e2lora.tracking.store import Store
from e2lora.tracking.views import VIEW_TAG, saved_view, shows_the_same

STUDY_TAG, TRIAL_TAG, RUN_TAG = "e2lora.study", "e2lora.trial", "e2lora.run"
STAGE_TAG, WINNER_TAG = "e2lora.stage", "e2lora.winner"
PARENT_TAG = "mlflow.parentRunId"
STUDY_SERIES = ("loss", "grad_norm", "tokens_per_second")
"""By step; a study has many trials, and each further series is a column in the UI."""

Ended = Literal["FINISHED", "FAILED", "KILLED"]
Stage = Literal["search", "seeds"]
Key = tuple[Stage, int]
"""Of a trial: seed runs have numbers of their own."""


def default_tracking_uri(storage: Path) -> str:
    """``$MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory, or under ``storage``
    in a submitted job, whose working directory is a copy that Ray throws away.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    here = Path.cwd()
    return f"sqlite:///{(storage.absolute() if is_thrown_away(here) else here) / 'mlflow.db'}"


class Tracker(Store):
    """One parent run per study, one child per trial and per seed run.

    Raises:
        ValueError: MLflow refuses ``tracking_uri`` or doesn't answer there.
    """

    def __init__(self, tracking_uri: str, folder: StudyFolder, record: StudyRecord) -> None:
        self._folder, self._record = folder, record
        self._judged = {"loss", *(objective.name for objective in record.objectives)}
        self._children: dict[Key, Contents] = {}
        self._pending: dict[Key, TrialFolder] = {}
        self._live: set[Key] = set()  # trials that this process has seen running
        self._viewed: set[Stage] = set()
        super().__init__(tracking_uri, folder.path, folder.trials, "study")

    def mirror_trial(self, trial: TrialFolder) -> None:
        """Bring a trial's run, of either stage, up to its folder; one that has no result is taken
        to be running.
        """
        key = self._key(trial)
        with self._lock:
            self._live.add(key)
            self._pending[key] = trial
            if time.monotonic() >= self._retry_at:
                self._mirror_pending()

    def mirror_all(self) -> None:
        """Bring every run up to its folder; close as KILLED those of trials that have no result and
        that this process was not asked to :meth:`mirror_trial`: a dead one left them running.
        """
        with self._lock:
            trials = [trial for stage in self._stages.values() for trial in _trials_of(stage)]
            self._pending |= {self._key(trial): trial for trial in trials}
            self._mirror_pending()

    def finish(
        self, report_files: Sequence[Path], status: Ended, winner: TrialFolder | None = None
    ) -> None:
        """Hang report, records and winner on the parent run and end it; trials without a result are
        closed.

        Args:
            winner: the trial whose configuration, plan and adapter the parent run is to hold.
        """
        with self._lock:
            self._live.clear()
            self._down = False  # the last word on an outage is said again
            self.mirror_all()
            self._attempt(partial(self._finish_parent, report_files, status, winner))

    def run_id_of(self, trial: TrialFolder) -> str:
        """Of a trial's run, which is brought up to its folder before.

        Raises:
            RuntimeError: the server doesn't answer.
        """
        with self._lock:
            self._pending[self._key(trial)] = trial
            self._mirror_pending()
            held = self._children.get(self._key(trial))
            if held is None or self._down:
                raise RuntimeError(
                    f"the trial must be in MLflow, which must answer; {trial.path} could not be "
                    f"written to {self._shown_uri}. See the warning above, and try again."
                )
            return held.run_id

    def describe(self) -> str:
        """Where to look: tracking URI, experiment, run, and what shows it and the comparison."""
        look = f"comparison: Training runs, Views, {self._view_name('search')}"
        if self._shown_uri.startswith("http"):
            page = f"{self._shown_uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs"
            look = f"{page}?viewStateShareKey={self._view_key('search')}&compareRunsMode=CHART"
        described = self._describe(self._record.name, self.parent_run_id)
        return f"{described}\n         {look}"

    @property
    def _stages(self) -> dict[Stage, StudyFolder]:
        return {"search": self._folder, "seeds": self._folder.seeds}

    def _key(self, trial: TrialFolder) -> Key:
        place = trial.path.resolve().parent
        stages = (s for s, folder in self._stages.items() if folder.trials.resolve() == place)
        stage = next(stages, None)
        assert stage, f"{trial.path} is no trial of {self._folder.path}"
        return stage, trial.number

    def _mirror_pending(self) -> None:
        for key, trial in list(self._pending.items()):
            # Read outside the attempt: an unreadable folder is the study's error, not MLflow's.
            wanted = read_trial(trial, key in self._live, STUDY_SERIES, self._judged)
            if wanted and not self._attempt(partial(self._mirror, key, trial, wanted)):
                self._pending[key] = self._pending.pop(key)  # others first, next time
                return
            del self._pending[key]
        self._down = False

    def _mirror(self, key: Key, trial: TrialFolder, wanted: Contents) -> None:
        stage, number = key
        if stage not in self._viewed:
            self._write_view(stage)
        wanted.tags |= {TRIAL_TAG: str(number), STAGE_TAG: stage}
        held = self._children.get(key)
        if held is None:
            tags = {PARENT_TAG: self.parent_run_id, STAGE_TAG: stage, TRIAL_TAG: str(number)}
            name = f"{number:05d} {_name_of(stage, trial)}"
            run = self._client.create_run(self.experiment_id, tags=tags, run_name=name)
            held = self._children[key] = Contents.of(run)
        self._bring_up(held, wanted, [trial.config_file, trial.plan_file])

    def _finish_parent(
        self, report_files: Sequence[Path], status: Ended, winner: TrialFolder | None
    ) -> None:
        run, client = self.parent_run_id, self._client
        for name, value in self._counts().items():
            client.log_metric(run, name, value)
        held = {"report": report_files, "study": (self._folder.record_file, self._folder.data_file)}
        if winner:
            held["winner"] = (winner.config_file, winner.plan_file, winner.result_file)
            if winner.adapter.exists():
                client.log_artifacts(run, str(winner.adapter), "winner/adapter")
            client.set_tag(run, WINNER_TAG, "{} {}".format(*self._key(winner)))
        for place, files in held.items():
            for file in files:
                if file.exists():
                    client.log_artifact(run, str(file), place)
        client.set_terminated(run, status)

    def _counts(self) -> dict[str, int]:
        """Trials by how they ended; seed runs, if there are any."""
        ended = {
            stage: [result.state for trial in _trials_of(folder) if (result := trial.result())]
            for stage, folder in self._stages.items()
        }
        search, seeds = ended["search"], ended["seeds"]
        counts = {
            "finished_trials": search.count("complete"),
            "failed_trials": search.count("failed"),
        }
        if "stopped" in search:
            counts["stopped_trials"] = search.count("stopped")
        return counts | ({"finished_seed_runs": seeds.count("complete")} if seeds else {})

    def _view_key(self, stage: Stage) -> str:
        return f"e2lora-{stage}-{self.parent_run_id}"

    def _view_name(self, stage: Stage) -> str:
        return self._record.name if stage == "search" else f"{self._record.name}: seed runs"

    def _write_view(self, stage: Stage) -> None:
        """What shows the whole trials of a stage by size and score."""
        tag, client = f"{VIEW_TAG}{self._view_key(stage)}", self._client
        wanted = {PARENT_TAG: self.parent_run_id, STAGE_TAG: stage, STATE_TAG: "complete"}
        run_filter = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
        now = int(time.time() * 1000)
        view = saved_view(self._view_name(stage), run_filter, self._record.objectives, now)
        if not shows_the_same(view, client.get_experiment(self.experiment_id).tags.get(tag)):
            client.set_experiment_tag(self.experiment_id, tag, view)
        self._viewed.add(stage)

    def _find_runs(self) -> None:
        """The parent run, and which children there are."""
        parent = self._found_or_made(STUDY_TAG, self._record.name)
        self.parent_run_id = parent.run_id
        tags = {STUDY_TAG: str(self._home)}
        self._send(parent, Contents("RUNNING", tags, study_params(self._record), set()))
        self._set_status(parent, "RUNNING")
        self._write_view("search")
        runs = [Contents.of(run) for run in self._search(PARENT_TAG, parent.run_id)]
        self._children = {_key_in(run.tags): run for run in runs if TRIAL_TAG in run.tags}


def _trials_of(stage: StudyFolder) -> Iterable[TrialFolder]:
    """Those that have something to show."""
    return (*stage.trial_folders(), *stage.refused_folders())


def _key_in(tags: dict[str, str]) -> Key:
    """Runs of before there were stages have no tag of it."""
    return "seeds" if tags.get(STAGE_TAG) == "seeds" else "search", int(tags[TRIAL_TAG])


def _name_of(stage: Stage, trial: TrialFolder) -> str:
    """What a run is called behind its number: the rank is told where it is decided."""
    if not trial.config_file.exists():
        return "refused"
    config = trial.config()
    words = [f"seed {config.seed}"] if stage == "seeds" else []
    if config.plan.partition_seed is not None:
        words.append(f"draw {config.plan.partition_seed}")
    decided = trial.plan_file.exists() or config.plan.target_parameters is None
    return " ".join([*words, config.label if decided else config.system])


class RunTracker(Store):
    """One run in MLflow for a trial that stands alone, with its adapter as an artefact.

    Raises:
        ValueError: MLflow refuses ``tracking_uri`` or doesn't answer there.
    """

    def __init__(self, tracking_uri: str, folder: TrialFolder) -> None:
        self._folder = folder
        super().__init__(tracking_uri, folder.path, folder.path, "run")

    @property
    def run_id(self) -> str:
        return self._run.run_id

    def mirror(self) -> None:
        """Bring the run up to the folder of a trial that goes on."""
        with self._lock:
            if time.monotonic() >= self._retry_at:
                self._bring_up_run(running=True)

    def finish(self) -> None:
        """The last word: of a trial without a result, that it was left."""
        with self._lock:
            self._down = False  # the last word on an outage is said again
            self._bring_up_run(running=False)

    def describe(self) -> str:
        """Where to look: tracking URI, experiment, run, and the page or command that shows it."""
        return self._describe(self._folder.path.name, self.run_id)

    def _bring_up_run(self, running: bool) -> None:
        wanted = read_trial(self._folder, running)
        if wanted:
            trial = self._folder
            predictions = [trial.predictions_file, trial.test_predictions_file]
            artefacts = [trial.config_file, trial.plan_file, trial.adapter, *predictions]
            if self._attempt(lambda: self._bring_up(self._run, wanted, artefacts)):
                self._down = False

    def _find_runs(self) -> None:
        self._run = self._found_or_made(RUN_TAG, self._folder.path.name)
