"""A hub on this machine: it answers as Hugging Face's does, counts, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
FILE_PATH = re.compile(rf"/(?P<data>datasets/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
INFO_PATH = re.compile(
    rf"/api/(?P<kind>models|datasets)/{NAME}?(?:/(?P<what>revision|tree|paths-info)"
    r"/(?P<revision>[^/]+)(?:/(?P<below>.*))?)?"
)


@dataclass
class Repository:
    """A model or data set: every state it had, newest last, and whom it is given to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha → file → content
    token: str | None = None  # None: it is open to all

    def commit(self, revision: str) -> str | None:
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


class Hub:
    """What a test puts in it is served under ``url`` while :meth:`up`.

    Attributes:
        asked: how often each path was asked for, with the method: ``"HEAD /a/b/resolve/…"``.
        sent: bytes of each file's content that were sent, by ``"a/b/config.json"``.
        status: every request is answered with it; None: as it should be.
        wait: seconds before each answer.
        credentials: every ``Authorization`` that was received.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.status: int | None = None
        self.wait = 0.0
        self.wait_for_content = 0.0
        self.credentials: set[str] = set()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        if self._server is None:
            self._server = _Server(("127.0.0.1", self._port), _handler(self))
            self._port = self._server.server_port
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Connections are refused from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def push(self, kind: str, name: str, files: Path | Mapping[str, bytes]) -> str:
        """Add a commit of a ``models`` or ``datasets`` repository; it becomes ``main``."""
        if isinstance(files, Path):
            files = {
                str(file.relative_to(files)): file.read_bytes()
                for file in sorted(files.rglob("*"))
                if file.is_file()
            }
        repository = self.repositories.setdefault((kind, name), Repository())
        digest = hashlib.sha1(f"{name} {len(repository.commits)}".encode())
        for file, content in files.items():
            digest.update(file.encode() + content)
        repository.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def forget_counts(self) -> None:
        self.asked.clear()
        self.sent.clear()


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.down()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no concern of the test's."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        do_GET = do_POST = do_HEAD

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked[f"{self.command} {path}"] += 1
            if "Authorization" in self.headers:
                hub.credentials.add(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(hub.wait)
            if hub.status is not None:
                self.refuse(hub.status, "", "made to fail")
            elif match := INFO_PATH.fullmatch(path):
                self.answer_info(match, body)
            elif match := FILE_PATH.fullmatch(path):
                self.answer_file(match)
            else:
                self.refuse(404, "", "no such page")

        def found(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """The commit and its files; None: it was refused, as the hub does that."""
            repository = hub.repositories.get((kind, name))
            shown = self.headers.get("Authorization")
            commit = repository and repository.commit(revision)
            if repository is None:  # nor is it told to strangers which private ones there are
                self.refuse(401, "RepoNotFound", "Repository not found")
            elif repository.token is not None and shown is None:
                self.refuse(401, "GatedRepo", f"Access to {name} is restricted. Log in.")
            elif repository.token is not None and shown != f"Bearer {repository.token}":
                self.refuse(403, "GatedRepo", f"Access to {name} is restricted: not on the list.")
            elif not isinstance(commit, str):
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return commit, repository.commits[commit]
            return None

        def answer_file(self, match: re.Match[str]) -> None:
            kind = "datasets" if match["data"] else "models"
            found = self.found(kind, match["name"], match["revision"])
            if found is None:
                return
            commit, files = found
            headers = {"X-Repo-Commit": commit}
            content = files.get(match["file"])
            if content is None:
                self.refuse(404, "EntryNotFound", "Entry not found", headers)
                return
            etag = hashlib.sha256(content).hexdigest()
            headers |= {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"'}
            headers |= {"X-Linked-Size": str(len(content)), "Accept-Ranges": "none"}
            if self.command == "GET":
                time.sleep(hub.wait_for_content)
                hub.sent[f"{match['name']}/{match['file']}"] += len(content)
            self.send(200, content, "application/octet-stream", headers)

        def answer_info(self, match: re.Match[str], body: bytes) -> None:
            revision = match["revision"] or "main"
            # the metadata of gated repositories is open to all
            repository = hub.repositories.get((match["kind"], match["name"]))
            commit = repository and repository.commit(revision)
            if repository is None or not isinstance(commit, str):
                self.found(match["kind"], match["name"], revision)
                return
            files = repository.commits[commit]
            if match["what"] == "tree":
                below = f"{match['below']}/" if match["below"] else ""
                entries = [_entry(name, files) for name in files if name.startswith(below)]
                if below and not entries:
                    self.refuse(404, "EntryNotFound", f"{match['below']} does not exist")
                else:
                    self.send_json(entries)
            elif match["what"] == "paths-info":
                wanted = json.loads(body)["paths"]
                self.send_json([_entry(name, files) for name in wanted if name in files])
            else:
                gated = "manual" if repository.token is not None else False
                self.send_json(
                    {
                        "id": match["name"],
                        "sha": commit,
                        "siblings": [{"rfilename": name} for name in files],
                        "tags": [],
                        "private": False,
                        "gated": gated,
                        "disabled": False,
                    }
                )

        def refuse(
            self, status: int, code: str, said: str, headers: Mapping[str, str] | None = None
        ) -> None:
            told = {"X-Error-Code": code, "X-Error-Message": said} if code else {}
            body = json.dumps({"error": said}).encode()
            self.send(status, body, "application/json", {**(headers or {}), **told})

        def send_json(self, answer: Any) -> None:
            self.send(200, json.dumps(answer).encode(), "application/json", {})

        def send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _entry(name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    content = files[name]
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
    return {"type": "file", "path": name, "size": len(content), "oid": blob}
