"""An MLflow store that may be away for a while: what is sent there, and what is said of outages."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from e2lora.masking import require_encoded_password, without_passwords
from e2lora.tracking.contents import (
    ERROR_TAG,
    FAILURE_TAG,
    NOTE_TAG,
    RESULT_TAG,
    STATE_TAG,
    Contents,
)

if TYPE_CHECKING:  # importing mlflow costs more than a second
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from sqlalchemy import URL

EXPERIMENT = "e2lora"
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # else two lines for every ended trial
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
REFUSALS = {
    "error code 401": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write both to "
    "~/.mlflow/credentials on the machine that runs the study (docs/access.md).",
    "Invalid Host header": "Start the server with this host and port among its --allowed-hosts "
    "(docs/access.md).",
    "error code 403": f"Give this user the permission EDIT for the experiment {EXPERIMENT} "
    "(docs/access.md).",
}
"""What a server says when it refuses → what helps; the first that is said."""
NO_ANSWER = (
    "Start that server, or set MLFLOW_TRACKING_URI to a running `mlflow server` (http://HOST:PORT) "
    "or a database (sqlite:////ABSOLUTE/PATH/mlflow.db; MLflow 3 refuses file stores such as "
    "./mlruns, which `mlflow migrate-filestore` converts), or unset it."
)
OUTAGE_PATIENCE = 5.0
"""After a try that failed, MLflow is left alone for so many times what that try took, so that an
unreachable server costs a study at most a sixth of its driver's time."""
MOST_PER_BATCH = 500
"""Metrics that are sent at once; MLflow refuses more than a thousand."""


class Store(ABC):
    """Mirrors folders into MLflow; usable from several threads of one process.

    Once made, it raises only for a folder that can't be read, never for MLflow's sake: training
    must not die of its mirror.

    Args:
        tracking_uri: of a server or a database.
        home: the folder of what is mirrored.
        shown: where its metrics stand on disk, for the warning of an outage.
        thing: what is mirrored, as ``"study"``.

    Raises:
        ValueError: MLflow refuses ``tracking_uri`` or doesn't answer there.
    """

    def __init__(self, tracking_uri: str, home: Path, shown: Path, thing: str) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.tracking_uri = tracking_uri
        self._home, self._shown, self._thing = home.resolve(), shown, thing
        self._lock = threading.RLock()
        self._connected = False
        self._down, self._retry_at = False, 0.0
        try:
            self._client = _make_client(tracking_uri)
            self._connect()
        except Exception as error:  # each kind of store has its own; all mean the same here
            raise ValueError(
                f"MLflow must accept and answer at the tracking URI before a {thing} starts; got "
                f"{without_passwords(tracking_uri)!r}: {first_line(error)} "
                f"{remedy_of(error, NO_ANSWER)}"
            ) from error

    @abstractmethod
    def _find_runs(self) -> None:
        """Find in MLflow, or make, the runs that this store's folder stands for."""

    def _connect(self) -> None:
        """Find or make the experiment, and the runs in it."""
        if experiment := self._client.get_experiment_by_name(EXPERIMENT):
            self.experiment_id: str = experiment.experiment_id
        else:  # without a server, artefacts would land in whatever ./mlruns is at the time
            place = (self._home.parent / "mlflow-artifacts").as_uri()
            location = place if self.is_database else None
            self.experiment_id = self._client.create_experiment(EXPERIMENT, location)
        self._find_runs()
        self._connected = True

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Do work that asks MLflow; False, with one warning per outage, if it can't be done."""
        started = time.monotonic()
        try:
            if not self._connected:
                self._connect()
            work()
        except Exception as error:  # also what artefact stores raise: botocore, azure, requests
            self._connected = False  # how much of it was done is unknown
            now = time.monotonic()
            self._retry_at = now + OUTAGE_PATIENCE * (now - started)
            if not self._down:
                print(
                    f"warning: MLflow must answer for the {self._thing} to be seen there: "
                    f"{first_line(error)} The {self._thing} goes on; metrics stand in "
                    f"{self._shown} and are mirrored when the server answers, or when the "
                    f"{self._thing} is run again.",
                    file=sys.stderr,
                )
            self._down = True
            return False
        return True

    @contextmanager
    def asking(self, what: str) -> Iterator[MlflowClient]:
        """For what is done on request, when there is no training to be kept alive.

        Raises:
            RuntimeError: MLflow doesn't answer, or refuses.
        """
        try:
            yield self._client
        except Exception as error:
            raise RuntimeError(
                f"MLflow must answer to {what}; {self._shown_uri} didn't do it: "
                f"{first_line(error)} All files are in {self._home}: correct what it says, and "
                "ask again."
            ) from error

    def _bring_up(self, held: Contents, wanted: Contents, artefacts: Sequence[Path]) -> None:
        """What the run lacks; of one that has ended the artefacts too, its status last of all."""
        result = wanted.tags.get(RESULT_TAG)
        if result and result == held.tags.get(RESULT_TAG) and wanted.status == held.status:
            return  # the status is sent last: all the rest is there
        self._send(held, wanted)
        for path in artefacts if result else ():
            if path.is_dir():
                self._client.log_artifacts(held.run_id, str(path), path.name)
            elif path.exists():  # a trial may fail before it has them
                self._client.log_artifact(held.run_id, str(path))
        self._set_status(held, wanted.status)

    def _send(self, held: Contents, wanted: Contents) -> None:
        """Log what the run lacks; parameters are immutable and logged once."""
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
        lapsed = [STATE_TAG, FAILURE_TAG, ERROR_TAG]  # a trial that is tried again
        lapsed += [NOTE_TAG] if held.tags.get(ERROR_TAG) else []  # else it is the user's own
        tags += [RunTag(t, "") for t in lapsed if held.tags.get(t) and t not in wanted.tags]
        while len(metrics) > MOST_PER_BATCH:
            batch, metrics = metrics[:MOST_PER_BATCH], metrics[MOST_PER_BATCH:]
            self._client.log_batch(held.run_id, batch, synchronous=True)
        if metrics or params or tags:
            self._client.log_batch(held.run_id, metrics, params, tags, synchronous=True)
        held.points |= wanted.points
        held.params |= wanted.params
        held.tags |= {tag.key: tag.value for tag in tags}

    def _set_status(self, held: Contents, status: str) -> None:
        if held.status != status and status == "RUNNING":
            self._client.update_run(held.run_id, status=status)
        elif held.status != status:
            self._client.set_terminated(held.run_id, status)
        held.status = status

    def _found_or_made(self, tag: str, name: str) -> Contents:
        """The run that carries this store's folder in a tag."""
        path = str(self._home)
        found = self._search(tag, path)
        if found:
            return Contents.of(found[0])
        made = self._client.create_run(self.experiment_id, tags={tag: path}, run_name=name)
        return Contents.of(made)

    def _search(self, tag: str, value: str) -> Sequence[Run]:
        quote = '"' if "'" in value else "'"  # MLflow's filters know no escapes
        query = f"tags.`{tag}` = {quote}{value}{quote}"
        return self._client.search_runs([self.experiment_id], query, max_results=10_000)

    @property
    def is_database(self) -> bool:
        """Whether there is no server between."""
        return _is_database(self.tracking_uri)

    @property
    def _shown_uri(self) -> str:
        return without_passwords(self.tracking_uri)

    def _describe(self, name: str, run_id: str) -> str:
        """Where to look: tracking URI, experiment, run, and the page or command that shows it."""
        uri = self._shown_uri
        look = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        if uri.startswith("http"):
            look = f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"MLflow   {uri}, experiment {EXPERIMENT}, run {name} ({run_id})\n         {look}"


def require_answer(tracking_uri: str) -> str:
    """Ask a server or a database that is there; what it is, without a password.

    Raises:
        Exception: whatever MLflow and what it uses raise.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    shown = without_passwords(tracking_uri)
    file = Path(tracking_uri.removeprefix("sqlite:///"))
    if tracking_uri.startswith("sqlite:///") and not file.exists():
        file.parent.resolve(strict=True)
        return f"{shown} is made when the first study starts"
    experiment = _make_client(tracking_uri).get_experiment_by_name(EXPERIMENT)
    return f"{shown} answers, {'with' if experiment else 'yet without'} experiment {EXPERIMENT}"


def first_line(error: Exception) -> str:
    """What an error says first, no longer than a line may be, without passwords."""
    text = without_passwords((str(error).strip() or type(error).__name__).splitlines()[0])
    return f"{text[:400]}…" if len(text) > 400 else f"{text.rstrip('.')}."


def remedy_of(error: Exception, otherwise: str) -> str:
    """What to do where a server answers, and refuses."""
    said = str(error)
    return next((remedy for sign, remedy in REFUSALS.items() if sign in said), otherwise)


def _make_client(tracking_uri: str) -> MlflowClient:
    import sqlalchemy
    from mlflow import MlflowClient

    require_encoded_password(tracking_uri)
    # They tell of schemas that are made, and of each retry and error; we get and tell the error.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in ("mlflow.pyfunc", "mlflow.store.model_registry"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    retries = logging.getLogger("urllib3.connectionpool")
    retries.addFilter(lambda record: "/api/2.0/mlflow" not in record.getMessage())
    if _is_database(tracking_uri):
        _make_whole(sqlalchemy.make_url(tracking_uri))
        # MLflow tries a database that can't be opened ten times, for 100 s: try it once before.
        sqlalchemy.inspect(sqlalchemy.create_engine(tracking_uri)).get_table_names()
    return MlflowClient(tracking_uri=tracking_uri)


def _make_whole(url: URL) -> None:
    """Give a new SQLite file its tables before it gets its name.

    MLflow makes them one by one, and refuses for ever a file whose making was interrupted, or that
    two processes made at once.
    """
    from mlflow import MlflowClient

    name = url.database or ":memory:"
    if url.get_backend_name() != "sqlite" or name == ":memory:" or name.startswith("file:"):
        return
    file = Path(name)
    if file.exists() or not file.parent.is_dir():
        return
    with TemporaryDirectory(prefix=".mlflow-", dir=file.parent) as folder:
        made = Path(folder) / file.name
        MlflowClient(url.set(database=str(made)).render_as_string(False)).search_experiments()
        with suppress(OSError):  # another process was faster; or no links here: made in place
            os.link(made, file)


def _is_database(uri: str) -> bool:
    return urlsplit(uri).scheme.split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
