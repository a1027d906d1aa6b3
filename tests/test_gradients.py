"""The probe's moments against plain autograd; nothing of the probe stays on the model."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from e2lora.gradients import (
    BLOCK_ROWS,
    Measurement,
    Microbatch,
    Probing,
    Round,
    held_bytes,
    measure_gradients,
)
from e2lora.moments import Fold, LayerGradient, Moments, Target, require_usable
from e2lora.partition import rmi_literal
from e2lora.targets import find_targets
from tests.conftest import model_folder

ROOT = Path(__file__).resolve().parents[1]
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


# ---- a toy, small enough to see through -------------------------------------------------------


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


def test_single_batch_is_measured_by_blocks() -> None:
    assert check_against_autograd(Toy(), NAMES, toy_batches(6), toy_loss, 6) == "blocks"


def test_weight_of_more_rows_than_a_block_is_exact() -> None:
    width = BLOCK_ROWS // 2 + 5
    model = Toy(num_layers=2, width=width)
    for parameter in model.parameters():
        parameter /= math.sqrt(width)
    assert model.layers[0]["up"].out_features > BLOCK_ROWS
    for sizes in ((3,), (1, 2)):
        check_against_autograd(model, NAMES, toy_batches(*sizes, width=width), toy_loss, 3)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (1,) * 6, (5, 1)])
def test_result_does_not_depend_on_the_microbatches(sizes: tuple[int, ...]) -> None:
    method = check_against_autograd(Toy(), NAMES, toy_batches(*sizes), toy_loss, 6)
    assert method == "accumulators"
    assert_same(measured(Toy(), toy_batches(*sizes)), measured(Toy(), toy_batches(6)))


@pytest.mark.parametrize("sizes", [(6,), (2, 4)])
def test_module_used_twice_in_one_forward_is_summed_before_it_is_squared(
    sizes: tuple[int, ...],
) -> None:
    """The statistics of its two parts, merged, would be others."""
    model = Toy(twice=True)
    assert check_against_autograd(model, NAMES, toy_batches(*sizes), toy_loss, 6) == "accumulators"


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


def test_mean_loss_is_divided_once_by_the_given_number() -> None:
    once = measure(Toy(), NAMES, toy_batches(6), toy_loss, 6)
    half = measure(Toy(), NAMES, toy_batches(6), toy_loss, 12)
    assert half.mean_loss == pytest.approx(once.mean_loss / 2)
    for one, other in zip(half.layers, once.layers, strict=True):
        assert one.moments.std == pytest.approx(other.moments.std / 2)


def test_half_precision_is_not_rounded_again() -> None:
    """A bf16 model's δ and x are bf16; their products and sums are not rounded to it again."""
    model, batches = Toy().bfloat16(), [b.bfloat16() for b in toy_batches(6)]
    seen: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        def hook(delta: Tensor) -> None:
            seen[path] = delta.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()

        output.requires_grad_(True).register_hook(hook)

    targets = find_targets(model, NAMES)
    handles = [
        model.get_submodule(t.path).register_forward_hook(
            lambda module, args, output, path=t.path: keep(path, module, args[0], output)
        )
        for t in targets
    ]
    (toy_loss(model, batches[0]) / 6).backward()
    for handle in handles:
        handle.remove()
    layers = measure(model, NAMES, batches, toy_loss, 6).layers
    require_equal(layers, {t.path: seen[t.path] for t in targets})


# ---- folds ------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("case", ROUNDS)
def test_folds_are_measured_in_the_same_pass_as_if_each_were_alone(case: str, twice: bool) -> None:
    result = measure_folds(case, Toy(twice=twice))
    assert_same(result.layers, measured(Toy(twice=twice), toy_batches(6)))
    assert [fold.num_samples for fold in result.folds] == list(FOLDS)
    for fold, rows in zip(result.folds, toy_batches(6)[0].split(FOLDS), strict=True):
        alone = measure(Toy(twice=twice), NAMES, [rows], toy_loss, len(rows))
        pairs = zip(alone.layers, fold.moments, strict=True)
        assert_same(alone.layers, [a.model_copy(update={"moments": m}) for a, m in pairs])


def test_nothing_is_held_where_one_microbatch_has_all_folds() -> None:
    """The toy's 6 targets have 12 x 6 entries of 4 bytes; a sum over folds, a sum over a fold's."""
    targets = find_targets(Toy(), NAMES)
    counts = [[len(r.microbatches) for r in rounds] for rounds in ROUNDS.values()]
    sizes = [sum(held_bytes(targets, [count]).values()) for count in counts]
    assert sizes == [0, 6 * 72 * 4, 2 * 6 * 72 * 4]
    methods = [measure_folds(case, Toy()).method for case in ROUNDS]
    assert methods == ["blocks", "accumulators", "accumulators"]


def test_targets_beyond_what_may_be_held_are_measured_in_further_passes() -> None:
    case, forwards = "several microbatches per fold", []
    model = Toy()
    model.register_forward_hook(lambda *_: forwards.append(1))
    limited = measure_folds(case, model, Probing(max_held_bytes=2 * 2 * 72 * 4))
    assert limited.num_passes == 3
    assert len(forwards) == 3 * 5
    unlimited = measure_folds(case, Toy())
    assert unlimited.num_passes == 1
    assert limited.layers == unlimited.layers
    assert limited.folds == unlimited.folds
    assert limited.mean_loss == unlimited.mean_loss
    assert measure_folds(case, Toy(), Probing(max_held_bytes=1)).num_passes == 6


def test_progress_counts_the_microbatches_of_all_passes() -> None:
    told: list[tuple[int, int]] = []
    measure_gradients(
        Toy(),
        find_targets(Toy(), NAMES),
        one_fold(toy_batches(2, 4)),
        toy_loss,
        [6],
        [6],
        Probing(max_held_bytes=1),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert list(dict.fromkeys(told)) == [(k, 12) for k in range(13)]
    assert told.count((0, 12)) >= 2, "in forward and in backward: one microbatch may take long"


def test_inputs_that_do_not_run_over_the_rows_are_refused_not_mixed_up() -> None:
    """As of experts that see some tokens only, or of models with time as first dimension."""

    class Turned(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1))

    for case in ROUNDS:
        if case == "all folds in one microbatch":
            with pytest.raises(ValueError, match=r"layers\.2\.down sees \(4, 6, 12\) for 6 rows"):
                measure_folds(case, Turned())
        else:
            assert_same(measure_folds(case, Turned()).layers, measured(Toy(), toy_batches(6)))


def test_time_first_is_not_taken_for_the_batch_where_a_row_has_as_many_tokens() -> None:
    """Square inputs hide it from the shape: rows of a square batch are cut by folds instead."""
    from e2lora.config import CalibrationConfig
    from e2lora.profile import calibration_rounds

    options = CalibrationConfig(num_samples=6, num_folds=2, microbatch_size=6)
    for length, num_rounds in ((5, 1), (6, 2)):
        rows = [{"input_ids": [0] * length}] * 3
        assert len(calibration_rounds([rows, rows], options, 0, 1)) == num_rounds


def test_tokens_without_a_batch_dimension_are_refused_where_folds_are_mixed() -> None:
    """Such as those routed to an expert: as many as rows, by chance."""

    class Routed(Toy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, 0])

    with pytest.raises(ValueError, match=r"sees \(6, 12\) for 6 rows"):
        measure_folds("all folds in one microbatch", Routed())


def test_limit_of_held_gradients_holds_for_modules_used_twice_too() -> None:
    """Nothing is to be held by one microbatch; the first layer, used twice, holds two of 288 B."""
    rounds = one_fold(toy_batches(6))
    model, targets = Toy(twice=True), find_targets(Toy(), NAMES)

    def measure_with(limit: int) -> Measurement:
        return measure_gradients(
            model, targets, rounds, toy_loss, [6], [6], Probing(max_held_bytes=limit)
        )

    assert measure_with(2 * 288).method == "accumulators"
    with pytest.raises(ValueError, match=r"used several times in one forward.*max_held_gib|Set it"):
        measure_with(2 * 288 - 1)


# ---- activation checkpointing -----------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class LayeredToy(Toy):
    """The toy with modules for layers, as real models have them."""

    def __init__(self) -> None:
        super().__init__()
        weights = self.state_dict()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.load_state_dict(weights)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("case", ROUNDS)
def test_checkpointing_changes_nothing_but_the_number_of_forwards(case: str) -> None:
    model, forwards = LayeredToy(), []
    model.layers[0].up.register_forward_hook(lambda *_: forwards.append(1))
    plain, again = (measure_folds(case, model, Probing(checkpointing=c)) for c in (False, True))
    num_batches = sum(len(r.microbatches) for r in ROUNDS[case])
    assert len(forwards) == 3 * num_batches
    assert again.layers == plain.layers
    assert again.folds == plain.folds
    assert again.method == plain.method, "forwards of the recomputation are not counted"
    assert not any("forward" in layer.__dict__ for layer in model.layers)


def test_users_own_checkpointing_is_measured_right_too() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(LayeredToy):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    result = measure(Checkpointed(), NAMES, toy_batches(6), toy_loss, 6)
    assert result.method == "blocks"
    assert_same(result.layers, measured(Toy(), toy_batches(6)))


# ---- pairs of layers, and parts of a projection -----------------------------------------------


@pytest.mark.parametrize("case", ROUNDS)
def test_pairs_are_those_of_the_gradients_themselves(case: str) -> None:
    model = Toy()
    result = measure_folds(case, model, Probing(pairwise=True))
    targets = find_targets(model, NAMES)
    splits = [(result, toy_batches(6)[0])]
    splits += list(zip(result.folds, toy_batches(6)[0].split(FOLDS), strict=True))
    for found, rows in splits:
        gradients = by_autograd(model, targets, [rows], toy_loss, len(rows))
        for name in NAMES:
            flat = torch.stack([gradients[f"layers.{k}.{name}"].flatten() for k in range(3)])
            pairs = found.pairs[f"layers.*.{name}"]
            assert pairs.layers == (0, 1, 2)
            scale = flat.square().sum(1).max().item()
            expected = {
                "inner": flat @ flat.T,
                "l1": torch.cdist(flat, flat, p=1),
                "l2": torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist"),
            }
            for statistic, matrix in expected.items():
                size = scale if statistic == "inner" else scale**0.5
                torch.testing.assert_close(
                    torch.tensor(getattr(pairs, statistic), dtype=torch.float64),
                    matrix,
                    rtol=1e-5,
                    atol=1e-5 * size,
                )


def test_pairs_of_weights_with_more_rows_than_a_block_are_exact() -> None:
    width = BLOCK_ROWS // 2 + 5
    model = Toy(num_layers=2, width=width)
    targets = find_targets(model, ("up",))
    batch = toy_batches(3, width=width)
    rounds, probing = one_fold(batch), Probing(pairwise=True)
    found = measure_gradients(model, targets, rounds, toy_loss, [3], [3], probing)
    a, b = (g.flatten() for g in by_autograd(model, targets, batch, toy_loss, 3).values())
    pairs = found.pairs["layers.*.up"]
    assert pairs.inner[0][1] == pytest.approx((a @ b).item(), rel=1e-4)
    assert pairs.l1[0][1] == pytest.approx((a - b).abs().sum().item(), rel=1e-5)
    assert pairs.l2[0][1] == pytest.approx((a - b).norm().item(), rel=1e-5)


def test_pairs_taken_by_small_blocks_of_entries_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = "several microbatches per fold"
    at_once = measure_folds(case, Toy(), Probing(pairwise=True))
    monkeypatch.setattr("e2lora.gradients.sums.BLOCK_BYTES", 8 * 3 * 7)  # 7 of 72 entries
    by_blocks = measure_folds(case, Toy(), Probing(pairwise=True))
    assert by_blocks.layers == at_once.layers
    for name, pairs in at_once.pairs.items():
        for statistic in ("inner", "l1", "l2"):
            np.testing.assert_allclose(
                getattr(by_blocks.pairs[name], statistic), getattr(pairs, statistic), rtol=1e-9
            )


def test_spilled_gradients_leave_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    measure_folds("a microbatch per fold", Toy(), Probing(pairwise=True))
    assert list(tmp_path.iterdir()) == []


def test_parts_of_a_projection_are_the_moments_of_their_rows() -> None:
    model = Toy()
    rows = {"even": tuple(range(0, 12, 2)), "odd": tuple(range(1, 12, 2))}
    probing = Probing(parts={"layers.1.up": rows})
    for case in ROUNDS:
        layers = {e.target.path: e for e in measure_folds(case, model, probing).layers}
        assert layers["layers.0.up"].parts == {}
        gradient = by_autograd(model, find_targets(model, NAMES), toy_batches(6), toy_loss, 6)[
            "layers.1.up"
        ]
        for name, first in (("even", 0), ("odd", 1)):
            part = layers["layers.1.up"].parts[name]
            assert part.count == 6 * 6
            expected = gradient[first::2].std(correction=0).item()
            assert part.std == pytest.approx(expected, rel=TOLERANCE)


# ---- what is left behind, and errors ----------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_model_is_left_as_it_was_even_after_an_error(training: bool, fails: bool) -> None:
    model = Toy(twice=True).train(training)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    modes: list[bool] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        modes.append(model.training)
        value = toy_loss(model, batch)
        if fails:
            raise RuntimeError("as if out of memory")
        return value

    with pytest.raises(RuntimeError, match="as if out of") if fails else nullcontext():
        measure(model, NAMES, toy_batches(2, 4), loss, 6)
    assert set(modes) == {False}, "the loss is taken in evaluation mode"
    assert model.training == training
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, weights[name])
    assert not model(toy_batches(6)[0]).requires_grad


def test_modes_of_parts_come_back_and_weights_get_no_grad() -> None:
    model = Toy().train()
    model.layers[1].eval()
    model.requires_grad_(True)
    with torch.no_grad():
        measured(model, toy_batches(6))
    assert model.training
    assert not model.layers[1]["up"].training
    assert model.layers[0]["up"].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_hook_is_left_where_a_target_is_not_there() -> None:
    model = Toy()
    first, *_ = find_targets(model, NAMES)
    absent = first.model_copy(update={"path": "layers.0.sideways"})
    with pytest.raises(AttributeError):
        measure_gradients(model, [first, absent], one_fold(toy_batches(6)), toy_loss, [6], [6])
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_changed_in_place_and_inputs_by_name_are_measured_right() -> None:
    class Odd(Toy):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer["up"](input=x)
                hidden /= 2.0
                x = x + layer["down"](torch.tanh(hidden))
            return x

    assert check_against_autograd(Odd(), NAMES, toy_batches(6), toy_loss, 6) == "blocks"


def test_module_that_returns_more_than_a_tensor_is_refused_by_name() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model = Toy()
    model.layers[1]["up"] = Router(6, 12)
    with pytest.raises(ValueError, match=r"layers\.1\.up returns a tuple"):
        measured(model, toy_batches(6))


def test_autocast_around_it_does_not_round_the_gradients() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measured(Toy(), toy_batches(6))
    assert inside == measured(Toy(), toy_batches(6))


def test_backward_through_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float16.*layers\.2\.down.*bfloat16"):
        measured(Toy().half(), [batch.half() for batch in toy_batches(6)])


def test_measures_inside_no_grad() -> None:
    with torch.no_grad():
        layers = measured(Toy(), toy_batches(6))
    assert_same(layers, measured(Toy(), toy_batches(6)))


@pytest.mark.parametrize("sizes", [(6,), (2, 4)])
def test_target_that_the_loss_does_not_reach_is_named(sizes: tuple[int, ...]) -> None:
    model = Toy()
    model.used = [0, 2]
    layers = measured(model, toy_batches(*sizes))
    dead = [entry.target.path for entry in layers if entry.moments.std == 0]
    assert dead == ["layers.1.up", "layers.1.down"]
    with pytest.raises(ValueError, match=r"2 got none: layers\.1\.up, layers\.1\.down.*loss"):
        require_usable((entry.target, entry.moments) for entry in layers)


def test_loss_that_reaches_no_target_at_all_names_them() -> None:
    model = Toy()
    model.used = []
    with pytest.raises(ValueError, match=r"6 got none: layers\.0\.up"):
        require_usable((e.target, e.moments) for e in measured(model, toy_batches(6)))


def test_target_whose_gradient_is_not_finite_is_named() -> None:
    model = Toy()
    model.layers[2]["up"].weight[0, 0] = float("nan")  # spoils the loss, and so every gradient
    with pytest.raises(ValueError, match=r"6 .*layers\.0\.up, layers\.0\.down"):
        measured(model, toy_batches(6))


# ---- several workers --------------------------------------------------------------------------


def _worker() -> None:
    """``python -m tests.test_gradients FOLDER RANK``: the moments as two workers see them."""
    import torch.distributed as dist

    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    result = {}
    for case, shares in SHARES.items():
        batches = toy_batches(*(size for share in shares for size in share))
        first = len(shares[0])
        mine = batches[first:] if rank else batches[:first]
        found = measure(Toy(), NAMES, mine, toy_loss, 6, group)
        result[case] = {
            "layers": [entry.model_dump() for entry in found.layers],
            "loss": found.mean_loss,
            "method": found.method,
        }
    for case, rounds in SHARED_ROUNDS[rank].items():
        model, probing = Toy(), Probing(pairwise=True)
        found = measure_gradients(
            model, find_targets(model, NAMES), rounds, of_rows, FOLDS, FOLDS, probing, group
        )
        result[case] = {
            "layers": [entry.model_dump() for entry in found.layers],
            "folds": [fold.model_dump() for fold in found.folds],
            "pairs": {name: pairs.model_dump() for name, pairs in found.pairs.items()},
            "method": found.method,
        }
    result["limited"] = measure_gradients(
        Toy(),
        find_targets(Toy(), NAMES),
        SHARED_ROUNDS[rank]["folds apart"],
        of_rows,
        FOLDS,
        FOLDS,
        Probing(max_held_bytes=2 * 2 * 72 * 4),
        group,
    ).num_passes
    for case, used in UNLIKE.items():
        model = Toy()
        model.used = used[rank]
        try:
            found = measure(model, NAMES, toy_batches(3, 3)[rank : rank + 1], toy_loss, 6, group)
            result[case] = [entry.moments.std for entry in found.layers]
        except RuntimeError as error:
            result[case] = str(error)
    model = CutOff(cut=rank == 1)
    try:
        measure(model, NAMES, toy_batches(3, 3)[rank : rank + 1], toy_loss, 6, group)
        result["cut off"] = "measured"
    except RuntimeError as error:
        result["cut off"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier(group)  # neither may leave while the other still speaks with it
    dist.destroy_process_group()


SHARES = {
    "one microbatch each": ((2,), (4,)),
    "unequal numbers of microbatches": ((1, 2), (3,)),
    "nothing on the second": ((6,), ()),
}


FIRST, SECOND = [0, 1, 4], [2, 3, 5]  # rows: of fold 0 two and one, none and one, one and one
SHARED_ROUNDS = [
    {
        "folds together": [Round((0, 1, 2), (Microbatch(FIRST, (2, 0, 1)),))],
        "folds apart": [
            Round((0,), (Microbatch([0], (1,)), Microbatch([1], (1,)))),
            Round((1,), ()),
            Round((2,), (Microbatch([4], (1,)),)),
        ],
    },
    {
        "folds together": [Round((0, 1, 2), (Microbatch(SECOND, (1, 1, 1)),))],
        "folds apart": [
            Round((0,), (Microbatch([2], (1,)),)),
            Round((1,), (Microbatch([3], (1,)),)),
            Round((2,), (Microbatch([5], (1,)),)),
        ],
    },
]


UNLIKE = {
    "layers used by one worker only": ([0, 1, 2], [0, 2]),
    "layers in another order": ([0, 1, 2], [2, 1, 0]),
    "a layer used twice by one worker": ([0, 1, 2], [0, 1, 2, 1]),
}


class CutOff(Toy):
    """Forward reaches all layers; the loss of some workers doesn't go back to the second."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            branch = layer["down"](torch.tanh(layer["up"](x)))
            x = x + (branch.detach() if self.cut and number == 1 else branch)
        return x


@pytest.fixture(scope="module")
def of_two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_gradients", str(folder), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", SHARES)
def test_two_workers_measure_what_one_does_and_agree(
    of_two_workers: list[dict[str, Any]], case: str
) -> None:
    first, second = (results[case] for results in of_two_workers)
    assert first == second
    assert first["method"] == ("blocks" if case == "one microbatch each" else "accumulators")
    alone = measure(Toy(), NAMES, toy_batches(6), toy_loss, 6)
    assert first["loss"] == pytest.approx(alone.mean_loss, rel=1e-6)
    layers = [LayerGradient.model_validate(entry) for entry in first["layers"]]
    assert_same(layers, measured(Toy(), toy_batches(6)))


@pytest.mark.parametrize("case", SHARED_ROUNDS[0])
def test_two_workers_measure_folds_and_pairs_as_one_does(
    of_two_workers: list[dict[str, Any]], case: str
) -> None:
    first, second = (results[case] for results in of_two_workers)
    assert first == second
    assert first["method"] == ("blocks" if case == "folds together" else "accumulators")
    alone = measure_folds("all folds in one microbatch", Toy(), Probing(pairwise=True))
    assert_same([LayerGradient.model_validate(e) for e in first["layers"]], alone.layers)
    for found, expected in zip(first["folds"], alone.folds, strict=True):
        fold = Fold.model_validate(found, strict=False)
        assert fold.num_samples == expected.num_samples
        for one, other in zip(fold.moments, expected.moments, strict=True):
            assert one.std == pytest.approx(other.std, rel=TOLERANCE)
    for name, pairs in alone.pairs.items():
        np.testing.assert_allclose(first["pairs"][name]["l1"], pairs.l1, rtol=1e-5)


def test_two_workers_make_the_passes_that_the_fuller_one_needs(
    of_two_workers: list[dict[str, Any]],
) -> None:
    assert [results["limited"] for results in of_two_workers] == [3, 3]


@pytest.mark.parametrize("case", UNLIKE)
def test_workers_whose_forwards_differ_still_sum_what_belongs_together(
    of_two_workers: list[dict[str, Any]], case: str
) -> None:
    """The reference adds both workers' gradients, each of its own way through the layers."""
    parts = []
    for used, batch in zip(UNLIKE[case], toy_batches(3, 3), strict=True):
        model = Toy()
        model.used = used
        parts.append(by_autograd(model, find_targets(model, NAMES), [batch], toy_loss, 6))
    expected = [(parts[0][path] + parts[1][path]).std(correction=0).item() for path in parts[0]]
    for results in of_two_workers:
        assert results[case] == pytest.approx(expected, rel=TOLERANCE)


def test_workers_whose_backwards_differ_say_so_instead_of_mixing_gradients(
    of_two_workers: list[dict[str, Any]],
) -> None:
    for results in of_two_workers:
        assert "all workers must reach the same targets" in results["cut off"]
        assert "layers.1.down" in results["cut off"]


# ---- real models ------------------------------------------------------------------------------

TEXTS = [
    "a gentle film that stays with you",
    "dull",
    "the second half drags badly, although the actors do what they can with thin material",
    "see it twice",
    "not for me",
    "wonderful and strange",
]


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from e2lora.assets import resolve

    folder = resolve("demo:minilm-l6")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder)


def classification_progresses(tokenizer: Any, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    batches, begin = [], 0
    for size in sizes:
        batch = dict(tokenizer(TEXTS[begin : begin + size], padding=True, return_tensors="pt"))
        batches.append({**batch, "labels": torch.arange(begin, begin + size) % 2})
        begin += size
    return batches


def classification_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")


@pytest.mark.parametrize(("sizes", "method"), [((6,), "blocks"), ((1, 3, 2), "accumulators")])
def test_minilm_classification_equals_autograd(
    minilm: tuple[Any, Any], sizes: tuple[int, ...], method: str
) -> None:
    model, tokenizer = minilm
    batches = classification_progresses(tokenizer, sizes)
    used = check_against_autograd(model, ("query", "value"), batches, classification_loss, 6)
    assert used == method


def test_printed_rmi_of_minilm_is_that_of_its_concatenated_gradients(
    minilm: tuple[Any, Any],
) -> None:
    model, tokenizer = minilm
    batches = classification_progresses(tokenizer, (6,))
    targets = find_targets(model, ("query",))
    gradients = by_autograd(model, targets, batches, classification_loss, 6)
    layers = measure(model, ("query",), batches, classification_loss, 6).layers

    def entropy(values: Tensor) -> float:
        return math.log(values.std(correction=0).item()) + 0.5 * math.log(2 * math.pi) + 0.5

    for one, other in itertools.combinations(layers, 2):
        pair = [gradients[entry.target.path].flatten() for entry in (one, other)]
        alone, joint = [entropy(values) for values in pair], entropy(torch.cat(pair))
        expected = (sum(alone) - joint) / min(alone)
        assert rmi_literal(one.moments, other.moments) == pytest.approx(expected, rel=1e-6)


def test_minilm_does_not_depend_on_padding(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    together, apart = (
        measure(
            model,
            ("query", "value"),
            classification_progresses(tokenizer, sizes),
            classification_loss,
            6,
        ).layers
        for sizes in ((6,), (1,) * 6)
    )
    for one, other in zip(together, apart, strict=True):
        assert one.moments.std == pytest.approx(other.moments.std, rel=1e-4)


def test_smollm2_language_model_equals_autograd() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False).eval()
    # rows of one length: the claim is about the targets, not about padding
    rows = torch.tensor([tokenizer(text * 9)["input_ids"][:8] for text in TEXTS[:3]])

    def loss_sum(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for sizes, method in (([3], "blocks"), ([1, 2], "accumulators")):
        batches = rows.split(sizes)
        assert check_against_autograd(model, names, batches, loss_sum, 3 * 7) == method


if __name__ == "__main__":
    _worker()
