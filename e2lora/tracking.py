"""Mirrors a study's folder into MLflow; the only room that knows MLflow.

A trial's files say what its run should hold, and what the run lacks is sent. So mirroring again
changes nothing, a resumed study goes on in the same runs, and an outage is made up for later.

    experiment e2lora
      run STUDY                 found by the tag `e2lora.study`, the study's absolute path
        run 00007 E²LoRA        found by `mlflow.parentRunId` and the tag `e2lora.trial`
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from e2lora.config import TrialConfig
from e2lora.records import StudyFolder, StudyRecord, TrialFolder, is_thrown_away

if TYPE_CHECKING:  # importing mlflow costs more than a second
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "e2lora"
STUDY_TAG, TRIAL_TAG, RESULT_TAG = "e2lora.study", "e2lora.trial", "e2lora.result"
ERROR_TAG, NOTE_TAG, PARENT_TAG = "e2lora.error", "mlflow.note.content", "mlflow.parentRunId"
LABELS = ("model", "task", "topology", "system", "seed")  # parameters that are tags as well
PLAN_OPTIONS = {"topology", "r", "lora_alpha"}
SPECIAL_PLAN_OPTIONS = {  # told where they are set: columns of defaults only slow the UI
    "block_size",
    "stride",
    "num_intervals",
    "partition_seed",
    "use_rslora",
    "similarity",
    "allocation",
    "beta",
    "budget",
}
TRAINING_OPTIONS = {"learning_rate", "max_steps", "global_batch_size", "zero_stage", "num_workers"}
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # else two lines for every ended trial
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
OUTAGE = (
    "warning: MLflow must answer for the study to be seen there: {} The study goes on; metrics "
    "stand in {} and are mirrored when the server answers, or when the study is run again."
)
OUTAGE_PATIENCE = 5.0
"""After a try that failed, MLflow is left alone for so many times what that try took, so that an
unreachable server costs a study at most a sixth of its driver's time."""

Ended = Literal["FINISHED", "FAILED", "KILLED"]


def default_tracking_uri(storage: Path) -> str:
    """``$MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory, or under ``storage``
    in a submitted job, whose working directory is a copy that Ray throws away.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    here = Path.cwd()
    return f"sqlite:///{(storage.absolute() if is_thrown_away(here) else here) / 'mlflow.db'}"


@dataclass
class _Contents:
    """What a run holds: in MLflow, or what a trial's files say it should."""

    status: str
    tags: dict[str, str]
    params: dict[str, str]
    points: set[tuple[str, int, float]]  # metric, step, value
    run_id: str = ""
    unread: Sequence[str] = ()  # metrics whose points in MLflow are not known yet

    @classmethod
    def of(cls, run: Run) -> _Contents:
        info, data = run.info, run.data
        return cls(info.status, data.tags, data.params, set(), info.run_id, list(data.metrics))


class Tracker:
    """One parent run per study, one child per trial; usable from several threads of one process.

    Once made, it raises only for a folder that can't be read, never for MLflow's sake: training
    must not die of its mirror.

    Raises:
        ValueError: MLflow refuses ``tracking_uri`` or doesn't answer there.
    """

    def __init__(self, tracking_uri: str, folder: StudyFolder, record: StudyRecord) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.tracking_uri, self._folder, self._record = tracking_uri, folder, record
        self._lock = threading.RLock()
        self._children: dict[int, _Contents] | None = None  # None: to be read from MLflow
        self._pending: dict[int, TrialFolder] = {}
        self._live: set[int] = set()  # trials that this process has seen running
        self._down, self._retry_at = False, 0.0
        try:
            self._client = _make_client(tracking_uri)
            self._connect()
        except Exception as error:  # each kind of store has its own; all mean the same here
            raise ValueError(
                "MLflow must accept and answer at the tracking URI before a study starts; got "
                f"{_without_password(tracking_uri)!r}: {_first_line(error)} Start that server, or "
                "set MLFLOW_TRACKING_URI to a running `mlflow server` (http://HOST:PORT) or a "
                "database (sqlite:////ABSOLUTE/PATH/mlflow.db; MLflow 3 refuses file stores such "
                "as ./mlruns, which `mlflow migrate-filestore` converts), or unset it."
            ) from error

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
        uri, run_id = _without_password(self.tracking_uri), self.parent_run_id
        look = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        if uri.startswith("http"):
            look = f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"
        run = f"experiment {EXPERIMENT}, run {self._record.name} ({run_id})"
        return f"MLflow   {uri}, {run}\n         {look}"

    def _mirror_pending(self) -> None:
        for number, trial in list(self._pending.items()):
            # Read outside the attempt: an unreadable folder is the study's error, not MLflow's.
            wanted = _read_trial(trial, number in self._live)
            if wanted and not self._attempt(partial(self._mirror, trial, wanted)):
                self._pending[number] = self._pending.pop(number)  # others first, next time
                return
            del self._pending[number]
        self._down = False

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Do work that asks MLflow; False, with one warning per outage, if it can't be done."""
        started = time.monotonic()
        try:
            if self._children is None:
                self._connect()
            work()
        except Exception as error:  # also what artefact stores raise: botocore, azure, requests
            self._children = None  # how much of it was done is unknown
            now = time.monotonic()
            self._retry_at = now + OUTAGE_PATIENCE * (now - started)
            if not self._down:
                print(OUTAGE.format(_first_line(error), self._folder.trials), file=sys.stderr)
            self._down = True
            return False
        return True

    def _mirror(self, trial: TrialFolder, wanted: _Contents) -> None:
        assert self._children is not None
        held = self._children.get(trial.number)
        if held is None:
            tags = {PARENT_TAG: self.parent_run_id, TRIAL_TAG: str(trial.number)}
            name = f"{trial.number:05d} {wanted.params.get('system', 'refused')}"
            run = self._client.create_run(self.experiment_id, tags=tags, run_name=name)
            held = self._children[trial.number] = _Contents.of(run)
        result = wanted.tags.get(RESULT_TAG)
        if result and result == held.tags.get(RESULT_TAG) and wanted.status == held.status:
            return  # the status is sent last: all the rest is there
        self._send(held, wanted)
        if result:
            for file in (trial.config_file, trial.plan_file):
                if file.exists():  # a trial may fail before it has them
                    self._client.log_artifact(held.run_id, str(file))
        self._set_status(held, wanted.status)

    def _send(self, held: _Contents, wanted: _Contents) -> None:
        """Log, in one batch, what the run lacks; parameters are immutable and logged once."""
        from mlflow.entities import Metric, Param, RunTag

        for name in held.unread:
            history = self._client.get_metric_history(held.run_id, name)
            held.points |= {(point.key, point.step, point.value) for point in history}
        held.unread = ()
        now = int(time.time() * 1000)
        points = sorted(wanted.points - held.points, key=lambda point: point[1])
        metrics = [Metric(name, value, now, step) for name, step, value in points]
        params = [Param(*item) for item in wanted.params.items() if item[0] not in held.params]
        tags = [RunTag(*item) for item in wanted.tags.items() - held.tags.items()]
        if ERROR_TAG not in wanted.tags and held.tags.get(ERROR_TAG):
            tags += [RunTag(ERROR_TAG, ""), RunTag(NOTE_TAG, "")]  # it was made up for since
        if metrics or params or tags:
            self._client.log_batch(held.run_id, metrics, params, tags, synchronous=True)
        held.points |= wanted.points
        held.params |= wanted.params
        held.tags |= {tag.key: tag.value for tag in tags}

    def _set_status(self, held: _Contents, status: str) -> None:
        if held.status != status and status == "RUNNING":
            self._client.update_run(held.run_id, status=status)
        elif held.status != status:
            self._client.set_terminated(held.run_id, status)
        held.status = status

    def _finish_parent(self, report_files: Sequence[Path], status: Ended) -> None:
        trials = [*self._folder.trial_folders(), *self._folder.refused_folders()]
        states = [result.state for trial in trials if (result := trial.result())]
        self._client.log_metric(self.parent_run_id, "finished_trials", states.count("complete"))
        self._client.log_metric(self.parent_run_id, "failed_trials", states.count("failed"))
        for file in report_files:
            self._client.log_artifact(self.parent_run_id, str(file), "report")
        self._client.set_terminated(self.parent_run_id, status)

    def _connect(self) -> None:
        """Find or make the experiment and the parent run, and read which children there are."""
        path = self._folder.path.resolve()
        if experiment := self._client.get_experiment_by_name(EXPERIMENT):
            self.experiment_id: str = experiment.experiment_id
        else:  # without a server, artefacts would land in whatever ./mlruns is at the time
            place = (path.parent / "mlflow-artifacts").as_uri()
            location = place if _is_database(self.tracking_uri) else None
            self.experiment_id = self._client.create_experiment(EXPERIMENT, location)
        wanted = _Contents("RUNNING", {STUDY_TAG: str(path)}, _study_params(self._record), set())
        create = partial(self._client.create_run, self.experiment_id, run_name=self._record.name)
        found = self._search(STUDY_TAG, str(path)) or [create(tags=wanted.tags)]
        parent = _Contents.of(found[0])
        self.parent_run_id = parent.run_id
        self._send(parent, wanted)
        self._set_status(parent, wanted.status)
        runs = [_Contents.of(run) for run in self._search(PARENT_TAG, parent.run_id)]
        self._children = {int(run.tags[TRIAL_TAG]): run for run in runs if TRIAL_TAG in run.tags}

    def _search(self, tag: str, value: str) -> Sequence[Run]:
        quote = '"' if "'" in value else "'"  # MLflow's filters know no escapes
        query = f"tags.`{tag}` = {quote}{value}{quote}"
        return self._client.search_runs([self.experiment_id], query, max_results=10_000)


def _make_client(tracking_uri: str) -> MlflowClient:
    import sqlalchemy
    from mlflow import MlflowClient

    # They tell of schemas that are made, and of each retry and error; we get and tell the error.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    retries = logging.getLogger("urllib3.connectionpool")
    retries.addFilter(lambda record: "/api/2.0/mlflow" not in record.getMessage())
    if _is_database(tracking_uri):
        # MLflow tries a database that can't be opened ten times, for 100 s: try it once before.
        sqlalchemy.inspect(sqlalchemy.create_engine(tracking_uri)).get_table_names()
    return MlflowClient(tracking_uri=tracking_uri)


def _is_database(uri: str) -> bool:
    return urlsplit(uri).scheme.split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def _without_password(text: str) -> str:
    return re.sub(r"(//[^/:@\s]*:)[^/@\s]*@", r"\1***@", text)


def _first_line(error: Exception) -> str:
    text = _without_password((str(error).strip() or type(error).__name__).splitlines()[0])
    return f"{text[:400]}…" if len(text) > 400 else f"{text.rstrip('.')}."


def _study_params(record: StudyRecord) -> dict[str, str]:
    return {
        "study": record.name,
        "space": record.space,
        "models": ", ".join(model.name for model in record.models),
        "tasks": ", ".join(task.display_name for task in record.tasks),
        "budgets": ", ".join(map(str, record.budgets)),
        "seeds": ", ".join(map(str, record.seeds)),
        "objectives": ", ".join(f"{o.name} ({o.direction})" for o in record.objectives),
    }


def _trial_params(config: TrialConfig) -> dict[str, str]:
    """What is worth an axis of MLflow's parallel plot; all the rest stands in trial.json."""
    model = config.model
    values: dict[str, object] = {
        "model": f"{model.name}@{model.revision}" if model.revision else model.name,
        "task": config.task.display_name,
        "system": config.system,
        "seed": config.seed,
        "family": config.adapter.family,
        "target_modules": ", ".join(config.adapter.target_modules),
        **config.adapter.special_options,
        **config.plan.model_dump(include=PLAN_OPTIONS),
        **config.plan.model_dump(include=SPECIAL_PLAN_OPTIONS, exclude_defaults=True),
        **config.training.model_dump(include=TRAINING_OPTIONS),
    }
    return {name: str(value) for name, value in values.items()}


def _read_trial(trial: TrialFolder, running: bool) -> _Contents | None:
    """What the trial's run should hold; None while the trial has nothing on disk to show."""
    result, evaluations = trial.result(), trial.evaluations()
    if not trial.config_file.exists() and result is None:
        return None
    params = _trial_params(trial.config()) if trial.config_file.exists() else {}
    tags = {name: params[name] for name in LABELS if params} | {TRIAL_TAG: str(trial.number)}
    if trial.plan_file.exists():
        tags["plan_fingerprint"] = trial.plan().fingerprint()
    points = {(name, e.step, value) for e in evaluations for name, value in e.metrics.items()}
    if not result:
        return _Contents("RUNNING" if running else "KILLED", tags, params, points)
    tags[RESULT_TAG] = result.fingerprint()
    if result.error:
        tags[ERROR_TAG] = tags[NOTE_TAG] = result.error[-4000:]
    final = {"seconds": result.seconds, "attempts": result.attempts}
    if result.state == "complete":  # a failed trial is not scored: it is no point on a front
        final |= result.metrics
        final["adapter_parameters"] = result.adapter_parameters
        final["head_parameters"] = result.head_parameters
    last = evaluations[-1].step if evaluations else 0
    points |= {(name, last, float(value)) for name, value in final.items()}
    return _Contents("FINISHED" if result.state == "complete" else "FAILED", tags, params, points)
