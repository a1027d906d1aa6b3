"""Resident worker groups: long-lived Ray Train runs that serve jobs one after another.

The pool lives in the driver. It runs the broker as an actor on the head node, starts and ends
groups as `e2lora.fleet` decides from the nodes that are there and the jobs that wait, and tells an
autoscaler what more there is work for.
"""

from __future__ import annotations

import gc
import math
import queue
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2lora.broker import Job, Running, Update
from e2lora.broker_actor import BrokerActor
from e2lora.cluster import HEAD, Wanted, free_nodes, nodes, slots
from e2lora.config import GroupSpec
from e2lora.fleet import Held, Moves, Wish, fits, next_moves, smallest
from e2lora.utilisation import Utilisation

LOOK_SECONDS = 0.25  # between looks at what waits and what is there
SILENT_SECONDS = 60.0  # after so long a group counts as one that has to come up again
PATIENCE_IN_CLOSING = 30.0  # seconds for workers that are in the middle of something


class JobFailed(RuntimeError):
    """A job ended in an error of its own."""


@dataclass
class _Group:
    spec: GroupSpec
    thread: threading.Thread
    since: float  # it has had nothing to do, or was started
    up_since: float | None = None
    retiring: bool = False
    given_up: bool = False


class Pool:
    """A context manager: groups are started on demand inside it and ended when it closes.

    Args:
        name: of the study; part of the broker's name, so that studies don't meet.
        storage: a folder that all nodes share; Ray Train's own files go below it.
        isolated: every job gets a fresh group.
        lease_seconds: an attempt without a sign of life for so long is lost.
        start_seconds: when no group has come up for so long though there is room, that is an error
            and not a wait; what others hold is waited for, and told.
        node_seconds: … and when there are no nodes for what waits, and nothing else to do.
    """

    def __init__(
        self,
        name: str,
        storage: Path,
        isolated: bool = False,
        lease_seconds: float = 600.0,
        start_seconds: float = 300.0,
        node_seconds: float = 900.0,
    ) -> None:
        import ray

        self.broker_name = f"e2lora-broker-{name}-{uuid.uuid4().hex[:6]}"
        self._storage, self._isolated = storage, isolated
        self._lease_seconds, self._start_seconds = lease_seconds, start_seconds
        self._node_seconds = node_seconds
        actor: Any = ray.remote(BrokerActor)
        self.broker: Any = actor.options(
            name=self.broker_name, num_cpus=0, resources=HEAD, max_concurrency=1000
        ).remote(lease_seconds)
        self._groups: dict[str, _Group] = {}  # of the manager's thread, until that has ended
        self._started = 0
        self._entered = self._looked = time.monotonic()
        self._slot_seconds: dict[GroupSpec, float] = {}  # of each kind, had it all nodes to itself
        self._starting: dict[GroupSpec, float] = {}  # seconds until groups came up
        self._kind_of: dict[str, GroupSpec] = {}  # of all groups there ever were
        self._spent: dict[str, dict[str, float]] = {}
        self._hungry: dict[GroupSpec, float] = {}  # since when a kind that is wanted has no group
        self._without_nodes: dict[GroupSpec, float] = {}
        self._told_of_others = -math.inf
        self._wanted = Wanted()
        self._wanted_early: queue.SimpleQueue[tuple[GroupSpec, int]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._manager = threading.Thread(target=self._manage, daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> Pool:
        self._entered = self._looked = time.monotonic()
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
        with suppress(ray.exceptions.RayError):  # a cluster that broke isn't what is told
            self._wanted.update({})
        with suppress(ray.exceptions.RayActorError):  # a dead broker isn't what is told
            ray.get(self.broker.close.remote())
            *_, silences = ray.get(self.broker.demand.remote())
            for name in self._groups.keys() - silences.keys():  # those that never came up
                ray.get(self.broker.give_up.remote(name))
        deadline = time.monotonic() + (PATIENCE_IN_CLOSING if self.error is None else 0.0)
        for group in self._groups.values():
            group.thread.join(max(0.0, deadline - time.monotonic()))
        with suppress(ray.exceptions.RayActorError):
            self._spent = ray.get(self.broker.spent.remote())
        ray.kill(self.broker)  # without it the others end, too: see `_end_when_unwanted`

    def warm(self, spec: GroupSpec, num_groups: int) -> None:
        """Have so many groups of a kind, as far as there is room, ahead of their jobs."""
        self._wanted_early.put((spec, num_groups))

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

    def open_slots(self, kinds: Iterable[GroupSpec]) -> int:
        """How many jobs of these kinds the cluster, as it is now, can run at once at most."""
        return max((slots(kind) for kind in kinds), default=0)

    def utilisation(self, wall_seconds: float | None = None) -> Utilisation:
        """What all groups' time went into; asked once the pool has closed.

        Args:
            wall_seconds: of the run; None: since the pool was entered.
        """
        watched = max(self._looked - self._entered, 1e-9)
        slots_of = {spec: seconds / watched for spec, seconds in self._slot_seconds.items()}
        most = max(slots_of.values(), default=0.0)
        total: defaultdict[str, float] = defaultdict(float)
        for name, spent in self._spent.items():
            for part, seconds in spent.items():  # a wide group takes the place of several
                total[part] += seconds * most / slots_of[self._kind_of[name]]
        for spec, seconds in self._starting.items():
            total["starting"] += seconds * most / slots_of[spec]
        wall = time.monotonic() - self._entered if wall_seconds is None else wall_seconds
        return Utilisation(wall, most, total)

    def _manage(self) -> None:
        try:
            while not self._closing.wait(LOOK_SECONDS):
                while not self._wanted_early.empty():
                    self._start_early(*self._wanted_early.get())
                self._look()
        except BaseException as error:
            if not self._closing.is_set():
                self.error = error

    def _look(self) -> None:
        """Do what is to be done now."""
        import ray

        trouble, (demand, busy, silences) = ray.get(
            [self.broker.trouble.remote(), self.broker.demand.remote()]
        )
        if trouble:
            raise OSError(
                f"the storage must take what is written there; it doesn't: {trouble}. Make room, "
                "or mend it, and run the same command again: it goes on where it was."
            )
        self._groups = {n: g for n, g in self._groups.items() if g.thread.is_alive()}
        if not demand and not self._groups:
            self._wanted.update({})
            return
        self._require_some_awake(busy, silences)
        groups = [self._as_held(name, busy, silences) for name in self._groups]
        there, now = nodes(), time.monotonic()
        for spec in self._slot_seconds.keys() | set(self._kind_of.values()) | set(demand):
            more = slots(spec) * (
                now - (self._looked if spec in self._slot_seconds else self._entered)
            )
            self._slot_seconds[spec] = self._slot_seconds.get(spec, 0.0) + more
        self._looked = now
        served = {group.spec for group in groups if group.up and not group.retiring}
        self._hungry = {s: self._hungry.get(s, now) for s in demand if s not in served}
        wishes = {
            spec: Wish(waiting, now - self._hungry.get(spec, now))
            for spec, waiting in demand.items()
        }
        self._require_nodes([spec for spec in demand if not fits(there, [spec])], bool(busy))
        moves = next_moves(there, groups, wishes)
        self._do(moves)
        self._wanted.update(moves.lacking)

    def _as_held(self, name: str, busy: set[str], silences: dict[str, float]) -> Held:
        group, now = self._groups[name], time.monotonic()
        up = name in busy or silences.get(name, SILENT_SECONDS) < SILENT_SECONDS
        if up and group.up_since is None:
            group.up_since = now
            starting = self._starting.get(group.spec, 0.0) + now - group.since
            self._starting[group.spec] = starting
        if name in busy:
            group.since = now
            group.retiring |= self._isolated  # it ends after its job
        return Held(
            name,
            group.spec,
            up=up,
            busy=name in busy,
            retiring=group.retiring or group.given_up,
            still_seconds=now - group.since,
            up_seconds=now - (group.up_since or now),
        )

    def _do(self, moves: Moves) -> None:
        import ray

        for spec in moves.start:
            self._start(spec)
        for name in moves.retire:
            self._groups[name].retiring = True
            ray.get(self.broker.retire.remote(name))
        for name in moves.give_up:
            self._groups[name].given_up = True
            ray.get(self.broker.give_up.remote(name))

    def _require_nodes(self, kinds: list[GroupSpec], busy: bool) -> None:
        """Say what waits for nodes, and raise once that was in vain for long."""
        now = time.monotonic()
        for spec in kinds:
            if spec not in self._without_nodes:
                print(f"waiting for nodes: {_request(spec)}", file=sys.stderr, flush=True)
        self._without_nodes = {spec: self._without_nodes.get(spec, now) for spec in kinds}
        for spec, since in self._without_nodes.items():
            if now - since > self._node_seconds and not busy:
                raise TimeoutError(
                    f"a trial's workers must all fit the cluster at once; {_request(spec)}, and "
                    f"for {self._node_seconds:.0f} s its nodes have not had room for them. Add "
                    "nodes (were some lost?) and run the same command again: it goes on."
                )

    def _require_some_awake(self, busy: set[str], silences: dict[str, float]) -> None:
        now = time.monotonic()
        wanted = {name: group for name, group in self._groups.items() if not group.given_up}
        awake = [
            name
            for name, group in wanted.items()
            if name in busy or silences.get(name, now - group.since) < self._start_seconds
        ]
        if not wanted or awake:
            return
        if not any(fits(free_nodes(), [group.spec]) for group in wanted.values()):
            if now - self._told_of_others > self._start_seconds:
                self._told_of_others = now
                print(
                    f"waiting since {self._start_seconds:.0f} s or more: other studies or jobs "
                    "hold what a worker group needs (`ray status`)",
                    file=sys.stderr,
                    flush=True,
                )
            return
        raise TimeoutError(
            f"a worker group must come up within {self._start_seconds:.0f} s; none of "
            f"{len(wanted)} did, though there is room: their processes end while they start (logs "
            "under /tmp/ray/session_latest/logs; every node needs this package and what it needs)."
        )

    def _start_early(self, spec: GroupSpec, num_groups: int) -> None:
        there = [group for group in self._groups.values() if not group.retiring]
        for _ in range(num_groups - sum(group.spec == spec for group in there)):
            if fits(nodes(), [*(group.spec for group in self._groups.values()), spec]):
                self._start(spec)

    def _start(self, spec: GroupSpec) -> None:
        self._started += 1
        name = f"group-{self._started:03d}"
        thread = threading.Thread(target=self._fit, args=(name, spec), daemon=True)
        self._groups[name] = _Group(spec, thread, time.monotonic())
        self._kind_of[name] = spec
        thread.start()

    def _fit(self, name: str, spec: GroupSpec) -> None:
        """One Ray Train run; it restarts without limit, since failures are counted per job."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        few, many = spec.min_workers, spec.num_workers
        num_workers: Any = many if few is None else (few, many)
        resources = {"CPU": spec.cpus_per_worker}
        if spec.gpus_per_worker:
            resources["GPU"] = spec.gpus_per_worker
        trainer = trainer_class()(
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
                callbacks=[_tie_to_broker(self.broker_name, name)],
            ),
        )
        try:
            trainer.fit()
        except BaseException as error:
            if not self._closing.is_set() and not self._groups[name].given_up:
                self.error = error


def _request(spec: GroupSpec) -> str:
    return (
        f"one asks for {smallest(spec)} worker(s) of {spec.cpus_per_worker:g} CPU and "
        f"{spec.gpus_per_worker:g} GPU each"
    )


def trainer_class() -> type:
    """Ray's, without the helper that takes groups away whose controller it doesn't find.

    That helper asks the Ray which was started last on this machine. With a second one there, of
    another study, it finds no controller of ours, and every group dies. What it is there for is
    done by :func:`_tie_to_broker`.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class GroupTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    return GroupTrainer


def _tie_to_broker(broker_name: str, name: str) -> Any:
    """A callback of Ray Train's controller, which owns a group's workers and placement group.

    When workers die, the broker hears of it at once: new ones may have to wait until another kind
    of group makes room, which it does only for jobs that wait.

    A run that waits for resources can't be told to stop: its controller ends itself when the group
    is given up, or the broker is gone, and with it goes all that it holds or has asked for.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class TiedToBroker(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            import ray

            self.ending = threading.Event()
            me = ray.get_runtime_context().current_actor
            arguments = (broker_name, name, self.ending, me)
            threading.Thread(target=_end_when_unwanted, args=arguments, daemon=True).start()

        def on_controller_start_worker_group(self, **asked: Any) -> None:
            while self.ending.is_set():  # it asks for nothing more
                time.sleep(1.0)

        def before_controller_execute_failure_decision(self, *what: Any, **more: Any) -> None:
            threading.Thread(target=_leave, args=(broker_name, name), daemon=True).start()

    return TiedToBroker()


def _leave(broker_name: str, name: str) -> None:
    import ray

    with suppress(ValueError, ray.exceptions.RayActorError):  # there is no broker any more
        ray.get(ray.get_actor(broker_name).leave.remote(name))


def _end_when_unwanted(
    broker_name: str, name: str, ending: threading.Event, controller: Any
) -> None:
    """In the controller's process, beside its own loop."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    with suppress(ValueError, ray.exceptions.RayActorError):  # there is no broker any more
        broker: Any = ray.get_actor(broker_name)
        while True:
            with suppress(ray.exceptions.ActorUnavailableError):  # the network, for a moment
                if not ray.get(broker.is_wanted.remote(name)):
                    break
            time.sleep(1.0)
    ending.set()
    time.sleep(1.0)  # for a placement group that it is just asking for
    # Ray takes back a placement group when its maker and its driver are dead, not before
    for held in [thing for thing in gc.get_objects() if type(thing) is PlacementGroup]:
        remove_placement_group(held)
    ray.kill(controller)


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
