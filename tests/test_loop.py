"""What the loop decides: when it stops, what it keeps, how batches are cut and packed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from e2lora.config import (
    AdapterConfig,
    EarlyStopping,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.models import Base, load_base
from e2lora.plan import build_plan
from e2lora.records import Evaluation, TrialFolder
from e2lora.targets import find_targets
from e2lora.tasks import TrialData
from e2lora.training import Reports, TrainedTrial, TrialStopped, run_trial
from e2lora.training.checkpoint import load_checkpoint
from e2lora.training.health import OutOfMemory
from e2lora.weights import weights_fingerprint
from tests.small import small_trial
from tests.test_sft import ROWS, task_of, tiny_llama
from tests.test_train import load_small, with_training

pytestmark = pytest.mark.usefixtures("one_process")
SMALL = small_trial("none", eval_every=None)
QUIET = Reports()
NOTHING_HELPS = EarlyStopping(metric="loss", patience=1, min_delta=1e9)


@pytest.fixture(scope="module")
def resident() -> tuple[Base, TrialData]:
    return load_small()


def train(
    resident: tuple[Base, TrialData],
    config: TrialConfig,
    folder: Path,
    reports: Reports = QUIET,
) -> TrainedTrial:
    base, data = resident
    plan = build_plan(find_targets(base.model, config.adapter.target_modules), config.plan)
    return run_trial(base, data, plan, config, TrialFolder(folder), reports)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))


def parameters(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / f"checkpoints/step-{step:06d}/state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("parameter/")}


# ---- early stopping ---------------------------------------------------------------------------


def test_early_stopping_keeps_the_weights_of_the_best_evaluation(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    config = with_training(SMALL, eval_every=2, early_stopping=NOTHING_HELPS)
    told: list[tuple[Evaluation, list[float]]] = []
    reports = Reports(on_evaluation=lambda *heard: told.append(heard[:2]))
    trained = train(resident, config, tmp_path / "stopped", reports)
    assert [evaluation.step for evaluation in trained.evaluations] == [2, 4]
    assert len(trained.losses) == 4, "six steps were allowed"
    assert trained.final == trained.evaluations[0]
    assert checkpoints(tmp_path / "stopped") == [2, 4], "the newest one and the best"
    assert told[-1] == told[0], "the study hears last of what is kept"
    keeping = with_training(SMALL, eval_every=2, save_total_limit=3)
    whole = train(resident, keeping, tmp_path / "all")
    assert trained.losses == whole.losses[:4]
    kept = load_file(tmp_path / "stopped/adapter/adapter.safetensors")
    best = parameters(tmp_path / "all", step=2)
    last = parameters(tmp_path / "all", step=4)

    def differ(name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor]) -> bool:
        (same,) = [t for key, t in state.items() if _bare(key) == name]
        return not torch.equal(same, tensor)

    assert not any(differ(name, tensor, best) for name, tensor in kept.items())
    assert any(differ(name, tensor, last) for name, tensor in kept.items())


def _bare(key: str) -> str:
    """The name that a stored adapter gives a parameter."""
    return key.removeprefix("parameter/base_model.model.").replace(".default", "")


def test_stopped_trial_that_is_killed_late_ends_as_it_would_have(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    config = with_training(SMALL, eval_every=2, early_stopping=NOTHING_HELPS)
    whole = train(resident, config, tmp_path / "whole")

    def stop(step: int, measured: dict[str, float]) -> None:
        if step == 4 and measured:
            raise TrialStopped

    with pytest.raises(TrialStopped):
        train(resident, config, tmp_path / "killed", Reports(on_step=stop))
    for _ in range(2):  # and once more when all is done
        again = train(resident, config, tmp_path / "killed")
        assert (again.losses, again.evaluations, again.final) == (
            whole.losses,
            whole.evaluations,
            whole.final,
        )
    files = [tmp_path / name / "adapter/adapter.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_patience_that_is_never_exhausted_trains_to_the_end_and_keeps_the_best(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    stopping = EarlyStopping(patience=9, min_delta=1e9)
    config = with_training(SMALL, eval_every=2, early_stopping=stopping)
    trained = train(resident, config, tmp_path / "run")
    assert len(trained.losses) == 6
    assert trained.final.step == 2


def test_metric_that_the_task_has_not_is_refused_before_the_first_step(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    stopping = EarlyStopping(metric="recall", direction="maximize")
    config = with_training(SMALL, eval_every=2, early_stopping=stopping)
    with pytest.raises(ValueError, match=r"metric='recall'.*accuracy"):
        train(resident, config, tmp_path / "run")


def test_weights_that_the_last_step_has_broken_are_a_failure_and_not_a_score(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    config = with_training(SMALL, max_steps=1, warmup_steps=0, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"loss.*nan.*step 1.*Lower the learning rate"):
        train(resident, config, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []


def test_best_state_that_the_shared_disk_shows_late_is_waited_for(
    resident: tuple[Base, TrialData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_training(SMALL, eval_every=2, early_stopping=NOTHING_HELPS)
    whole = train(resident, config, tmp_path / "whole")
    hidden = [1, 2]

    def late(folder: Path, identity: str, step: int | None = None) -> Any:
        if step is not None and hidden:
            return hidden.pop() and None
        return load_checkpoint(folder, identity, step)

    monkeypatch.setattr("e2lora.training.outset.load_checkpoint", late)
    monkeypatch.setattr("e2lora.training.outset.time.sleep", lambda seconds: None)
    assert train(resident, config, tmp_path / "late").final == whole.final
    assert not hidden


# ---- checkpoints ------------------------------------------------------------------------------


def test_notice_of_preemption_saves_the_state_at_once(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    def on_step(step: int, measured: dict[str, float]) -> bool:
        if step == 4:
            raise TrialStopped
        return step == 3 and bool(measured)

    with pytest.raises(TrialStopped):
        train(resident, SMALL, tmp_path / "taken", Reports(on_step=on_step))
    assert checkpoints(tmp_path / "taken") == [3]
    resumed = train(resident, SMALL, tmp_path / "taken")
    assert resumed.losses == train(resident, SMALL, tmp_path / "whole").losses


@pytest.mark.parametrize("changed", ["the weights", "the rows"])
def test_checkpoint_of_other_weights_or_rows_is_not_continued(
    resident: tuple[Base, TrialData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    """They may have changed under their names."""
    base, data = resident
    train(resident, SMALL, tmp_path / "run")
    if changed == "the weights":
        base = replace(base, fingerprint="of others")
    else:
        monkeypatch.setattr(type(data.task), "content", lambda self, split: "of others")
    with pytest.raises(ValueError, match="may only continue the trial that wrote it"):
        train((base, data), SMALL, tmp_path / "run")


def test_as_many_checkpoints_stay_as_are_asked_for(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    config = with_training(SMALL, checkpoint_every=1, save_total_limit=3)
    train(resident, config, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [4, 5, 6]


def test_every_step_is_measured(resident: tuple[Base, TrialData], tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    reports = Reports(on_step=lambda step, measured: seen.append((step, measured)))
    trained = train(resident, SMALL, tmp_path / "run", reports)
    steps = [(step, measured) for step, measured in seen if measured]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [measured["loss"] for _, measured in steps] == trained.losses
    assert {len(values) for values in trained.history.values()} == {6}
    assert trained.history["learning_rate"][:3] == pytest.approx([1e-2, 2e-2, 2e-2])
    for name in ("grad_norm", "seconds", "tokens_per_second", "peak_memory_gib"):
        assert all(value > 0 and math.isfinite(value) for value in trained.history[name]), name


# ---- length, batches --------------------------------------------------------------------------


def test_epochs_become_steps_of_the_rows_there_are(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    base, data = resident
    few = TrialData(data.task, [data.train[i] for i in range(20)], data.validation)
    config = with_training(SMALL, max_steps=None, num_epochs=1.5, global_batch_size=8)
    assert len(train((base, few), config, tmp_path / "run").losses) == 4


def test_batches_are_cut_as_memory_allows_and_the_losses_stay(
    resident: tuple[Base, TrialData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Narrow:
        limit, tries = 3, True

        def used(self, run: Any, num_rows: int) -> int:
            run(num_rows)
            return num_rows

    monkeypatch.setattr("e2lora.training.outset._memory", lambda *_: Narrow())
    config = with_training(SMALL, gradient_accumulation_steps="auto")
    found = train(resident, config, tmp_path / "found")
    assert found.accumulation == 4, "microbatches of 2 rows"
    told = train(resident, SMALL, tmp_path / "told")
    assert found.losses == pytest.approx(told.losses, abs=2e-5)


def test_activation_checkpointing_changes_no_loss(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    plain = train(resident, SMALL, tmp_path / "plain")
    option = with_training(SMALL, activation_checkpointing="non_reentrant")
    saving = train(resident, option, tmp_path / "saving")
    assert saving.losses == pytest.approx(plain.losses, abs=1e-6)


def test_packed_training_has_the_losses_of_padded_training(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tmp_path / "model", tied=True)
    base = load_base(model, AutoModelForCausalLM, None, torch.float32)
    task = task_of(tmp_path / "data", [{**row, "answer": "warm and dark"} for row in ROWS])
    data = TrialData.of(task, base.processor)
    config = causal(model, task)
    padded = train((base, data), config, tmp_path / "padded")
    packed = train((base, data), with_training(config, packing=True), tmp_path / "packed")
    assert packed.losses == pytest.approx(padded.losses, rel=1e-5)
    assert packed.losses[-1] < packed.losses[0]


def causal(model: ModelConfig, task: Any) -> TrialConfig:
    return TrialConfig(
        model=model,
        task=task.config,
        adapter=AdapterConfig(target_modules=("q_proj", "o_proj")),
        plan=PlanConfig(r=4),
        training=TrainConfig(max_steps=4, learning_rate=0.03, global_batch_size=8),
    )


def test_classification_can_not_be_packed(resident: tuple[Base, TrialData], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack"):
        train(resident, with_training(SMALL, packing=True), tmp_path / "run")


# ---- what breaks ------------------------------------------------------------------------------


def test_trial_that_runs_out_of_memory_says_what_to_lower_and_leaves_the_base(
    resident: tuple[Base, TrialData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = resident

    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(data.task), "loss_sum", too_large)
        with pytest.raises(OutOfMemory, match=r"microbatch of 8 rows.*accumulation_steps"):
            train(resident, SMALL, tmp_path / "large")
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    before = train(resident, SMALL, tmp_path / "fits").losses
    assert before == train(load_small(), SMALL, tmp_path / "fresh").losses


def test_reentrant_checkpointing_of_shared_tensors_is_refused(
    resident: tuple[Base, TrialData], tmp_path: Path
) -> None:
    shared = small_trial("all", activation_checkpointing="reentrant")
    with pytest.raises(ValueError, match=r"reentrant.*Set .*='non_reentrant'"):
        train(resident, shared, tmp_path / "run")
