"""Two processes that share the rows measure what one does, or say that they can't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2lora.gradients import (
    Microbatch,
    Probing,
    Round,
    measure_gradients,
)
from e2lora.moments import Fold, LayerGradient
from e2lora.targets import find_targets
from tests.toy import (
    FOLDS,
    NAMES,
    TOLERANCE,
    Toy,
    assert_same,
    by_autograd,
    measure,
    measure_folds,
    measured,
    of_rows,
    toy_batches,
    toy_loss,
)

ROOT = Path(__file__).resolve().parents[1]


def _worker() -> None:
    """``python -m tests.test_gradients_of_workers FOLDER RANK``: what two workers see."""
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
            [sys.executable, "-m", "tests.test_gradients_of_workers", str(folder), str(rank)],
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


if __name__ == "__main__":
    _worker()
