"""A resident worker under stress: many trials of all kinds in one process, each as if alone."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from e2lora import resident as resident_room
from e2lora.broker import Attempt, Broker, Job, Update, affinity_of
from e2lora.config import AdapterConfig, GroupSpec, PlanConfig, TrialConfig
from e2lora.models import load_structure
from e2lora.partitioned import bytes_held
from e2lora.plan import build_plan
from e2lora.recording import record
from e2lora.records import Evaluation, TrialFolder, TrialResult, write_json
from e2lora.resident import Resident
from e2lora.targets import find_targets
from e2lora.tasks import load_task
from e2lora.training import Reports, TrialStopped, run_trial
from e2lora.training.health import OutOfMemory
from e2lora.weights import own_weights, wrapped_modules
from e2lora.worker import Link, failure_of, require_same_weights, serve
from tests.conftest import ROOT
from tests.kinds import made_up_profile
from tests.small import MODEL, small_trial

MIB = 2**20
CPU = torch.device("cpu")
SHALLOW = MODEL.model_copy(
    update={"config_overrides": {**MODEL.config_overrides, "num_hidden_layers": 3}}
)
ONE_LAYER = MODEL.model_copy(
    update={"config_overrides": {**MODEL.config_overrides, "num_hidden_layers": 1}}
)

# An odd number of them: with two models in turn, every one meets both.
SYSTEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({"r": 4}, {}),
    "all-shared": ({"topology": "all", "r": 2}, {}),
    "blocks": ({"topology": "blocks", "block_size": 2, "r": 8}, {}),
    "PiSSA": ({"r": 4}, {"init_lora_weights": "pissa"}),
    "E²LoRA": ({"topology": "e2", "r": 4}, {}),
    "FFT": ({}, {"family": "full", "target_modules": ()}),
    "DoRA": ({"r": 3}, {"family": "dora"}),
    "OLoRA": ({"r": 4}, {"init_lora_weights": "olora"}),
    "E²ShareLoRA": ({"topology": "e2", "r": 6}, {"a_scope": "type"}),
    "LoRA-GA": ({"r": 4}, {"family": "lora_ga"}),
    "VeRA": ({"r": 16}, {"family": "vera"}),
    "strided": ({"topology": "strided", "stride": 2, "r": 4}, {}),
    "LoRI": ({"r": 4}, {"family": "lori"}),
}
COMPARED = (0, 3, 4, 5, 9, 37)
"""Trials that are run again in a process of their own: plain, PiSSA, E², FFT, LoRA-GA, VeRA."""
NUM_TRIALS = 50
BROKEN, TOO_LARGE, STOPPED = 17, 30, 43
"""Trials that raise, run out of memory, and are stopped, among the others."""


def config_of(number: int, **training: Any) -> TrialConfig:
    """Trial ``number`` of the stress test: all systems, on two models in turn."""
    plan, adapter = list(SYSTEMS.values())[number % len(SYSTEMS)]
    options = {"max_steps": 2, "eval_every": None, "warmup_steps": 0, **training}
    if number == STOPPED:
        options["max_steps"] = 10_000
    base = small_trial(seed=number, **options)
    return base.model_copy(
        update={
            "model": (MODEL, SHALLOW)[number % 2],
            "plan": PlanConfig(**{"calibration": base.plan.calibration, **plan}),
            "adapter": AdapterConfig(**{"target_modules": ("query", "value"), **adapter}),
        }
    )


def job_of(folder: Path, number: int) -> Job:
    """With its plan where a worker looks for it."""
    config, place = config_of(number), TrialFolder(folder / f"{number:05d}")
    write_plan(place, config)
    if number == BROKEN:  # a plan for the other model
        write_plan(place, config.model_copy(update={"model": MODEL}))
    payload = {"config": config.model_dump_json(), "folder": str(place.path)}
    return Job(f"trial-{number:05d}", "trial", GroupSpec.of(config.training), payload)


def write_plan(place: TrialFolder, config: TrialConfig) -> None:
    task = load_task(config.task)
    structure = load_structure(config.model, task.auto_class, task.num_labels)
    targets = find_targets(structure, config.adapter.target_modules)
    profile = made_up_profile(targets) if config.plan.needs_profile else None
    plan = build_plan(targets, config.plan, profile)
    write_json(place.plan_file, plan.model_copy(update={"measured_on": None}))  # by no real weights


# ---- a worker process -------------------------------------------------------------------------


class Here:
    """The real broker in the worker's own process; called as an actor would be."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.broker = Broker(600.0)
        self.jobs = jobs
        self.memory: list[tuple[int, int]] = []  # after each trial
        for job in jobs:
            self.broker.submit(job)

    def __getattr__(self, name: str) -> Any:
        called = getattr(type(self), f"on_{name}", None)

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                return (
                    called(self, *arguments) if called else getattr(self.broker, name)(*arguments)
                )

        return Method()

    def on_next_attempt(self, *arguments: Any) -> Attempt | str:
        self.memory.append(memory_held())
        return self.broker.next_attempt(*arguments) or "retire"

    def on_alive(self, token: str, step: int | None = None, *measured: Any) -> bool:
        if token.startswith(f"trial-{STOPPED:05d}") and step:
            self.broker.stop(token.rpartition("/")[0])
        return self.broker.alive(token, step, *measured)


def memory_held() -> tuple[int, int]:
    """Resident memory, and what tensors that are alive hold, in bytes."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), sum(storages.values())


def work(folder: Path, numbers: Sequence[int], out: Path) -> None:
    """Serve these trials as a worker does, and write what came of them."""
    import ray

    from e2lora.tasks.text_classification import TextClassification

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{out}.group", rank=0, world_size=1)
    jobs = [job_of(folder, number) for number in numbers]
    here = Here(jobs)
    ray.get = lambda value: value  # type: ignore[assignment]
    whole = TextClassification.loss_sum
    short = short_of_memory(whole)

    def loss_sum(self: Any, model: Any, batch: Any) -> Any:
        too_large = f"trial-{TOO_LARGE:05d}" in here.broker.progress()
        return (short if too_large else whole)(self, model, batch)

    TextClassification.loss_sum = loss_sum  # type: ignore[method-assign]
    serve(here, "group-001", jobs[0].spec, None, 600.0)
    told = {}
    for job, number in zip(jobs, numbers, strict=True):
        found = here.broker.update(job.key, 0)
        assert found is not None
        kept = {name: found[1].history.get(name) for name in ("loss", "grad_norm")}
        how = "stopped" if found[1].stopped else found[1].failure
        told[number] = {
            "error": found[1].error,
            "how": how,
            "evaluations": found[1].evaluations,
            **kept,
        }
    out.write_text(json.dumps({"trials": told, "memory": here.memory}))


def in_a_process(folder: Path, numbers: Sequence[int]) -> dict[str, Any]:
    out = folder / f"told-{numbers[0]}-{len(numbers)}.json"
    command = [sys.executable, "-m", "tests.test_resident", str(folder), str(out)]
    done = subprocess.run(
        [*command, *map(str, numbers)], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def stressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stressed")
    return folder, in_a_process(folder, range(NUM_TRIALS))


@pytest.mark.long
def test_fifty_trials_in_one_process_end_as_each_of_them_must(
    stressed: tuple[Path, dict[str, Any]],
) -> None:
    _, told = stressed
    errors = {int(number): trial["error"] for number, trial in told["trials"].items()}
    assert len(errors) == NUM_TRIALS
    ends = {int(number): trial["how"] for number, trial in told["trials"].items()}
    assert {number: how for number, how in ends.items() if how} == {
        BROKEN: "error",
        TOO_LARGE: "memory",
        STOPPED: "stopped",
    }
    assert "must fit the worker's memory" in errors.pop(TOO_LARGE)
    assert "layer.3." in errors.pop(BROKEN)
    assert set(errors.values()) == {None}


@pytest.mark.long
def test_memory_is_flat_after_the_first_trials(stressed: tuple[Path, dict[str, Any]]) -> None:
    """What tensors hold, exactly; what else the process does, up to what an allocator keeps."""
    _, told = stressed
    _, *after = told["memory"]
    assert len(after) == NUM_TRIALS
    seen = 2 * len(SYSTEMS)  # by then every system was on each of the two models
    tensors = [held for _, held in after]
    assert set(tensors[seen:]) <= set(tensors[:seen])
    others = [resident - held for resident, held in after]
    first, then = others[len(SYSTEMS) : seen], others[seen:]
    assert median(then) <= median(first) + 24 * MIB


@pytest.mark.long
@pytest.mark.parametrize("number", COMPARED)
def test_trial_on_a_used_worker_equals_one_in_a_fresh_process_bit_for_bit(
    number: int, stressed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, told = stressed
    alone = in_a_process(tmp_path, [number])["trials"][str(number)]
    assert alone["error"] is None
    assert alone == told["trials"][str(number)]
    weights = [
        TrialFolder(place / f"{number:05d}").adapter / "adapter.safetensors"
        for place in (folder, tmp_path)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# ---- in this process --------------------------------------------------------------------------


def load(resident: Resident, model: Any) -> Any:
    return resident.load(small_trial().model_copy(update={"model": model}))[0]


def num_bytes(base: Any) -> int:
    return sum(bytes_held(tensor) for _, tensor in own_weights(base.model))


def test_bases_stay_within_a_bound_and_the_one_used_longest_ago_goes_first() -> None:
    spec = GroupSpec.of(small_trial().training)
    resident = Resident(spec, CPU)
    first, second, third = (load(resident, model) for model in (ONE_LAYER, SHALLOW, MODEL))
    assert load(resident, ONE_LAYER) is first
    assert load(resident, SHALLOW) is second

    resident = Resident(spec, CPU, kept_bytes=num_bytes(third))  # room for one, beside that in use
    first, second, third = (load(resident, model) for model in (ONE_LAYER, SHALLOW, MODEL))
    assert load(resident, SHALLOW) is second
    assert load(resident, MODEL) is third
    assert load(resident, ONE_LAYER) is not first


@pytest.mark.parametrize(("named", "num_loads"), [(True, 2), (False, 6)])
def test_trials_of_one_model_are_kept_together_so_that_it_is_loaded_once(
    named: bool, num_loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of two models come in turn, and a worker has room for one of them."""
    loads = []
    load_base = resident_room.load_base
    monkeypatch.setattr(
        resident_room, "load_base", lambda *a, **k: loads.append(a[0]) or load_base(*a, **k)
    )
    spec, broker = GroupSpec.of(small_trial().training), Broker()
    for number in range(6):
        config = small_trial().model_copy(update={"model": (ONE_LAYER, SHALLOW)[number % 2]})
        payload = {"config": config.model_dump_json()}
        affinity = affinity_of(config) if named else ""
        broker.submit(Job(str(number), "trial", spec, payload, affinity))
    resident, incarnation = Resident(spec, CPU, kept_bytes=0), broker.join("g")
    while isinstance(attempt := broker.next_attempt("g", incarnation, spec), Attempt):
        resident.load(TrialConfig.model_validate_json(attempt.job.payload["config"]))
        broker.complete(attempt.token, {})
    assert len(loads) == num_loads


def test_without_room_for_others_only_the_base_in_use_stays() -> None:
    resident = Resident(GroupSpec.of(small_trial().training), CPU, kept_bytes=0)
    first = load(resident, ONE_LAYER)
    assert load(resident, ONE_LAYER) is first
    load(resident, SHALLOW)
    assert load(resident, ONE_LAYER) is not first


def test_changed_base_goes_and_others_stay() -> None:
    resident = Resident(GroupSpec.of(small_trial().training), CPU)
    other, base = load(resident, SHALLOW), load(resident, ONE_LAYER)
    resident.drop_changed_base()
    assert load(resident, ONE_LAYER) is base
    next(base.model.parameters()).data[0] += 1
    resident.drop_changed_base()
    fresh = load(resident, ONE_LAYER)
    assert fresh is not base
    assert fresh.fingerprint == base.fingerprint
    assert load(resident, SHALLOW) is other


def at_step_two(error: Exception) -> Any:
    def on_step(step: int, measured: dict[str, float]) -> bool:
        if step == 2:
            raise error
        return False

    return on_step


def short_of_memory(loss_sum: Any) -> Any:
    """In place of a task's ``loss_sum``: its second call doesn't fit."""
    calls = count(1)

    def wrapped(self: Any, model: Any, batch: Any) -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("simulated: tried to allocate 80 GiB")
        return loss_sum(self, model, batch)

    return wrapped


ENDS: dict[str, tuple[type[Exception], Any, dict[str, Any]]] = {
    "raises": (KeyError, at_step_two(KeyError("a bug")), {}),
    "runs out of memory": (OutOfMemory, None, {}),
    "is stopped": (TrialStopped, at_step_two(TrialStopped()), {}),
    "diverges": (FloatingPointError, None, {"learning_rate": 1e30}),
}


@pytest.mark.parametrize("how", ENDS)
def test_trial_that_ends_badly_leaves_the_base_as_it_was(
    how: str, one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_steps": 3, "eval_every": None, "warmup_steps": 0}
    config = small_trial("all", **options).model_copy(update={"model": ONE_LAYER})
    resident = Resident(GroupSpec.of(config.training), CPU)
    base, data = resident.load(config)
    targets = find_targets(base.model, config.adapter.target_modules)
    plan = build_plan(targets, config.plan, None)

    def train(name: str, on_step: Any = None, **training: Any) -> Any:
        own = config.training.model_copy(update=training)
        reports = Reports(on_step=on_step) if on_step else Reports()
        changed = config.model_copy(update={"training": own})
        return run_trial(base, data, plan, changed, TrialFolder(tmp_path / name), reports)

    before = train("00000")
    expected, on_step, training = ENDS[how]
    with monkeypatch.context() as patched:
        if expected is OutOfMemory:
            patched.setattr(type(data.task), "loss_sum", short_of_memory(type(data.task).loss_sum))
        with pytest.raises(expected):
            train("00001", on_step, **training)
    assert not wrapped_modules(base.model)
    resident.drop_changed_base()
    assert resident.load(config)[0] is base
    after = train("00002")
    assert after.losses == before.losses
    assert after.final == before.final


# ---- what a worker hears ----------------------------------------------------------------------


def test_notice_of_preemption_is_heeded_at_a_step_and_not_while_there_is_nothing_to_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loading a model may take minutes, and the notice may come meanwhile."""
    now = [0.0]
    monkeypatch.setattr("e2lora.worker.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ray.get", lambda value: value)
    job = Job("trial-00001", "trial", GroupSpec.of(small_trial().training), {})
    here = Here([job])
    attempt = here.broker.next_attempt("g", here.broker.join("g"), job.spec)
    assert isinstance(attempt, Attempt)
    reports = Link(here, None, lambda: True).reports(attempt.token)
    told = []
    one = {"loss": 1.0}
    for step, measured, later in ((0, {}, 60), (1, one, 60), (1, {}, 50), (2, one, 5), (3, one, 9)):
        now[0] += later
        told.append(reports.on_step(step, measured))
    assert told == [False, True, False, False, True], "with a state to save, and once a minute"


def test_attempt_that_has_lost_its_trial_stops_at_its_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, signs = [0.0], []
    monkeypatch.setattr("e2lora.worker.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ray.get", lambda value: value)
    job = Job("trial-00001", "trial", GroupSpec.of(small_trial().training), {})
    here = Here([job])
    attempt = here.broker.next_attempt("g", here.broker.join("g"), job.spec)
    assert isinstance(attempt, Attempt)
    reports = Link(here, None, lambda: False).reports(attempt.token)
    heard = here.broker.alive
    monkeypatch.setattr(here.broker, "alive", lambda *told: signs.append(told) or heard(*told))
    for step in range(1, 41):
        now[0] += 0.1
        reports.on_step(step, {"loss": 1.0 / step})
    assert 3 <= len(signs) <= 4, "one a second, however short the steps are"
    assert all(measured == {"loss": 1.0 / step} for _, step, measured, _ in signs)
    here.broker.lose(attempt.token, "its node is gone")
    now[0] += 2.0
    with pytest.raises(TrialStopped):
        reports.on_step(41, {"loss": 0.02})
    told = Evaluation(step=41, metrics={"loss": 0.02})
    with pytest.raises(TrialStopped):
        reports.on_evaluation(told, [1.0], {"loss": [0.02]})


def test_what_is_measured_stands_in_the_folder_as_strict_json(tmp_path: Path) -> None:
    """Of a step that fp16 skips there is no gradient's norm."""
    history = {"loss": [1.0, 0.5], "grad_norm": [math.nan, 2.0]}
    evaluation = {"step": 2, "metrics": {"loss": 0.5}}
    place = TrialFolder(tmp_path / "00001")
    record(place, 1, Update([evaluation], [1.0], history, None, None, 1))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(place.steps_file.read_text(), parse_constant=refuse)
    steps = place.steps()
    assert steps["loss"] == history["loss"]
    assert math.isnan(steps["grad_norm"][0])
    assert steps["grad_norm"][1] == 2.0


def recorded(folder: Path, update: Update, adapter_parameters: int = 0) -> TrialResult:
    record(TrialFolder(folder), 3, update, adapter_parameters)
    result = TrialFolder(folder).result()
    assert result is not None
    return result


def test_stopped_trial_is_recorded_with_its_last_evaluation_and_its_parameters(
    tmp_path: Path,
) -> None:
    seen = [{"step": step, "metrics": {"accuracy": step / 10}} for step in (2, 4)]
    update = Update(seen, {}, {}, None, None, 2, stopped=True, held_seconds=9.0)
    result = recorded(tmp_path, update, adapter_parameters=768)
    assert (result.state, result.failure, result.error) == ("stopped", None, None)
    assert (result.metrics, result.adapter_parameters) == ({"accuracy": 0.4}, 768)
    assert (result.attempts, result.seconds) == (2, 9.0)
    waiting = recorded(tmp_path / "waiting", Update([], {}, {}, None, None, 0, stopped=True))
    assert (waiting.state, waiting.metrics) == ("stopped", {})


def test_failed_trial_is_recorded_with_the_kind_of_its_failure_and_no_metrics(
    tmp_path: Path,
) -> None:
    seen = [{"step": 2, "metrics": {"accuracy": 0.5}}]
    update = Update(seen, {}, {}, None, "the loss must stay finite", 1, "diverged")
    result = recorded(tmp_path, update)
    assert (result.state, result.failure, result.metrics) == ("failed", "diverged", {})
    assert result.error == "the loss must stay finite"


FAILURES: dict[str, tuple[Exception, str]] = {
    "a loss that isn't finite": (FloatingPointError("nan"), "diverged"),
    "a step that does not fit": (OutOfMemory("too large"), "memory"),
    "a model that does not fit": (torch.OutOfMemoryError("tried to allocate"), "memory"),
    "data that isn't there": (FileNotFoundError("plan.json"), "error"),
    "a wrong plan": (ValueError("wrong"), "error"),
    "a bug": (KeyError("bug"), "error"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_worker_tells_failures_apart(what: str) -> None:
    error, kind = FAILURES[what]
    assert failure_of(error) == kind


def test_weights_that_changed_since_the_study_began_are_refused(tmp_path: Path) -> None:
    def base(bits: str) -> Any:
        return SimpleNamespace(fingerprint=bits)

    config = small_trial()
    require_same_weights(tmp_path, config, base("first"))
    require_same_weights(tmp_path, config, base("first"))
    narrow = config.training.model_copy(update={"precision": "bf16"})
    require_same_weights(tmp_path, config.model_copy(update={"training": narrow}), base("others"))
    with pytest.raises(ValueError, match=r"had first when this one began, and has second now"):
        require_same_weights(tmp_path, config, base("second"))


if __name__ == "__main__":
    _, place, told, *chosen = sys.argv
    work(Path(place), [int(number) for number in chosen], Path(told))
