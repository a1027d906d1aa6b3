"""Training under ZeRO and several workers against a plain loop, and resuming."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file

from e2lora.adapters import adapt, is_head, trainable_parameters
from e2lora.config import GroupSpec, TrialConfig
from e2lora.data import step_rows
from e2lora.models import Base, load_base, reset_head
from e2lora.plan import SharingPlan, build_plan
from e2lora.profile import measure_profile
from e2lora.records import TrialFolder, write_json
from e2lora.resident import Resident
from e2lora.targets import find_targets
from e2lora.tasks import TrialData, load_task
from e2lora.training import Reports, TrialStopped, run_trial
from e2lora.training.engine import learning_rate_factor
from e2lora.weights import weights_fingerprint
from tests.small import small_trial

EVERYTHING_PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def system(topology: str, family: str = "lora", **options: Any) -> TrialConfig:
    config = small_trial(topology, head_learning_rate=1e-2, **options)
    adapter = config.adapter.model_copy(update={"family": family})
    return config.model_copy(update={"adapter": adapter})


SYSTEMS = {
    "LoRA": system("none"),
    "E²LoRA": system("e2"),
    "E²ShareLoRA": system("e2", a_scope="type"),
    "E²DoRA": system("e2", family="dora"),
}
LEARNING_RATE = SYSTEMS["LoRA"].training.learning_rate
STAGES, ACCUMULATIONS, WORLDS = (0, 1, 2, 3), (1, 4), (1, 2)
ALONE_OR_TWO = (1, pytest.param(2, marks=pytest.mark.slow))


class Cell(NamedTuple):
    """One way to train a system."""

    system: str
    stage: int
    accumulation: int
    checkpointing: str = "none"

    @property
    def config(self) -> TrialConfig:
        return with_training(
            SYSTEMS[self.system],
            zero_stage=self.stage,
            gradient_accumulation_steps=self.accumulation,
            activation_checkpointing=self.checkpointing,
            deepspeed=EVERYTHING_PARTITIONED,
        )


QUICK = {
    1: [Cell("LoRA", 3, 1), Cell("E²LoRA", 1, 1), Cell("E²DoRA", 0, 4)],
    2: [Cell("E²LoRA", 3, 4), Cell("E²ShareLoRA", 2, 1, "non_reentrant")],
}
ALL = [
    *(Cell(*ways) for ways in product(SYSTEMS, STAGES, ACCUMULATIONS)),
    *(Cell("E²ShareLoRA", stage, 4, "non_reentrant") for stage in STAGES),
]


@pytest.fixture(scope="module")
def resident() -> tuple[Base, TrialData]:
    return load_small()


def with_training(config: TrialConfig, **options: Any) -> TrialConfig:
    training = config.training.model_copy(update=options)
    return config.model_copy(update={"training": training})


def load_small(dtype: torch.dtype = torch.float32) -> tuple[Base, TrialData]:
    config = SYSTEMS["LoRA"]
    task = load_task(config.task)
    base = load_base(config.model, task.auto_class, task.num_labels, dtype)
    train, validation = (task.features(s, base.processor) for s in ("train", "validation"))
    return base, TrialData(task, train, validation)


def plan_of(config: TrialConfig, base: Base, data: TrialData) -> SharingPlan:
    targets = find_targets(base.model, config.adapter.target_modules)
    profile = measure_profile(base, data, config) if config.plan.topology == "e2" else None
    return build_plan(targets, config.plan, profile)


def plain_training(config: TrialConfig, base: Base, data: TrialData) -> Trained:
    """The reference: AdamW on the whole global batch at once, in one process, no engine."""
    training = config.training
    plan = plan_of(config, base, data)
    reset_head(base.model, base.head, config.seed)
    torch.manual_seed(config.seed)
    model = adapt(base.model, plan, config.adapter, base.head)
    parameters = trainable_parameters(model)
    head_rate = training.head_learning_rate or training.learning_rate
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in parameters.items() if not is_head(n)]},
            {"params": [p for n, p in parameters.items() if is_head(n)]},
        ],
        weight_decay=0.0,
    )
    losses, norms = [], []
    for step in range(training.num_steps):
        numbers = step_rows(data.lengths, step, training.global_batch_size, config.seed)
        batch = data.task.collate([data.train[i] for i in numbers], base.processor)
        loss = data.task.loss_sum(model, batch) / len(numbers)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
        factor = learning_rate_factor(training, step)
        for group, peak in zip(
            optimizer.param_groups, (training.learning_rate, head_rate), strict=True
        ):
            group["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    weights = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    model.unload()
    return Trained(losses, norms, weights)


def plain_losses(config: TrialConfig, base: Base, data: TrialData) -> list[float]:
    return plain_training(config, base, data).losses


class Trained(NamedTuple):
    """Losses and gradient norms by step, and what was trained at the end, by name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


class Work(NamedTuple):
    """For worker processes: train a cell in a folder of this name, until step 4 or to the end."""

    place: str
    cell: Cell
    stops: bool


def stopped_and_resumed(cells: Sequence[Cell]) -> list[Work]:
    return [
        Work(f"{i:05d}", cell, stops) for i, cell in enumerate(cells) for stops in (True, False)
    ]


def train_all(folder: Path, world: int, works: Sequence[Work]) -> None:
    """Run in a worker process; checkpoints and steps.json are left in the places."""
    group = torch.distributed.new_group(backend="gloo") if world > 1 else None
    residents: dict[int, Resident] = {}
    for work in works:
        config = with_training(work.cell.config, num_workers=world)
        if work.cell.stage not in residents:
            spec = GroupSpec.of(config.training)
            residents[work.cell.stage] = Resident(spec, torch.device("cpu"), group)
        resident = residents[work.cell.stage]
        base, data = resident.load(config)
        plan = SharingPlan.model_validate_json((folder / f"{work.cell.system}.json").read_text())
        place = TrialFolder(folder / work.place)
        if work.stops:
            train_until(4, base, data, plan, config, place, group)
        else:
            trained = run_trial(base, data, plan, config, place, Reports(), group)
            if group is None or torch.distributed.get_rank(group) == 0:
                write_json(place.steps_file, trained.history)
        assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    if group:
        torch.distributed.barrier(group)  # neither may leave while the other still speaks with it


def train_until(
    step: int,
    base: Base,
    data: TrialData,
    plan: SharingPlan,
    config: TrialConfig,
    place: TrialFolder,
    group: Any = None,
) -> None:
    """Train and be stopped at ``step``; the newest checkpoint is of the evaluation before."""

    def stop(reached: int, measured: dict[str, float]) -> None:
        if reached == step:
            raise TrialStopped

    with pytest.raises(TrialStopped):
        run_trial(base, data, plan, config, place, Reports(on_step=stop), group)


def _worker(folder: str, rendezvous: str, rank: str, world: str, works: str) -> None:
    """One worker of :func:`run_workers`."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = rank
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/{rendezvous}", rank=int(rank), world_size=int(world)
    )
    parsed = [Work(place, Cell(*cell), stops) for place, cell, stops in json.loads(works)]
    train_all(Path(folder), int(world), parsed)


def run_workers(folder: Path, world: int, works: Sequence[Work]) -> None:
    """:func:`train_all` in so many processes."""
    command = [sys.executable, "-m", "tests.test_train", str(folder), f"rendezvous-{uuid4()}"]
    logs = [(folder / f"worker-{rank}.log").open("w+") for rank in range(world)]  # pipes fill up
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world), json.dumps(works)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    for worker, log in zip(workers, logs, strict=True):
        code = worker.wait(timeout=900)
        log.seek(0)
        assert code == 0, log.read()
        log.close()


@pytest.fixture(scope="module")
def plain(
    resident: tuple[Base, TrialData],
) -> dict[str, Trained]:
    """What the reference loop makes of every system."""
    trained = {name: plain_training(config, *resident) for name, config in SYSTEMS.items()}
    untrained = plain_losses(with_training(SYSTEMS["LoRA"], learning_rate=1e-12), *resident)
    moved = [abs(a - b) for a, b in zip(untrained, trained["LoRA"].losses, strict=True)]
    assert max(moved) > 1e-2, "a curve that doesn't depend on training would prove nothing"
    return trained


@pytest.fixture
def folder(resident: tuple[Base, TrialData], tmp_path: Path) -> Path:
    """Where workers find the plan of every system."""
    for name, config in SYSTEMS.items():
        write_json(tmp_path / f"{name}.json", plan_of(config, *resident))
    return tmp_path


def require_as_plain(place: TrialFolder, expected: Trained, name: str) -> None:
    steps = place.steps()
    assert steps["loss"] == pytest.approx(expected.losses, abs=2e-5), name
    assert steps["grad_norm"] == pytest.approx(expected.norms, rel=1e-3), name
    (newest,) = place.checkpoints.glob("step-*/state.safetensors")
    tensors = load_file(newest)
    assert {n for n in tensors if n.startswith("parameter/")} == {
        f"parameter/{n}" for n in expected.weights
    }, name
    for key, weight in expected.weights.items():
        difference = tensors[f"parameter/{key}"] - weight
        # Adam makes whole steps (0.02 here) of gradients near zero, and so of their rounding.
        assert difference.norm() < 1e-3 * weight.norm(), (name, key, float(difference.norm()))
        assert difference.abs().max() < 0.1 * LEARNING_RATE, (name, key)


def require_all_as_plain(
    folder: Path, plain: dict[str, Trained], world: int, cells: Sequence[Cell]
) -> None:
    run_workers(folder, world, stopped_and_resumed(cells))
    for number, cell in enumerate(cells):
        place = TrialFolder(folder / f"{number:05d}")
        require_as_plain(place, plain[cell.system], f"{cell} on {world}")


@pytest.mark.parametrize("world", ALONE_OR_TWO)
def test_stopped_and_resumed_training_equals_a_plain_loop(
    folder: Path, plain: dict[str, Trained], world: int
) -> None:
    require_all_as_plain(folder, plain, world, QUICK[world])


@pytest.mark.long
@pytest.mark.parametrize("world", WORLDS)
def test_every_stage_system_and_accumulation_equals_a_plain_loop(
    folder: Path, plain: dict[str, Trained], world: int
) -> None:
    require_all_as_plain(folder, plain, world, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [((1, 0), (2, 3)), ((2, 3), (1, 1))], ids=str)
def test_checkpoint_is_continued_at_another_stage_by_other_workers(
    folder: Path, plain: dict[str, Trained], ways: Sequence[tuple[int, int]]
) -> None:
    """(workers, stage) before and after."""
    for (world, stage), stops in zip(ways, (True, False), strict=True):
        run_workers(folder, world, [Work("00000", Cell("E²LoRA", stage, 1), stops)])
    require_as_plain(TrialFolder(folder / "00000"), plain["E²LoRA"], str(ways))


@pytest.mark.usefixtures("one_process")
def test_used_base_gives_the_same_numbers_and_stays_as_it_was(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    base, data = resident
    results = []
    for number, name in enumerate(["LoRA", "E²LoRA", "LoRA"]):
        config = SYSTEMS[name]
        place = TrialFolder(tmp_path / f"{number:05d}")
        trained = run_trial(base, data, plan_of(config, base, data), config, place, Reports())
        results.append((trained.losses, trained.evaluations))
        assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    assert results[0] == results[2]
    assert results[0] != results[1]


@pytest.mark.usefixtures("one_process")
def test_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    base, data = resident
    dropping = {"hidden_dropout_prob": 0.1}
    config = SYSTEMS["E²LoRA"]
    plan = plan_of(config, base, data)
    for module in base.model.modules():  # dropout too must be the same again
        if isinstance(module, torch.nn.Dropout):
            module.p = dropping["hidden_dropout_prob"]
    whole = run_trial(base, data, plan, config, TrialFolder(tmp_path / "00000"), Reports())
    config = with_training(config, checkpoint_every=2)  # so the newest one isn't an evaluation's
    place = TrialFolder(tmp_path / "00001")
    train_until(5, base, data, plan, config, place)
    heard = []
    resumed = run_trial(
        base, data, plan, config, place, Reports(on_evaluation=lambda e, *_: heard.append(e))
    )
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert (resumed.losses, resumed.evaluations) == (whole.losses, whole.evaluations)
    assert heard == whole.evaluations, "evaluations before the checkpoint are told again"
    for file in ("adapter.safetensors", "plan.json"):
        one, other = (tmp_path / f"{n:05d}" / "adapter" / file for n in (0, 1))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_trial_resumes_exactly_and_leaves_its_base_as_it_was(
    stage: int, tmp_path: Path
) -> None:
    config = with_training(SYSTEMS["E²LoRA"], precision="bf16", zero_stage=stage)
    base, data = load_small(torch.bfloat16)
    plan = plan_of(config, base, data)
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint, "profile: float32"
    whole = run_trial(base, data, plan, config, TrialFolder(tmp_path / "00000"), Reports())
    place = TrialFolder(tmp_path / "00001")
    train_until(4, base, data, plan, config, place)
    assert run_trial(base, data, plan, config, place, Reports()).losses == whole.losses
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    assert whole.losses == pytest.approx(plain_losses(config, *load_small()), abs=2e-2)


def test_bf16_without_master_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="Use stage 1"):
        small_trial(precision="bf16", zero_stage=0)


@pytest.mark.usefixtures("one_process")
def test_loss_that_is_not_finite_ends_the_trial_with_a_remedy(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    base, data = resident
    config = with_training(SYSTEMS["LoRA"], learning_rate=1e30, max_grad_norm=1e30)
    place = TrialFolder(tmp_path / "00000")
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        run_trial(base, data, plan_of(config, base, data), config, place, Reports())
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_warms_up_then_follows_its_schedule(schedule: str) -> None:
    training = small_trial(max_steps=12, schedule=schedule).training
    factors = [learning_rate_factor(training, step) for step in range(12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] == pytest.approx(
        {"linear": 0.1, "cosine": 0.5 * (1 + math.cos(0.9 * math.pi)), "constant": 1.0}[schedule]
    )


if __name__ == "__main__":
    _worker(*sys.argv[1:])
