"""Training under ZeRO and several workers against a plain loop, and resuming."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from e2lora.adapters import adapt, is_head, trainable_parameters
from e2lora.config import TrialConfig
from e2lora.data import step_rows
from e2lora.engine import learning_rate_factor
from e2lora.models import Base, load_base, reset_head, weights_fingerprint
from e2lora.plan import SharingPlan, build_plan
from e2lora.profile import measure_profile
from e2lora.records import TrialFolder
from e2lora.targets import find_targets
from e2lora.tasks import TrialData, load_task
from e2lora.train import Reports, TrialStopped, run_trial
from tests.small import small_trial

TRIALS = {
    "LoRA": small_trial("none"),
    "E2LoRA": small_trial("e2"),
    "ShareLoRA-A, accumulated": small_trial(
        "none", a_scope="type", gradient_accumulation_steps=2, head_learning_rate=1e-2
    ),
}


@pytest.fixture(scope="module")
def resident() -> tuple[Base, TrialData]:
    return load_small()


def with_training(config: TrialConfig, **options: Any) -> TrialConfig:
    training = config.training.model_copy(update=options)
    return config.model_copy(update={"training": training})


def load_small(dtype: torch.dtype = torch.float32) -> tuple[Base, TrialData]:
    config = TRIALS["LoRA"]
    task = load_task(config.task)
    base = load_base(config.model, task.auto_class, task.num_labels, dtype)
    train, validation = (task.features(s, base.tokenizer) for s in ("train", "validation"))
    return base, TrialData(task, train, validation)


def plan_of(config: TrialConfig, base: Base, data: TrialData) -> SharingPlan:
    targets = find_targets(base.model, config.adapter.target_modules)
    profile = measure_profile(base, data, config) if config.plan.topology == "e2" else None
    return build_plan(targets, config.plan, profile)


def plain_losses(config: TrialConfig, base: Base, data: TrialData) -> list[float]:
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
    losses = []
    for step in range(training.max_steps):
        numbers = step_rows(data.lengths, step, training.global_batch_size, config.seed)
        batch = data.task.collate([data.train[i] for i in numbers], base.tokenizer)
        loss = data.task.loss_sum(model, batch) / len(numbers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
        factor = learning_rate_factor(training, step)
        for group, peak in zip(
            optimizer.param_groups, (training.learning_rate, head_rate), strict=True
        ):
            group["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.unload()
    return losses


def train_all(folder: Path, world: int) -> dict[str, Any]:
    """Run in a worker process: every trial at every stage, each stopped once and resumed."""
    group = torch.distributed.new_group(backend="gloo") if world > 1 else None
    base, data = load_small()
    results: dict[str, Any] = {}
    for name, config in TRIALS.items():
        plan = plan_of(config, base, data)
        for stage in (0, 1, 2):
            trial = with_training(config, zero_stage=stage, num_workers=world)
            place = TrialFolder(folder / f"{world}{len(results):04d}")
            train_until(4, base, data, plan, trial, place, group)
            trained = run_trial(base, data, plan, trial, place, Reports(), group)
            results[f"{name} at stage {stage}"] = trained.losses
    handed_over = with_training(TRIALS["LoRA"], zero_stage=2, num_workers=world)
    plan, place = plan_of(handed_over, base, data), TrialFolder(folder / "99999")
    if world == 1:
        train_until(4, base, data, plan, handed_over, place, group)
    else:
        trained = run_trial(base, data, plan, handed_over, place, Reports(), group)
        results["handed over"] = trained.losses
    return results


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

    def stop(reached: int) -> None:
        if reached == step:
            raise TrialStopped

    with pytest.raises(TrialStopped):
        run_trial(base, data, plan, config, place, Reports(on_step=stop), group)


def _worker() -> None:
    """``python -m tests.test_train FOLDER RANK WORLD``: one worker of :func:`train_all`."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    results = train_all(folder, world)
    if rank == 0:
        (folder / f"results-{world}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def engine_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Losses of every trial at every stage, by number of workers."""
    folder = tmp_path_factory.mktemp("engine")
    root = Path(__file__).resolve().parents[1]
    results = {}
    for world in (1, 2):
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.test_train", str(folder), str(rank), str(world)],
                cwd=root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output
        results[world] = json.loads((folder / f"results-{world}.json").read_text())
    return results


@pytest.fixture(scope="module")
def plain(resident: tuple[Base, TrialData]) -> dict[str, list[float]]:
    """Losses of the reference loop."""
    losses = {name: plain_losses(config, *resident) for name, config in TRIALS.items()}
    untrained = plain_losses(with_training(TRIALS["LoRA"], learning_rate=1e-12), *resident)
    moved = [abs(a - b) for a, b in zip(untrained, losses["LoRA"], strict=True)]
    assert max(moved) > 1e-2, "a curve that doesn't depend on training would prove nothing"
    return losses


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", TRIALS)
def test_stopped_and_resumed_loss_curve_equals_a_plain_loop(
    engine_losses: dict[int, dict[str, Any]],
    plain: dict[str, list[float]],
    name: str,
    stage: int,
    world: int,
) -> None:
    losses = engine_losses[world][f"{name} at stage {stage}"]
    assert losses == pytest.approx(plain[name], abs=2e-5)


def test_checkpoint_of_one_worker_is_continued_by_two(
    engine_losses: dict[int, dict[str, Any]], plain: dict[str, list[float]]
) -> None:
    assert engine_losses[2]["handed over"] == pytest.approx(plain["LoRA"], abs=2e-5)


@pytest.mark.usefixtures("one_process")
def test_used_base_gives_the_same_numbers_and_stays_as_it_was(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    base, data = resident
    results = []
    for number, name in enumerate(["LoRA", "E2LoRA", "LoRA"]):
        config = TRIALS[name]
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
    config = TRIALS["E2LoRA"]
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
        base, data, plan, config, place, Reports(on_evaluation=lambda e, o: heard.append(e))
    )
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert (resumed.losses, resumed.evaluations) == (whole.losses, whole.evaluations)
    assert heard == whole.evaluations, "evaluations before the checkpoint are told again"
    for file in ("adapter.safetensors", "plan.json"):
        one, other = (tmp_path / f"{n:05d}" / "adapter" / file for n in (0, 1))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_trial_resumes_exactly_and_leaves_its_base_as_it_was(
    stage: int, tmp_path: Path
) -> None:
    config = with_training(TRIALS["E2LoRA"], precision="bf16", zero_stage=stage)
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
    config = with_training(TRIALS["LoRA"], learning_rate=1e30, max_grad_norm=1e30)
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
    _worker()
