"""Folds, activation checkpointing, pairs of layers and parts of projections: as by autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from e2lora.gradients import (
    BLOCK_ROWS,
    Measurement,
    Probing,
    held_bytes,
    measure_gradients,
)
from e2lora.targets import find_targets
from tests.toy import (
    FOLDS,
    NAMES,
    ROUNDS,
    TOLERANCE,
    Toy,
    assert_same,
    by_autograd,
    measure,
    measure_folds,
    measured,
    one_fold,
    toy_batches,
    toy_loss,
)

# ---- folds ------------------------------------------------------------------------------------


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
