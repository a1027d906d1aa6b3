"""A Ray cluster of several nodes on this machine, started as an operator starts them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RAY = (sys.executable, "-m", "ray.scripts.scripts")


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as opened:
        opened.bind((address, 0))
        return opened.getsockname()[1]


def wait_until(happened: Callable[[], Any], timeout: float, what: str) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.1)
    return found


def end(process: subprocess.Popen[Any]) -> None:
    """With all that it started."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()


class SeveralNodes:
    """A head without CPUs for training, and nodes of one CPU each.

    Args:
        folder: for the logs of what is started.
        environment: what processes of the cluster see beside the user's own.
        address: of the head.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str] | None = None, address: str = "127.0.0.1"
    ) -> None:
        self.folder, self.address = folder, address
        self.port, self.dashboard = free_port(address), free_port(address)
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.environment = {**own, "RAY_AUTH_MODE": "disabled", **(environment or {})}
        self.nodes: dict[str, subprocess.Popen[Any]] = {}
        self._places: list[str] = []
        self._log = (folder / "nodes.txt").open("a")
        self.head = self._start(
            "--head",
            "--num-cpus=0",
            f"--node-ip-address={address}",
            f"--port={self.port}",
            f"--dashboard-host={address}",
            f"--dashboard-port={self.dashboard}",
            f"--dashboard-agent-listen-port={free_port(address)}",
        )
        wait_until(self._answers, 90, "the head answers")

    def __enter__(self) -> SeveralNodes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in [*self.nodes.values(), self.head]:
            end(process)
        for place in self._places:
            shutil.rmtree(place, ignore_errors=True)
        self._log.close()

    def add(self, address: str, prefix: tuple[str, ...] = (), num_cpus: int = 1) -> None:
        """A node of so many CPUs.

        Args:
            prefix: what starts it elsewhere, as in a network of its own.
        """
        self.nodes[address] = self._start(
            f"--address={self.address}:{self.port}",
            f"--num-cpus={num_cpus}",
            f"--node-ip-address={address}",
            f"--dashboard-agent-listen-port={free_port()}",
            prefix=prefix,
        )

    def kill(self, address: str) -> None:
        """All processes of a node at once, as when its power goes."""
        end(self.nodes.pop(address))

    def command(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, as ``job submit``; for commands that end by themselves."""
        return subprocess.run(
            [*RAY, *command],
            env=self.client_environment(**extra),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def submit(self, job: Path, *command: str, name: str, **extra: str) -> subprocess.Popen[Any]:
        """`ray job submit --working-dir`, followed to its end; what it prints is in NAME.txt."""
        return subprocess.Popen(
            [
                *RAY,
                *("job", "submit", "--submission-id", name, "--working-dir", str(job), "--"),
                *(sys.executable, *command),
            ],
            env=self.client_environment(**extra),
            cwd=self.folder,
            stdout=(self.folder / f"{name}.txt").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def client_environment(self, **extra: str) -> dict[str, str]:
        """Of programs that talk to this cluster."""
        return {
            **self.environment,
            "RAY_ADDRESS": f"{self.address}:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://{self.address}:{self.dashboard}",
            **extra,
        }

    def _start(self, *options: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[Any]:
        # each its own: a node that starts empties the place where jobs' packages are unpacked
        place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, for the sockets in it
        self._places.append(place)
        return subprocess.Popen(
            [
                *(*prefix, *RAY, "start", "--block", "--disable-usage-stats"),
                *(f"--temp-dir={place}", *options),
            ],
            env=self.environment,
            cwd=self.folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _answers(self) -> bool:
        assert self.head.poll() is None, (self.folder / "nodes.txt").read_text()[-3000:]
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.dashboard)) == 0


class OwnNetwork:
    """A network namespace with one cable to this machine, which can be cut.

    Raises:
        OSError, subprocess.CalledProcessError: only root may make one, by the program ``ip``.
    """

    HERE, BESIDE, THERE = "10.77.0.1", "10.77.0.3", "10.77.0.2"
    """Addresses: of this machine, another of it, and in the namespace."""

    def __init__(self) -> None:
        key = f"{os.getpid() % 10000}"
        self._name, self._near, self._far = f"e2lora-{key}", f"e2n{key}", f"e2f{key}"
        self._ip("netns", "add", self._name)
        self._ip("link", "add", self._near, "type", "veth", "peer", "name", self._far)
        self._ip("link", "set", self._far, "netns", self._name)
        for address in (self.HERE, self.BESIDE):
            self._ip("address", "add", f"{address}/24", "dev", self._near)
        self._ip("link", "set", self._near, "up")
        self._ip("-n", self._name, "address", "add", f"{self.THERE}/24", "dev", self._far)
        self._ip("-n", self._name, "link", "set", "lo", "up")
        self._ip("-n", self._name, "link", "set", self._far, "up")

    @property
    def here(self) -> tuple[str, ...]:
        """What starts a program that talks to the namespace."""
        return ("env", f"GLOO_SOCKET_IFNAME={self._near}")

    @property
    def there(self) -> tuple[str, ...]:
        """What starts a program in the namespace."""
        inside = ("ip", "netns", "exec", self._name)
        return (*inside, "env", f"GLOO_SOCKET_IFNAME={self._far}")

    def cut(self) -> None:
        self._ip("link", "set", self._near, "down")

    def mend(self) -> None:
        self._ip("link", "set", self._near, "up")

    def close(self) -> None:
        self._ip("link", "delete", self._near)
        self._ip("netns", "delete", self._name)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)


def job_folder(folder: Path, space: Path) -> Path:
    """A checkout as a user's: the project, and a space of one's own as ``my_space``."""
    for room in ("e2lora", "jobs", "search_spaces"):
        shutil.copytree(
            ROOT / room,
            folder / room,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    shutil.copy(space, folder / "my_space.py")
    return folder


def processes_with(word: str) -> list[psutil.Process]:
    """Those of this machine whose command line has a word."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(word in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_9(process: int | psutil.Process) -> None:
    os.kill(process if isinstance(process, int) else process.pid, signal.SIGKILL)
