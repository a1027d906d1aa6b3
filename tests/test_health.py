"""What is refused before the first step, and what a broken step says."""

from __future__ import annotations

import pytest
import torch

from e2lora.config import TrainConfig
from e2lora.training.health import (
    OutOfMemory,
    digest_of,
    explained_memory,
    require_agreement,
    require_finite,
    require_rows,
)

TRAINING = TrainConfig(max_steps=1, learning_rate=1e-3, global_batch_size=16, num_workers=2)


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the other worker of two says."""
    other: dict[str, object] = {}

    def gather(box: list[object], mine: object, group: object) -> None:
        box[:] = [mine, other]

    monkeypatch.setattr("e2lora.training.health.dist.get_world_size", lambda group: 2)
    monkeypatch.setattr("e2lora.training.health.dist.all_gather_object", gather)
    return other


def test_workers_that_differ_are_told_in_what(of_two: dict[str, object]) -> None:
    of_two |= {"sharing plan": "a", "training rows": 7}
    require_agreement({"sharing plan": "a", "training rows": 7}, "group")
    with pytest.raises(ValueError, match=r"same training rows.*worker 0: 8, worker 1: 7.*alike"):
        require_agreement({"sharing plan": "a", "training rows": 8}, "group")
    require_agreement({"training rows": 8}, None)


def test_digest_depends_on_names_shapes_and_every_value() -> None:
    a = torch.arange(6.0).reshape(2, 3)
    changed = a.clone()
    changed[1, 2] = 5.0001
    digests = [digest_of({name: t}) for name, t in (("a", a), ("b", a), ("a", a.reshape(3, 2)))]
    digests += [digest_of({"a": changed}), digest_of({"a": a.bfloat16()}), digest_of({})]
    assert len(set(digests)) == len(digests)
    assert digest_of({"a": a.clone()}) == digests[0]
    assert digest_of({"a": a.T.contiguous().T}) == digests[0], "however it lies in memory"
    assert digest_of({"a": torch.tensor(1.0)}) != digest_of({"a": torch.tensor(2.0)}), "a scalar"


def test_split_without_rows_is_refused() -> None:
    require_rows(1, "train", "data")
    with pytest.raises(ValueError, match=r"validation split of data has none"):
        require_rows(0, "validation", "data")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_step_and_rate(loss: float) -> None:
    require_finite(1.0, 3, TRAINING)
    with pytest.raises(FloatingPointError, match=rf"{loss} at step 3.*0.001.*Lower"):
        require_finite(loss, 3, TRAINING)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"),
    ],
)
def test_short_memory_says_what_to_lower(error: RuntimeError) -> None:
    with pytest.raises(OutOfMemory) as caught, explained_memory(TRAINING):
        raise error
    said = str(caught.value)
    assert "a microbatch of 8 rows didn't" in said
    for remedy in ("gradient_accumulation_steps", "activation_checkpointing", "bf16", "max_length"):
        assert remedy in said
    spent = TRAINING.model_copy(update={"activation_checkpointing": "non_reentrant"})
    with pytest.raises(OutOfMemory) as caught, explained_memory(spent):
        raise error
    assert "activation_checkpointing" not in str(caught.value)


def test_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(OutOfMemory), explained_memory(TRAINING):
        torch.empty(2**55, dtype=torch.uint8)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), explained_memory(TRAINING):
        raise RuntimeError("shapes")
