"""What runs inside a resident worker group: the loop that serves jobs one after another.

The process group, imports, frozen base model and tokenised data stay in memory between jobs.
Worker 0 speaks with the broker; what it hears is broadcast, so all workers do the same. While
idle, that broadcast is the heartbeat that keeps collectives from timing out.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from e2lora.broker import Attempt
from e2lora.config import GroupSpec, TrialConfig
from e2lora.models import Base
from e2lora.patience import is_storage_fault
from e2lora.profile import measure_profile
from e2lora.profile_cache import ProfileCache
from e2lora.records import Evaluation, Failure, TrialFolder, write_json
from e2lora.resident import Resident
from e2lora.tasks import TrialData
from e2lora.tasks.scores import Outcomes
from e2lora.training import History, Reports, TrialStopped, run_trial
from e2lora.training.health import OutOfMemory

SIGN_OF_LIFE_SECONDS = 1.0
PREEMPTION_LOOK_SECONDS = 5.0
SAVE_AGAIN_SECONDS = 60.0  # while a machine that will be taken away is still there


class Link:
    """Worker 0's line to the broker, and its echo to the other workers of the group.

    Args:
        preempted: whether a machine of this group is about to be taken away. Collective.
    """

    def __init__(self, broker: Any, group: Any, preempted: Callable[[], bool]) -> None:
        self._broker, self._group, self._preempted = broker, group, preempted
        self.rank = dist.get_rank(group) if group else 0
        self.last_moved = time.monotonic()
        self.stepped = 0.0  # seconds in training steps, of all jobs

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask the broker on worker 0; every worker gets the answer. Collective."""
        return self._echo(self.tell(method, *arguments) if self.rank == 0 else None)

    def tell(self, method: str, *arguments: Any) -> Any:
        """Ask the broker, from this worker alone; without a broker: stop, and retire."""
        import ray

        while True:
            try:
                return ray.get(getattr(self._broker, method).remote(*arguments))
            except ray.exceptions.ActorUnavailableError:
                time.sleep(1.0)  # the network, for a moment
            except ray.exceptions.RayActorError:
                return "retire" if method == "next_attempt" else False

    def _echo(self, value: Any) -> Any:
        self.last_moved = time.monotonic()
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        self.last_moved = time.monotonic()
        return box[0]

    def reports(self, token: str) -> Reports:
        """How the trial of this attempt speaks."""
        wanted, last_sign = True, 0.0
        said: str | None = None
        next_look = time.monotonic() + PREEMPTION_LOOK_SECONDS

        def alive(
            doing: str | None = None,
            step: int | None = None,
            measured: dict[str, float] | None = None,
        ) -> None:
            nonlocal wanted, last_sign, said
            said = doing or (said if step is None else None)  # until a step ends it
            now = self.last_moved = time.monotonic()
            if self.rank == 0 and now - last_sign > SIGN_OF_LIFE_SECONDS:
                last_sign = now
                wanted = self.tell("alive", token, step, measured, said)

        def on_step(step: int, measured: dict[str, float]) -> bool:
            nonlocal next_look
            self.stepped += measured.get("seconds", 0.0)
            alive(step=step, measured=measured or None)
            # only a step leaves something to save
            looks = bool(measured) and time.monotonic() > next_look
            go_on, looks = self._echo((wanted, looks))
            if not go_on:
                raise TrialStopped(token)
            if not looks:
                return False
            noticed = self._preempted()
            wait = SAVE_AGAIN_SECONDS if noticed else PREEMPTION_LOOK_SECONDS
            next_look = time.monotonic() + wait
            return noticed

        def on_evaluation(evaluation: Evaluation, outcomes: Outcomes, history: History) -> None:
            told = (token, evaluation.model_dump(), outcomes, history)
            if not self.call("report", *told):
                raise TrialStopped(token)

        return Reports(alive=alive, on_step=on_step, on_evaluation=on_evaluation)

    @contextmanager
    def kept_alive(self, reports: Reports) -> Iterator[None]:
        """Signs of life from beside, while models and data are fetched: that has no steps."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(5 * SIGN_OF_LIFE_SECONDS):
                reports.alive()

        beater = threading.Thread(target=beat, daemon=True)
        beater.start()
        try:
            yield
        finally:
            over.set()
            beater.join()

    def watch(self, limit: float) -> None:
        """End this process once it hasn't moved for ``limit`` seconds: Ray replaces the group."""

        def look() -> None:
            while time.monotonic() - self.last_moved < limit:
                time.sleep(min(5.0, limit / 4))
            print(f"no movement for {limit:.0f} s: this worker ends itself", flush=True)
            os._exit(1)

        threading.Thread(target=look, daemon=True).start()


@dataclass(frozen=True)
class Work:
    """What a job's function is given."""

    base: Base
    data: TrialData
    config: TrialConfig
    payload: dict[str, str]
    reports: Reports
    group: Any


def run_trial_job(work: Work) -> dict[str, Any]:
    """Payload: ``folder`` of the trial, which holds its plan.json; ``test`` to score test rows;
    ``weights``, the folder where a study keeps which weights its models have.
    """
    if "weights" in work.payload:
        require_same_weights(Path(work.payload["weights"]), work.config, work.base)
    folder = TrialFolder(Path(work.payload["folder"]))
    plan = folder.plan()
    measured_on = plan.measured_on.model_fingerprint if plan.measured_on else None
    if measured_on not in (None, work.base.fingerprint):
        raise ValueError(
            "a plan belongs to the weights its profile was measured on; this one was measured on "
            f"{measured_on}, the model {work.config.model.name!r} now has {work.base.fingerprint}. "
            "Remove the study's profiles folder to measure again, or restore the weights."
        )
    trained = run_trial(
        work.base,
        work.data,
        plan,
        work.config,
        folder,
        work.reports,
        work.group,
        score_test="test" in work.payload,
    )
    return {
        "metrics": trained.final.metrics,
        "test_metrics": trained.test_metrics,
        "gradient_accumulation_steps": trained.accumulation,
        "adapter_parameters": trained.adapter_parameters,
        "head_parameters": trained.head_parameters,
    }


def require_same_weights(folder: Path, config: TrialConfig, base: Base) -> None:
    """All trials of a study must start from the same weights; the first says which.

    A name on a hub, or a folder, may come to hold others in the meantime.

    Raises:
        ValueError: these are others.
    """
    key = f"{config.model.fingerprint()}-{config.task.kind}-{config.training.precision}"
    file = folder / f"{key}.json"
    if not file.exists():
        write_json(file, {"model": config.model.name, "weights": base.fingerprint})
    known = json.loads(file.read_text(encoding="utf-8"))["weights"]
    if known != base.fingerprint:
        raise ValueError(
            f"all trials of a study must start from the same weights; {config.model.name!r} had "
            f"{known} when this one began, and has {base.fingerprint} now. Restore them, pin the "
            "`revision` of a hub's model, or begin another study."
        )


def run_profile_job(work: Work) -> dict[str, Any]:
    """Payload: the ``file`` to write the profile to."""
    profile = measure_profile(
        work.base,
        work.data,
        work.config,
        work.group,
        on_progress=lambda done, total: work.reports.alive(),
        cache=ProfileCache(),
    )
    if not work.group or dist.get_rank(work.group) == 0:
        write_json(Path(work.payload["file"]), profile)
    return {"mean_loss": profile.provenance.mean_loss}


JOBS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "trial": run_trial_job,
    "profile": run_profile_job,
}


def serve(
    broker: Any,
    name: str,
    spec: GroupSpec,
    max_jobs: int | None,
    lease_seconds: float,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """Serve jobs until told to retire, or ``max_jobs`` are done. Runs on every worker.

    A job that raises is reported as failed. With one worker the group goes on; with several the
    others may hang in a collective, so the error is raised and the whole group is replaced.
    """
    if spec.gpus_per_worker == 0:
        torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    device = torch.device("cuda" if spec.gpus_per_worker else "cpu")
    group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
    resident, link, done = Resident(spec, device, group), Link(broker, group, preempted), 0
    link.watch(lease_seconds)
    incarnation = link.call("join", name)
    while max_jobs is None or done < max_jobs:
        attempt = link.call("next_attempt", name, incarnation, spec)
        if attempt == "retire":
            return
        if attempt is None:
            continue  # the broker waited a while before it said so
        clock = _Clock(link)
        try:
            link.call("complete", attempt.token, _work_on(attempt, resident, clock, group))
        except TrialStopped:
            pass
        except Exception as error:
            traceback.print_exc()
            if is_storage_fault(error):
                link.tell("put_back", attempt.token, str(error))
            elif group is None or isinstance(error, OWN_FAULTS):
                link.tell("fail", attempt.token, _explain(error), failure_of(error))
            else:
                link.tell("lose", attempt.token, _explain(error))
            if group or device.type == "cuda":
                raise
            if not isinstance(error, FloatingPointError):
                resident.drop_base()  # what broke half-way may have left something on it
        finally:
            if link.rank == 0:
                link.tell("spend", name, clock.read())
        resident.drop_changed_base()
        done += 1


class _Clock:
    """What one job's time goes into, by the parts of `e2lora.utilisation`."""

    def __init__(self, link: Link) -> None:
        self.link, self._stepped = link, link.stepped
        self._began = self._loaded = time.monotonic()

    def loaded(self) -> None:
        self._loaded = time.monotonic()

    def read(self) -> dict[str, float]:
        steps = self.link.stepped - self._stepped
        other = time.monotonic() - self._loaded - steps
        return {"steps": steps, "other": other, "loading": self._loaded - self._began}


def _work_on(attempt: Attempt, resident: Resident, clock: _Clock, group: Any) -> dict[str, Any]:
    """Run one job; ``seconds`` leave out what was loaded for it."""
    link, payload = clock.link, attempt.job.payload
    reports = link.reports(attempt.token)
    config = TrialConfig.model_validate_json(payload["config"])
    world = dist.get_world_size(group) if group else 1
    if config.training.num_workers != world:  # of an elastic group
        training = config.training.on_workers(world)
        config = config.model_copy(update={"training": training})
    with link.kept_alive(reports):
        base, data = resident.load(config)
    clock.loaded()
    reports.on_step(0, {})
    started = time.monotonic()
    result = JOBS[attempt.job.kind](Work(base, data, config, payload, reports, group))
    return {**result, "seconds": time.monotonic() - started}


OWN_FAULTS = (ValueError, FloatingPointError, FileNotFoundError, OutOfMemory)
"""Errors that every worker of a group would raise again; others may come from a lost worker."""


def failure_of(error: Exception) -> Failure:
    """The kind of a job's own failure, as its record names it.

    >>> failure_of(FloatingPointError("the loss must stay finite"))
    'diverged'
    """
    if isinstance(error, FloatingPointError):
        return "diverged"
    return "memory" if isinstance(error, (OutOfMemory, torch.OutOfMemoryError)) else "error"


def _explain(error: Exception) -> str:
    """A user's error as its message; anything else with its traceback."""
    if isinstance(error, OWN_FAULTS):
        return str(error) or repr(error)
    return "".join(traceback.format_exception(error)).strip()
