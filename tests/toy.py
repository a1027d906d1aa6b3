"""A model small enough to see through, and autograd on it to hold the probe against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2lora.gradients import (
    Measurement,
    Microbatch,
    Probing,
    Round,
    measure_gradients,
)
from e2lora.moments import LayerGradient, Moments, Target, require_usable
from e2lora.targets import find_targets

TOLERANCE = 1e-5  # relative; of the mean, relative to the mean absolute value


LossSum = Callable[[Any, Any], Tensor]


def by_autograd(
    model: nn.Module,
    targets: Sequence[Target],
    microbatches: Sequence[Any],
    loss_sum: LossSum,
    num_supervised: int,
) -> dict[str, Tensor]:
    """The reference: gradients of the mean loss in float64, of weights that require them."""
    weights = {t.path: model.get_submodule(t.path).weight for t in targets}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = sum(loss_sum(model, batch) for batch in microbatches) / num_supervised
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    for weight in weights.values():
        weight.requires_grad_(False)
    return {
        path: torch.zeros_like(weights[path]).double() if g is None else g.double()
        for path, g in zip(weights, gradients, strict=True)
    }


def require_equal(layers: Sequence[LayerGradient], gradients: dict[str, Tensor]) -> None:
    assert [entry.target.path for entry in layers] == list(gradients)
    for entry in layers:
        expected, moments = gradients[entry.target.path], entry.moments
        scale = expected.abs().mean().item()
        assert moments.count == expected.numel()
        assert moments.std == pytest.approx(expected.std(correction=0).item(), rel=TOLERANCE)
        assert moments.mean_abs == pytest.approx(scale, rel=TOLERANCE)
        assert moments.mean == pytest.approx(expected.mean().item(), abs=TOLERANCE * scale)


def one_fold(microbatches: Sequence[Any]) -> list[Round]:
    return [Round((0,), tuple(Microbatch(batch, (num_rows(batch),)) for batch in microbatches))]


def num_rows(batch: Any) -> int:
    return len(batch["labels"] if isinstance(batch, dict) else batch)


def measure(
    model: nn.Module,
    names: Sequence[str],
    microbatches: Sequence[Any],
    loss_sum: LossSum,
    num_supervised: int,
    group: Any = None,
) -> Measurement:
    """All rows as one fold."""
    return measure_gradients(
        model,
        find_targets(model, names),
        one_fold(microbatches),
        loss_sum,
        [sum(map(num_rows, microbatches))],
        [num_supervised],
        group=group,
    )


def check_against_autograd(
    model: nn.Module,
    names: Sequence[str],
    microbatches: Sequence[Any],
    loss_sum: LossSum,
    num_supervised: int,
) -> str:
    """Measure, compare, and return the method that was used."""
    targets = find_targets(model, names)
    result = measure(model, names, microbatches, loss_sum, num_supervised)
    expected = by_autograd(model, targets, microbatches, loss_sum, num_supervised)
    require_equal(result.layers, expected)
    require_usable((entry.target, entry.moments) for entry in result.layers)
    with torch.no_grad():
        total = sum(loss_sum(model, batch).item() for batch in microbatches)
    assert result.mean_loss == pytest.approx(total / num_supervised, rel=1e-6)
    return result.method


class Toy(nn.Module):
    """Layers of two linear maps; the first layer can be used twice, the last not at all."""

    def __init__(self, num_layers: int = 3, width: int = 6, twice: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})
            for _ in range(num_layers)
        )
        for parameter in self.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        self.used = [*range(num_layers), 0] if twice else list(range(num_layers))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.used:
            layer = self.layers[number]
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def toy_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


def toy_batches(*sizes: int, width: int = 6) -> list[Tensor]:
    """Microbatches of samples x 4 tokens x width: the same samples however they are cut."""
    samples = torch.randn(sum(sizes), 4, width, generator=torch.Generator().manual_seed(1))
    return list(samples.split(list(sizes)))


NAMES = ("up", "down")


def measured(model: nn.Module, batches: Sequence[Tensor]) -> tuple[LayerGradient, ...]:
    return measure(model, NAMES, batches, toy_loss, 6).layers


def assert_same(layers: Sequence[LayerGradient], others: Sequence[LayerGradient]) -> None:
    assert [entry.target for entry in layers] == [entry.target for entry in others]
    for one, other in zip(layers, others, strict=True):
        for name in Moments.model_fields:
            value, scale = getattr(other.moments, name), other.moments.mean_abs
            assert getattr(one.moments, name) == pytest.approx(
                value, rel=TOLERANCE, abs=TOLERANCE * scale
            )


FOLDS = (3, 1, 2)  # rows of each


PLAIN = Probing()


ROUNDS = {
    "all folds in one microbatch": [Round((0, 1, 2), (Microbatch(slice(0, 6), FOLDS),))],
    "a microbatch per fold": [
        Round((0,), (Microbatch(slice(0, 3), (3,)),)),
        Round((1,), (Microbatch(slice(3, 4), (1,)),)),
        Round((2,), (Microbatch(slice(4, 6), (2,)),)),
    ],
    "several microbatches per fold": [
        Round((0,), (Microbatch(slice(0, 2), (2,)), Microbatch(slice(2, 3), (1,)))),
        Round((1,), (Microbatch(slice(3, 4), (1,)),)),
        Round((2,), (Microbatch(slice(4, 5), (1,)), Microbatch(slice(5, 6), (1,)))),
    ],
}


def of_rows(model: nn.Module, rows: slice) -> Tensor:
    return toy_loss(model, toy_batches(6)[0][rows])


def measure_folds(
    case: str, model: nn.Module, probing: Probing = PLAIN, group: Any = None
) -> Measurement:
    return measure_gradients(
        model, find_targets(model, NAMES), ROUNDS[case], of_rows, FOLDS, FOLDS, probing, group
    )
