"""Resident worker groups: long-lived Ray Train runs that serve jobs one after another.

The pool lives in the driver. It runs the broker as an actor on the head node, starts as many
groups of a kind as the cluster holds while jobs of that kind wait, and retires idle groups when
only another kind is wanted, so no kind is ever held while waiting for another.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2lora.broker import Attempt, Broker, Job, Running, Update
from e2lora.cluster import HEAD, slots
from e2lora.config import GroupSpec

WAIT_SECONDS = 5.0
PATIENCE_IN_CLOSING = 30.0  # seconds for workers that are in the middle of something


class BrokerActor:
    """:class:`e2lora.broker.Broker` as an asyncio actor: waiting calls don't block others."""

    def __init__(self, lease_seconds: float) -> None:
        self._broker = Broker(lease_seconds)

    async def next_attempt(
        self, group: str, incarnation: int, spec: GroupSpec
    ) -> Attempt | str | None:
        return await self._first(lambda: self._broker.next_attempt(group, incarnation, spec))

    async def wait(self, key: str, seen: int) -> tuple[int, Update] | None:
        """What is new about a job since version ``seen``; None if nothing came in a while."""
        return await self._first(lambda: self._broker.update(key, seen))

    @staticmethod
    async def _first(poll: Any) -> Any:
        until = time.monotonic() + WAIT_SECONDS
        while (found := poll()) is None and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return found

    async def submit(self, job: Job) -> None:
        self._broker.submit(job)

    async def progress(self) -> dict[str, Running]:
        return self._broker.progress()

    async def join(self, group: str) -> int:
        return self._broker.join(group)

    async def alive(
        self,
        token: str,
        step: int | None = None,
        measured: dict[str, float] | None = None,
        doing: str | None = None,
    ) -> bool:
        return self._broker.alive(token, step, measured, doing)

    async def report(
        self,
        token: str,
        evaluation: dict[str, Any],
        outcomes: dict[str, list[float]],
        history: dict[str, list[float]],
    ) -> bool:
        return self._broker.report(token, evaluation, outcomes, history)

    async def complete(self, token: str, result: dict[str, Any]) -> bool:
        return self._broker.complete(token, result)

    async def fail(self, token: str, error: str) -> bool:
        return self._broker.fail(token, error)

    async def lose(self, token: str, why: str) -> bool:
        return self._broker.lose(token, why)

    async def demand(self) -> tuple[dict[GroupSpec, int], set[str], dict[str, float]]:
        """Jobs waiting by kind, the groups at work, and for how long each was silent."""
        return self._broker.demand(), self._broker.busy_groups(), self._broker.silences()

    async def close(self) -> None:
        self._broker.close()

    async def retire(self, group: str) -> None:
        self._broker.retire(group)


class JobFailed(RuntimeError):
    """A job ended in an error of its own."""


@dataclass
class _Group:
    spec: GroupSpec
    thread: threading.Thread
    started: float
    retiring: bool = False


class Pool:
    """A context manager: groups are started on demand inside it and ended when it closes.

    Args:
        name: of the study; part of the broker's name, so that studies don't meet.
        storage: a folder that all nodes share; Ray Train's own files go below it.
        isolated: every job gets a fresh group.
        lease_seconds: an attempt without a sign of life for so long is lost.
        start_seconds: when no group has come up for so long, that is an error and not a wait.
    """

    def __init__(
        self,
        name: str,
        storage: Path,
        isolated: bool = False,
        lease_seconds: float = 600.0,
        start_seconds: float = 300.0,
    ) -> None:
        import ray

        self.broker_name = f"e2lora-broker-{name}-{uuid.uuid4().hex[:6]}"
        self._storage, self._isolated = storage, isolated
        self._lease_seconds, self._start_seconds = lease_seconds, start_seconds
        actor: Any = ray.remote(BrokerActor)
        self.broker: Any = actor.options(
            name=self.broker_name, num_cpus=0, resources=HEAD, max_concurrency=1000
        ).remote(lease_seconds)
        self._groups: dict[str, _Group] = {}  # of the manager's thread, until that has ended
        self._started = 0
        self._wanted_early: queue.SimpleQueue[GroupSpec] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._manager = threading.Thread(target=self._manage, daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> Pool:
        self._manager.start()
        return self

    def __exit__(self, *exc: object) -> None:
        import ray

        if exc[0] is KeyboardInterrupt:
            print(
                f"stopping the workers: {PATIENCE_IN_CLOSING:.0f} s at most, Ctrl-C again: at once",
                file=sys.stderr,
                flush=True,
            )
        self._closing.set()
        self._manager.join()
        with suppress(ray.exceptions.RayActorError):  # a dead broker isn't what is told
            ray.get(self.broker.close.remote())
        deadline = time.monotonic() + (PATIENCE_IN_CLOSING if self.error is None else 0.0)
        for group in self._groups.values():
            group.thread.join(max(0.0, deadline - time.monotonic()))
        ray.kill(self.broker)

    def warm(self, spec: GroupSpec, num_groups: int) -> None:
        """Start so many groups of a kind at once, ahead of their jobs."""
        for _ in range(num_groups):
            self._wanted_early.put(spec)

    def run(self, job: Job) -> dict[str, Any]:
        """Submit one job and wait for its result.

        Raises:
            JobFailed: with the job's error.
            RuntimeError: no group can serve it.
        """
        *_, last = self.updates(job)
        if last.error is not None:
            raise JobFailed(last.error)
        return last.result or {}

    def updates(self, job: Job) -> Iterator[Update]:
        """Submit one job and follow it; the last update is the one that has ended.

        Raises:
            RuntimeError: no group can serve it.
        """
        import ray

        ray.get(self.broker.submit.remote(job))
        seen = 0
        while True:
            news = ray.get(self.broker.wait.remote(job.key, seen))
            if news is None:
                self.require_healthy()
                continue
            seen, update = news
            yield update
            if update.ended:
                return

    def progress(self) -> dict[str, Running]:
        """Running jobs by their keys; none while the broker doesn't answer."""
        import ray

        try:
            running: dict[str, Running] = ray.get(self.broker.progress.remote())
        except ray.exceptions.RayError:
            return {}  # `require_healthy` says what is wrong
        return running

    def require_healthy(self) -> None:
        """Raise what keeps jobs from being served, if anything does."""
        if self.error is not None:
            raise RuntimeError(f"worker groups can't serve trials: {self.error}") from self.error

    def _manage(self) -> None:
        import ray

        try:
            while not self._closing.wait(0.25):
                while not self._wanted_early.empty():
                    self._start(self._wanted_early.get())
                demand, busy, silences = ray.get(self.broker.demand.remote())
                self._groups = {n: g for n, g in self._groups.items() if g.thread.is_alive()}
                self._require_some_awake(busy, silences)
                for spec, waiting in demand.items():
                    self._serve_demand(spec, waiting, set(demand), busy)
        except BaseException as error:
            if not self._closing.is_set():
                self.error = error

    def _require_some_awake(self, busy: set[str], silences: dict[str, float]) -> None:
        now = time.monotonic()
        awake = [
            name
            for name, group in self._groups.items()
            if name in busy or silences.get(name, now - group.started) < self._start_seconds
        ]
        if self._groups and not awake:
            raise TimeoutError(
                f"a worker group must come up within {self._start_seconds:.0f} s; none of "
                f"{len(self._groups)} did. Either something else holds the cluster's resources "
                "(`ray status`), or their processes end while they start (logs under "
                "/tmp/ray/session_latest/logs; every node needs this package and what it needs)."
            )

    def _serve_demand(
        self, spec: GroupSpec, waiting: int, wanted: set[GroupSpec], busy: set[str]
    ) -> None:
        """Start groups for waiting jobs; make room by retiring idle groups nobody waits for."""
        import ray

        of_spec = [name for name, g in self._groups.items() if g.spec == spec and not g.retiring]
        idle = [name for name in of_spec if name not in busy]
        others = [g for g in self._groups.values() if g.spec != spec or g.retiring]
        if len(idle) >= waiting:
            return
        if not others:
            if len(of_spec) < slots(spec):
                self._start(spec)
            return
        for name, group in self._groups.items():
            if group.spec not in wanted and name not in busy and not group.retiring:
                group.retiring = True
                ray.get(self.broker.retire.remote(name))

    def _start(self, spec: GroupSpec) -> None:
        self._started += 1
        name = f"group-{self._started:03d}"
        thread = threading.Thread(target=self._fit, args=(name, spec), daemon=True)
        self._groups[name] = _Group(spec, thread, time.monotonic())
        thread.start()

    def _fit(self, name: str, spec: GroupSpec) -> None:
        """One Ray Train run; it restarts without limit, since failures are counted per job."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        few, many = spec.min_workers, spec.num_workers
        num_workers: Any = many if few is None else (few, many)
        resources = {"CPU": spec.cpus_per_worker}
        if spec.gpus_per_worker:
            resources["GPU"] = spec.gpus_per_worker
        trainer = TorchTrainer(
            _group_loop,
            train_loop_config={
                "broker": self.broker_name,
                "name": name,
                "spec": spec.model_dump(),
                "max_jobs": 1 if self._isolated else None,
                "lease_seconds": self._lease_seconds,
            },
            torch_config=TorchConfig(backend="nccl" if spec.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=spec.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=f"{self.broker_name}-{name}",
                storage_path=str(self._storage),
                failure_config=FailureConfig(max_failures=-1),
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            if not self._closing.is_set():
                self.error = error


def _group_loop(config: dict[str, Any]) -> None:
    """The training function of every worker of a group."""
    import ray

    from e2lora.worker import serve

    try:
        broker = ray.get_actor(config["broker"])
    except ValueError:  # the pool closed before this group came up
        return
    spec = GroupSpec(**config["spec"])
    serve(broker, config["name"], spec, config["max_jobs"], config["lease_seconds"], _is_preempted)


def _is_preempted() -> bool:
    """Whether a node of this group is about to be taken away. Collective."""
    from ray.train import get_preemption_info

    return get_preemption_info() is not None
