"""One training over two Ray nodes: two raylets on this machine, of one CPU each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from e2lora.records import TrialFolder
from tests.commands import Command

pytestmark = pytest.mark.long

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@dataclass
class Nodes:
    """A Ray of one node per loopback address, which can be taken away by their processes."""

    folder: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_ADDRESS": f"127.0.0.1:{self.port}", "RAY_AUTH_MODE": "disabled"}

    def start(self, address: str, *options: str) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        with (self.folder / f"{address}.log").open("a") as log:
            self.processes[address] = subprocess.Popen(
                [
                    *(*RAY, "start", "--block", "--num-cpus=1", f"--node-ip-address={address}"),
                    *options,
                ],
                env={**own, "RAY_AUTH_MODE": "disabled"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def join(self, address: str) -> None:
        self.start(address, f"--address=127.0.0.1:{self.port}")

    def kill(self, address: str) -> None:
        """As a machine that loses its power: every process of the node at once."""
        process = self.processes.pop(address)
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()

    def wait_for(self, num: int, timeout: float = 90) -> None:
        """Until so many nodes are alive."""
        code = "import ray; ray.init('auto'); print(sum(n['Alive'] for n in ray.nodes()))"
        deadline = time.monotonic() + timeout
        said = ""
        while not said.endswith(str(num)):
            assert time.monotonic() < deadline, said
            asked = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
            )
            said = asked.stdout.strip() or asked.stderr
            time.sleep(0.5)


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """One of them."""
    port, dashboard, agent = free_ports(3)
    nodes = Nodes(tmp_path_factory.mktemp("ray"), port)
    try:
        nodes.start(
            "127.0.0.1",
            *("--head", f"--port={port}", "--include-dashboard=false"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        )
        nodes.wait_for(1)
        yield nodes
    finally:
        for address in list(nodes.processes):
            nodes.kill(address)


@pytest.fixture
def nodes(head: Nodes) -> Nodes:
    """Two of them."""
    head.join("127.0.0.2")
    head.wait_for(2)
    return head


def train(
    place: Path, name: str, *words: str, nodes: Nodes | None = None, max_steps: int = 60
) -> Command:
    """A run of so many steps; without nodes on a Ray of its own."""
    sets = ("topology=all", "r=2", f"training.max_steps={max_steps}", "training.eval_every=10")
    return Command(
        place,
        *("--space", "tests.small", "--name", name, *words, "--set", *sets),
        environment=nodes.environment if nodes else None,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one worker that nobody disturbed."""
    place = tmp_path_factory.mktemp("plain")
    command = train(place, "run")
    assert command.wait() == 0, command.said()
    return TrialFolder(place / "results" / "run").steps()["loss"]


def num_workers(folder: TrialFolder) -> list[int]:
    """At each step."""
    steps = folder.steps()
    rates = zip(steps["tokens_per_second"], steps["tokens_per_second_per_worker"], strict=True)
    return [round(whole / own) for whole, own in rates]


def test_elastic_run_goes_on_with_one_worker_when_a_node_is_lost(
    plain: list[float], nodes: Nodes, tmp_path: Path
) -> None:
    command = train(tmp_path, "run", "--workers", "1:2", nodes=nodes)
    folder = TrialFolder(tmp_path / "results" / "run")
    command.wait_until(lambda: len(folder.evaluations()) >= 2)
    nodes.kill("127.0.0.2")
    assert command.wait(400) == 0, command.said()
    workers = num_workers(folder)
    assert workers == sorted(workers, reverse=True)
    assert (workers[0], workers[-1]) == (2, 1)
    assert folder.steps()["loss"] == pytest.approx(plain, abs=1e-5)


def test_elastic_run_takes_up_a_node_that_comes(head: Nodes, tmp_path: Path) -> None:
    endless = ("--set", "training.schedule=constant", "training.save_total_limit=2")
    command = train(tmp_path, "run", "--workers", "1:2", *endless, nodes=head, max_steps=10**6)
    folder = TrialFolder(tmp_path / "results" / "run")
    command.wait_until(lambda: len(folder.evaluations()) >= 2)
    head.join("127.0.0.2")
    command.wait_until(lambda: num_workers(folder)[-1] == 2, timeout=400)
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.said()
    assert "the same command goes on" in command.said()
    workers = num_workers(folder)
    assert workers == sorted(workers)


def test_two_nodes_train_one_model_under_zero_3(
    plain: list[float], nodes: Nodes, tmp_path: Path
) -> None:
    partitioned = "training.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    words = ("--workers", "2", "--set", "training.zero_stage=3", partitioned)
    command = train(tmp_path, "run", *words, nodes=nodes)
    assert command.wait(400) == 0, command.said()
    folder = TrialFolder(tmp_path / "results" / "run")
    assert set(num_workers(folder)) == {2}
    assert folder.steps()["loss"] == pytest.approx(plain, abs=1e-5)
