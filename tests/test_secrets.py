"""Secrets that a study is given get into nothing that it writes, sends or prints."""

from __future__ import annotations

import base64
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from e2lora.assets import fetch_weights
from e2lora.config import TextClassificationConfig
from e2lora.report import render_report
from e2lora.search.study import keep_credentials_out_of_trials
from e2lora.tasks import load_task
from e2lora.tracking import Tracker
from e2lora.tracking.contents import read_trial, study_params
from tests.commands import Command
from tests.made_up_study import E2, LORA, MadeUpStudy
from tests.test_access import PASSWORD, USER, refusing
from tests.test_tracking import free_port, running_server

PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0000",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+5d1c",
    "HF_TOKEN": "hf_planted77aa",
    "MLFLOW_TRACKING_USERNAME": USER,
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "PGPASSWORD": "planted-pg-08e2",
    "RAY_AUTH_TOKEN": "planted-ray-" + "6b" * 16,
    "WANDB_API_KEY": "planted-of-another-tool",
}
NO_SECRETS = {"AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_USERNAME"}  # names, which may be told
SECRETS = [value for name, value in PLANTED.items() if name not in NO_SECRETS]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return PLANTED


def holding(folders: Iterable[Path], secrets: Iterable[str] = SECRETS) -> list[str]:
    """Files below, by name or content, in which a secret stands: plain, in a URI, as a header."""
    forms = [form for secret in secrets for form in forms_of(secret)]
    found = []
    for folder in folders:
        for file in folder.rglob("*"):
            text = str(file).encode()
            if file.is_file() and not file.is_symlink():
                text += file.read_bytes()
            found += [f"{file}: {form!r}" for form in forms if form in text]
    return found


def forms_of(secret: str) -> list[bytes]:
    header = base64.b64encode(f"{USER}:{secret}".encode())
    return list({secret.encode(), quote(secret, safe="").encode(), header})


def test_search_for_secrets_finds_them_in_every_form(tmp_path: Path) -> None:
    """Or the tests below would prove nothing."""
    (tmp_path / "folder").mkdir()
    with sqlite3.connect(tmp_path / "folder" / "database") as database:
        database.execute("create table tags (value text)")
        database.execute("insert into tags values (?)", [f"x{PLANTED['AWS_SECRET_ACCESS_KEY']}y"])
    (tmp_path / "uri").write_text("http://me:planted%2Faws%2B5d1c@host")
    (tmp_path / "header").write_bytes(base64.b64encode(f"{USER}:{PASSWORD}".encode()))
    (tmp_path / f"named-{PLANTED['HF_TOKEN']}").touch()
    (tmp_path / "none").write_text(" ".join(PLANTED))
    found = {Path(line.partition(": ")[0]).name for line in holding([tmp_path])}
    assert found == {"database", "uri", "header", f"named-{PLANTED['HF_TOKEN']}"}


def test_what_a_study_records_reports_and_sends_holds_no_secret(
    planted: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What it sends is taken before it is sent: making a store's tables takes seconds."""
    made = MadeUpStudy(tmp_path)
    made.add(LORA, outcomes=[0.0, 1.0, 1.0])
    made.add(E2, r=4, error="Traceback\nRuntimeError: out of memory", failure="memory")
    report, record = render_report(made.folder), made.folder.record()
    print(report.table, report.verdict)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://{USER}:{PASSWORD}@127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match="before a study starts") as caught:
        Tracker(uri, made.folder, record)
    sent = [read_trial(trial, True) for trial in made.folder.trial_folders()]
    assert all(contents and contents.params for contents in sent)
    printed = capfd.readouterr()
    told = [str(caught.value), printed.out, printed.err, repr(sent), repr(study_params(record))]
    (tmp_path / "told").write_text("\n".join(told))
    assert {"report.html", "trial.json", "study.json"} <= {f.name for f in tmp_path.rglob("*")}
    assert holding([tmp_path]) == []


def test_trials_are_not_handed_the_drivers_keys(planted: Mapping[str, str]) -> None:
    """By Ray's own way of making a trial's actor; without ours it holds them."""
    from ray.tune.execution.class_cache import _ActorClassCache

    class Trial:
        pass

    keep_credentials_out_of_trials()
    options = repr(_ActorClassCache().get(Trial)._default_options)
    assert "PL_DISABLE_FORK" in options, "what it hands on stands there"
    assert not [secret for secret in SECRETS if secret in options]


def test_gated_model_that_is_refused_is_told_without_the_token(
    planted: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing(401, b'{"error": "Access to this model is restricted"}') as hub:
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{hub.server_port}"
        )
        with pytest.raises(OSError, match="401") as caught:
            fetch_weights("someone/gated")
        assert f"Bearer {planted['HF_TOKEN']}" in hub.credentials, "it was used"
    assert planted["HF_TOKEN"] not in str(caught.value)


def test_bucket_that_refuses_is_told_without_the_key(
    planted: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    with refusing(403, said) as store:
        uri = f"s3://bucket/rows?endpoint_override=127.0.0.1:{store.server_port}&scheme=http"
        with pytest.raises(OSError, match="got 's3://bucket") as caught:
            load_task(TextClassificationConfig(data=f"{uri}&region=x"))
        assert planted["AWS_ACCESS_KEY_ID"] in str(store.credentials), "it was used"
    assert planted["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:planted@bucket/rows",
        "s3://AKIA:pl/anted@bucket/rows",
        "s3://AKIA:pl@nted@bucket/rows",
        "abfs://rows@account.dfs.core.windows.net/x?client_secret=planted",
        "https://bucket.s3.amazonaws.com/rows.csv?X-Amz-Signature=planted",
    ],
)
def test_data_uri_with_a_secret_is_refused_and_not_told(
    uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="must hold no password") as caught:
        load_task(TextClassificationConfig(data=uri))
    printed = capfd.readouterr()
    for told in (str(caught.value), printed.out, printed.err):
        assert "nted" not in told


@pytest.fixture
def rays_own() -> Iterator[Path]:
    """Where a Ray of the test's own writes: a short path, for sockets lie there too."""
    folder = Path(tempfile.mkdtemp(prefix="e2lora-ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long  # a whole study, a server, and a winner that is registered
def test_whole_study_leaves_no_secret_in_its_files_mlflow_rays_logs_or_output(
    tmp_path: Path, rays_own: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    port = free_port()
    with running_server(f"sqlite:///{served}/mlflow.db", port, served):
        uri = f"http://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
        places = {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(rays_own), "MLFLOW_TRACKING_URI": uri}
        command = Command(
            tmp_path,
            *("--space", "tests.small", "--study", "small", "--trials", "3"),
            *("--register", "winner"),
            script="search.py",
            environment=places | PLANTED | {"HOME": os.environ["HOME"]},
        )
        assert command.wait(600) == 0, command.said()
    said = command.said()
    assert f"http://{USER}:***@127.0.0.1:{port}" in said
    assert "registered   models:/winner/1" in said
    assert len(list((tmp_path / "results" / "small" / "trials").iterdir())) == 3
    assert list(rays_own.rglob("gcs_server.out")), "Ray's logs are looked at"
    assert list((served).rglob("MLmodel")), "and so are models"
    assert holding([tmp_path, rays_own]) == []
