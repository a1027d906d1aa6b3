"""Mirrors studies and single runs into MLflow; the only rooms that know MLflow.

A trial's files say what its run should hold, and what the run lacks is sent. So mirroring again
changes nothing, what is resumed goes on in the same runs, and an outage is made up for later.

    experiment e2lora
      run STUDY                 found by the tag `e2lora.study`, the study's absolute path
        run 00007 E²LoRA        found by `mlflow.parentRunId` and the tag `e2lora.trial`
      run NAME                  of jobs/train.py, found by the tag `e2lora.run`, its folder
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from e2lora.records import StudyFolder, StudyRecord, TrialFolder, is_thrown_away
from e2lora.tracking.contents import Contents, read_trial, study_params
from e2lora.tracking.store import Store

STUDY_TAG, TRIAL_TAG, RUN_TAG = "e2lora.study", "e2lora.trial", "e2lora.run"
PARENT_TAG = "mlflow.parentRunId"
STUDY_SERIES = ("loss", "grad_norm", "tokens_per_second")
"""By step; a study has many trials, and each further series is a column in the UI."""

Ended = Literal["FINISHED", "FAILED", "KILLED"]


def default_tracking_uri(storage: Path) -> str:
    """``$MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory, or under ``storage``
    in a submitted job, whose working directory is a copy that Ray throws away.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    here = Path.cwd()
    return f"sqlite:///{(storage.absolute() if is_thrown_away(here) else here) / 'mlflow.db'}"


class Tracker(Store):
    """One parent run per study, one child per trial.

    Raises:
        ValueError: MLflow refuses ``tracking_uri`` or doesn't answer there.
    """

    def __init__(self, tracking_uri: str, folder: StudyFolder, record: StudyRecord) -> None:
        self._folder, self._record = folder, record
        self._children: dict[int, Contents] = {}
        self._pending: dict[int, TrialFolder] = {}
        self._live: set[int] = set()  # trials that this process has seen running
        super().__init__(tracking_uri, folder.path, folder.trials, "study")

    def mirror_trial(self, trial: TrialFolder) -> None:
        """Bring a trial's run up to its folder; one that has no result is taken to be running."""
        with self._lock:
            self._live.add(trial.number)
            self._pending[trial.number] = trial
            if time.monotonic() >= self._retry_at:
                self._mirror_pending()

    def mirror_all(self) -> None:
        """Bring every run up to its folder; close as KILLED those of trials that have no result and
        that this process was not asked to :meth:`mirror_trial`: a dead one left them running.
        """
        with self._lock:
            ended = [*self._folder.trial_folders(), *self._folder.refused_folders()]
            self._pending |= {trial.number: trial for trial in ended}
            self._mirror_pending()

    def finish(self, report_files: Sequence[Path], status: Ended) -> None:
        """Hang the report on the parent run and end it; trials without a result are closed."""
        with self._lock:
            self._live.clear()
            self._down = False  # the last word on an outage is said again
            self.mirror_all()
            self._attempt(partial(self._finish_parent, report_files, status))

    def describe(self) -> str:
        """Where to look: tracking URI, experiment, run, and the page or command that shows it."""
        return self._describe(self._record.name, self.parent_run_id)

    def _mirror_pending(self) -> None:
        for number, trial in list(self._pending.items()):
            # Read outside the attempt: an unreadable folder is the study's error, not MLflow's.
            wanted = read_trial(trial, number in self._live, STUDY_SERIES)
            if wanted and not self._attempt(partial(self._mirror, trial, wanted)):
                self._pending[number] = self._pending.pop(number)  # others first, next time
                return
            del self._pending[number]
        self._down = False

    def _mirror(self, trial: TrialFolder, wanted: Contents) -> None:
        wanted.tags[TRIAL_TAG] = str(trial.number)
        held = self._children.get(trial.number)
        if held is None:
            tags = {PARENT_TAG: self.parent_run_id, TRIAL_TAG: str(trial.number)}
            name = f"{trial.number:05d} {wanted.params.get('system', 'refused')}"
            run = self._client.create_run(self.experiment_id, tags=tags, run_name=name)
            held = self._children[trial.number] = Contents.of(run)
        self._bring_up(held, wanted, [trial.config_file, trial.plan_file])

    def _finish_parent(self, report_files: Sequence[Path], status: Ended) -> None:
        trials = [*self._folder.trial_folders(), *self._folder.refused_folders()]
        states = [result.state for trial in trials if (result := trial.result())]
        self._client.log_metric(self.parent_run_id, "finished_trials", states.count("complete"))
        self._client.log_metric(self.parent_run_id, "failed_trials", states.count("failed"))
        for file in report_files:
            self._client.log_artifact(self.parent_run_id, str(file), "report")
        self._client.set_terminated(self.parent_run_id, status)

    def _find_runs(self) -> None:
        """The parent run, and which children there are."""
        parent = self._found_or_made(STUDY_TAG, self._record.name)
        self.parent_run_id = parent.run_id
        tags = {STUDY_TAG: str(self._home)}
        self._send(parent, Contents("RUNNING", tags, study_params(self._record), set()))
        self._set_status(parent, "RUNNING")
        runs = [Contents.of(run) for run in self._search(PARENT_TAG, parent.run_id)]
        self._children = {int(run.tags[TRIAL_TAG]): run for run in runs if TRIAL_TAG in run.tags}


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
