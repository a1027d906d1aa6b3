"""Who may talk to MLflow and to Ray, and what those are told that may not."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from e2lora.tracking import Tracker
from tests.conftest import needs_package
from tests.test_tracking import (
    COMPLETE,
    end_trial,
    free_port,
    make_study,
    read_runs,
    write_trial,
)

USER, PASSWORD = "alice", "planted-9f3c-password"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
NOT_AUTHENTICATED = b"You are not authenticated. Please see https://www.mlflow.org/docs."


class Refusing(ThreadingHTTPServer):
    """A server that answers everything with one refusal, and keeps what credentials it was sent."""

    def __init__(self, status: int, said: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Refuse)
        self.status, self.said = status, said
        self.credentials: list[str | None] = []


class _Refuse(BaseHTTPRequestHandler):
    server: Refusing

    def do_GET(self) -> None:
        self.server.credentials.append(self.headers.get("Authorization"))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.server.said)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def refusing(status: int, said: bytes) -> Iterator[Refusing]:
    server = Refusing(status, said)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_credentials_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the environment nor in the home folder; what is set later is undone too."""
    for name in ("USERNAME", "PASSWORD", "TOKEN", "URI"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (401, NOT_AUTHENTICATED, "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, b"Invalid Host header - possible DNS rebinding", "--allowed-hosts"),
        (403, b"Permission denied", "permission EDIT"),
    ],
    ids=["no-credentials", "unknown-host", "no-permission"],
)
def test_refusal_is_told_at_once_with_its_own_remedy(
    status: int, said: bytes, remedy: str, tmp_path: Path
) -> None:
    folder, record = make_study(tmp_path)
    with refusing(status, said) as server:
        started = time.monotonic()
        with pytest.raises(ValueError, match="before a study starts") as caught:
            Tracker(f"http://127.0.0.1:{server.server_port}", folder, record)
        assert len(server.credentials) == 1, "what is refused isn't tried again"
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert said.decode() in message
    assert remedy in message
    assert "Start that server" not in message, "it runs"


def test_credentials_come_from_environment_file_or_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, record = make_study(tmp_path)
    messages = []

    def ask(server: Refusing, before_host: str = "") -> None:
        with pytest.raises(ValueError, match="error code 401") as caught:
            Tracker(f"http://{before_host}127.0.0.1:{server.server_port}", folder, record)
        messages.append(str(caught.value))

    with refusing(401, NOT_AUTHENTICATED) as server:
        ask(server)
        ask(server, f"{USER}:{PASSWORD}@")
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
            ask(server)
        file = tmp_path / "home" / ".mlflow" / "credentials"
        file.parent.mkdir(parents=True)
        file.write_text(
            f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {PASSWORD}\n"
        )
        ask(server)
        basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        assert server.credentials == [None, *[f"Basic {basic}"] * 3]
    printed = capfd.readouterr()
    assert PASSWORD not in "".join([*messages, printed.out, printed.err])


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:pl@nted@127.0.0.1:9",
        "http://me:pl/nted@127.0.0.1:9",
        "postgresql://me:pl@nted/x@host/runs",
        "postgresql://me@host/runs?password=planted",
        "mysql+nodriver://me@host/runs?charset=utf8&passwd=planted",
    ],
)
def test_no_part_of_a_password_is_told_however_it_is_written(uri: str, tmp_path: Path) -> None:
    """Programs cut such a URI at different places, and tell the rest of the password as a host."""
    folder, record = make_study(tmp_path)
    with pytest.raises(ValueError, match="before a study starts") as caught:
        Tracker(uri, folder, record)
    assert "nted" not in str(caught.value)
    assert "***" in str(caught.value), "that there was one is told"


@contextmanager
def guarded_server(folder: Path, port: int) -> Iterator[str]:
    """`mlflow server` that knows one user and one host; no password is on its command line."""
    rules = folder / "auth.ini"
    rules.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/users.db\n"
        f"admin_username = {USER}\n"
    )
    secrets = {
        "MLFLOW_AUTH_CONFIG_PATH": str(rules),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "planted-of-the-sessions",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", f"127.0.0.1:{port}"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | secrets
        )
    try:
        wait_until_it_answers(port, server, folder / "server.log", "/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_it_answers(
    port: int, server: subprocess.Popen[bytes], log: Path, path: str, seconds: float = 300
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2):
                return
        except OSError:
            time.sleep(0.2)


@contextmanager
def acting_as(user: str, password: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield


@pytest.mark.long  # the server takes 10 s to start
def test_server_with_users_and_hosts_serves_those_it_knows_and_no_others(tmp_path: Path) -> None:
    from mlflow.server import get_app_client

    needs_package("flask_wtf", "dev")
    folder, record = make_study(tmp_path)
    end_trial(write_trial(folder, 0, (0.5, 0.75)), COMPLETE)
    port = free_port()
    with guarded_server(tmp_path, port) as uri:
        for stranger in (uri, f"http://{USER}:wrong@127.0.0.1:{port}"):
            with pytest.raises(ValueError, match=r"401.*Set MLFLOW_TRACKING_USERNAME"):
                Tracker(stranger, folder, record)
        with acting_as(USER, PASSWORD):
            with pytest.raises(ValueError, match=r"403.*Invalid Host header.*--allowed-hosts"):
                Tracker(f"http://localhost:{port}", folder, record)
            tracker = Tracker(uri, folder, record)
            tracker.mirror_all()
            tracker.finish([], "FINISHED")
            runs = read_runs(tracker)
            get_app_client("basic-auth", uri).create_user("bob", "planted-of-bob")
        assert runs["quick"]["status"] == runs["00000 blocks(2) r=4"]["status"] == "FINISHED"
        assert PASSWORD not in tracker.describe()

        another = make_study(tmp_path / "of-bob", "another")
        with (
            acting_as("bob", "planted-of-bob"),
            pytest.raises(ValueError, match=r"403.*permission EDIT for the experiment e2lora"),
        ):
            Tracker(uri, *another)
        with acting_as(USER, PASSWORD):
            get_app_client("basic-auth", uri).grant_user_permission(
                "bob", "experiment", tracker.experiment_id, "EDIT"
            )
        with acting_as("bob", "planted-of-bob"):
            Tracker(uri, *another)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert (tmp_path / "users.db") in files
    assert not [file for file in files if b"planted" in file.read_bytes()]


LISTENING = """
import json, psutil
from e2lora.cluster import connect

connect()
import ray
ray.get(ray.remote(lambda: 0).remote())
ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [c for process in ours for c in process.net_connections("inet")]
print("FOUND", json.dumps([c.laddr for c in sockets if c.status == "LISTEN"]))
"""


@pytest.mark.long  # a Ray is started
def test_ray_that_a_command_starts_listens_on_loopback_only(tmp_path: Path) -> None:
    """In a process of its own: what decides it is read when Ray is imported."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    places = json.loads(line.removeprefix("FOUND"))
    assert len(places) >= 4, "GCS, dashboard, raylet and workers"
    assert {ip.removeprefix("::ffff:") for ip, _ in places} <= {"127.0.0.1", "::1"}


@contextmanager
def guarded_ray(home: Path, port: int, dashboard: int, agent: int) -> Iterator[dict[str, str]]:
    """A head that asks for the token in ``home``; the environment of one who has it."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    own |= {"HOME": str(home), "RAY_TMPDIR": str(home), "RAY_AUTH_MODE": "token"}
    subprocess.run([*RAY, "get-auth-token", "--generate"], env=own, check=True, capture_output=True)
    given = own | {"GIVEN_TO_THE_HEAD": "and to its jobs"}
    command = [*RAY, "start", "--head", "--block", "--num-cpus=1", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    log = home / "head.log"
    with log.open("wb") as out:
        head = subprocess.Popen(
            command, env=given, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_it_answers(dashboard, head, log, "/api/gcs_healthz")
        yield own | {
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait()


@pytest.mark.long  # a head takes 20 s to start, a job as long
def test_job_is_refused_without_the_token_and_runs_with_it(tmp_path: Path) -> None:
    """The same that a study is submitted by; the token gets nowhere but where it is needed."""
    home = Path(tempfile.mkdtemp(prefix="e2lora-ray-"))  # sockets lie there: a short path
    other = tmp_path / "other"
    other.mkdir()
    script = (
        "import os, ray; ray.init(log_to_driver=False); "
        "print(os.environ['GIVEN_TO_THE_HEAD'], ray.cluster_resources())"
    )
    command = [*RAY, "job", "submit", "--", sys.executable, "-c", script]
    ports = [free_port() for _ in range(3)]

    def submit(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    try:
        with guarded_ray(home, *ports) as environment:
            for path, status in (("/api/jobs/", 401), ("/api/cluster_status", 401), ("/", 200)):
                assert status_of(ports[1], path) == status, path
            assert status_of(ports[1], "/api/jobs/", "wrong") == 403
            stranger = {k: v for k, v in environment.items() if k != "RAY_AUTH_MODE"}
            without = submit(stranger | {"HOME": str(other)})
            assert without.returncode != 0
            assert "Missing authentication token" in without.stderr
            token = (home / ".ray" / "auth_token").read_text()
            assert status_of(ports[1], "/api/jobs/", token) == 200
            file = other / "mounted"
            file.write_text(f"{token}\n")  # as an editor, or a platform's secret, leaves it
            given = environment | {"HOME": str(other), "RAY_AUTH_TOKEN_PATH": str(file)}
            with_it = submit(given)
            assert with_it.returncode == 0, with_it.stderr
            assert "'CPU': 1.0" in with_it.stdout
            assert "and to its jobs" in with_it.stdout
            commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        assert token not in "".join([with_it.stdout, with_it.stderr, *commands])
        logs = [f for f in home.rglob("*") if f.is_file() and ".ray" not in f.parts]
        assert [f.name for f in logs if f.name == "gcs_server.out"]
        assert not [f for f in logs if token.encode() in f.read_bytes()]
    finally:
        shutil.rmtree(home, ignore_errors=True)


def status_of(port: int, path: str, token: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
