"""The largest microbatch is found that fits: with made-up memories, and with the machine's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from e2lora.training.health import OutOfMemory
from e2lora.training.microbatch import (
    CPU_MARGIN,
    CpuMemory,
    NewTensors,
    find_accumulation,
    forward_and_backward,
)
from tests.kinds import Adapted, loss_of
from tests.made_up_memory import MadeUp, find_on_worker, nothing


def by_hand(num_rows: int, limit: int) -> int:
    """Of all divisors the least number of steps whose microbatch fits."""
    return min(
        n for n in range(1, num_rows + 1) if num_rows % n == 0 and 5 + 10 * num_rows // n <= limit
    )


@pytest.mark.parametrize("tries", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 12, 16, 30, 64])
def test_fewest_steps_that_fit_are_taken(num_rows: int, tries: bool) -> None:
    for limit in (15, 24, 25, 26, 45, 85, 125, 165, 10_000):
        memory = MadeUp(limit, tries=tries)
        assert find_accumulation(nothing, num_rows, memory) == by_hand(num_rows, limit)


def test_what_is_foreseen_not_to_fit_is_not_tried() -> None:
    memory = MadeUp(limit=100)
    assert find_accumulation(nothing, 64, memory) == 8
    assert memory.tried == [1, 2, 4, 8]


def test_without_trying_two_small_sizes_are_measured() -> None:
    memory = MadeUp(limit=10_000, tries=False)
    assert find_accumulation(nothing, 64, memory) == 1
    assert memory.tried == [1, 2]


def test_size_that_takes_more_than_foreseen_is_not_taken() -> None:
    """Its memory grows faster than the line through the sizes before it."""
    memory = MadeUp(limit=100, size_of=lambda n: n**3)
    assert find_accumulation(nothing, 16, memory) == 4
    assert memory.tried == [1, 2, 4]


def test_running_out_of_memory_is_an_answer() -> None:
    memory = MadeUp(limit=10_000, breaks=50)
    assert find_accumulation(nothing, 16, memory) == 4
    assert memory.tried[-1] == 8


@pytest.mark.parametrize("breaks", [None, 9])
def test_row_that_does_not_fit_alone_is_refused_with_what_to_lower(breaks: int | None) -> None:
    for num_rows in (1, 16):
        with pytest.raises(OutOfMemory, match=r"(?s)one row.*there is 0\.00 GiB.*max_length"):
            find_accumulation(nothing, num_rows, MadeUp(limit=9, breaks=breaks))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(num_rows: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        find_accumulation(broken, 4, MadeUp(limit=100))


def test_random_state_is_as_before() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    find_accumulation(lambda n: torch.rand(n).sum(), 8, MadeUp(limit=1000))
    assert torch.equal(torch.rand(4), expected)


def test_workers_agree_on_what_fits_the_smallest_memory(tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(
            find_on_worker, (str(tmp_path / "rendezvous"), [10_000, 50], results), nprocs=2
        )
        assert dict(results) == {0: (4, [1, 2, 4]), 1: (4, [1, 2, 4])}


# ---- a model ----------------------------------------------------------------------------------


def run_of(adapted: Adapted) -> Callable[[int], None]:
    ids = torch.randint(2, 64, (64, 24), generator=torch.Generator().manual_seed(0))

    def loss_sum(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["input_ids"].flatten())

    return forward_and_backward(
        adapted.model, lambda n: {"input_ids": ids[:n]}, loss_sum, torch.device("cpu")
    )


def test_memory_of_a_model_grows_in_a_line_and_decides() -> None:
    run = run_of(Adapted("llama"))
    memory = CpuMemory(available=2**40)
    used = {n: memory.used(run, n) for n in (1, 2, 16)}
    line = used[2] + 14 * (used[2] - used[1])
    assert used[16] == pytest.approx(line, rel=0.02)
    for size in (1, 4, 16):
        wanted = int(1.05 * memory.used(run, size) / CPU_MARGIN)
        assert find_accumulation(run, 16, CpuMemory(available=wanted)) == 16 // size
        assert find_accumulation(run, 16, CpuMemory(2, available=2 * wanted)) == 16 // size


def test_activation_checkpointing_takes_less() -> None:
    adapted = Adapted("llama")
    run, memory = run_of(adapted), CpuMemory(available=2**40)
    plain = memory.used(run, 8)
    adapted.model.enable_input_require_grads()
    inner = adapted.model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    assert memory.used(run, 8) < 0.7 * plain


def test_model_is_as_before() -> None:
    adapted = Adapted("llama", lora_dropout=0.1)
    before = {name: t.clone() for name, t in adapted.model.state_dict().items()}
    expected, state = loss_of(adapted.model, "llama"), torch.random.get_rng_state()
    find_accumulation(run_of(adapted), 4, CpuMemory(available=2**40))
    assert all(parameter.grad is None for parameter in adapted.model.parameters())
    assert not adapted.model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in adapted.model.state_dict().items())
    assert torch.equal(loss_of(adapted.model, "llama"), expected)


def test_bytes_are_counted_as_long_as_a_tensor_lives() -> None:
    weight = torch.ones(100, requires_grad=True)
    with NewTensors() as tensors:
        saved = weight.exp()  # keeps its result for backward
        first = tensors.live
        view, other = saved[:50], torch.zeros(25, dtype=torch.float64)
        assert (first, tensors.live) == (400, 600)
        del other
        assert tensors.live == 400
        total = view.sum()
        del saved, view
        assert tensors.live >= 400, "the graph still holds it"
        total.backward()
    assert tensors.peak >= 800  # with a gradient


def test_weights_are_not_new() -> None:
    linear = nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    with NewTensors() as tensors, torch.no_grad():
        linear(torch.zeros(1, 1000))
    assert tensors.peak == 2 * 4000
