"""The probe's moments against plain autograd; nothing of the probe stays on the model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2lora.gradients import BLOCK_ROWS, measure_moments
from e2lora.models import find_targets
from e2lora.moments import LayerGradient, Moments, Target, require_usable
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


def check_against_autograd(
    model: nn.Module,
    names: Sequence[str],
    microbatches: Sequence[Any],
    loss_sum: LossSum,
    num_supervised: int,
) -> str:
    """Measure, compare, and return the method that was used."""
    targets = find_targets(model, names)
    layers, loss, method = measure_moments(model, targets, microbatches, loss_sum, num_supervised)
    expected = by_autograd(model, targets, microbatches, loss_sum, num_supervised)
    require_equal(layers, expected)
    require_usable(layers)
    with torch.no_grad():
        total = sum(loss_sum(model, batch).item() for batch in microbatches)
    assert loss == pytest.approx(total / num_supervised, rel=1e-6)
    return method


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


def measured(model: nn.Module, batches: Sequence[Tensor], group: Any = None) -> list[LayerGradient]:
    layers, _, _ = measure_moments(model, find_targets(model, NAMES), batches, toy_loss, 6, group)
    return layers


def assert_same(layers: Sequence[LayerGradient], others: Sequence[LayerGradient]) -> None:
    assert [entry.target for entry in layers] == [entry.target for entry in others]
    for one, other in zip(layers, others, strict=True):
        for name in Moments.model_fields:
            value, scale = getattr(other.moments, name), other.moments.mean_abs
            assert getattr(one.moments, name) == pytest.approx(
                value, rel=TOLERANCE, abs=TOLERANCE * scale
            )


def test_mean_loss_is_divided_once_by_the_given_number() -> None:
    model, targets = Toy(), find_targets(Toy(), NAMES)
    _, once, _ = measure_moments(model, targets, toy_batches(6), toy_loss, 6)
    layers, half, _ = measure_moments(model, targets, toy_batches(6), toy_loss, 12)
    assert half == pytest.approx(once / 2)
    for one, other in zip(layers, measured(model, toy_batches(6)), strict=True):
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
    layers, _, _ = measure_moments(model, targets, batches, toy_loss, 6)
    require_equal(layers, {t.path: seen[t.path] for t in targets})


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

    targets = find_targets(model, NAMES)
    with pytest.raises(RuntimeError, match="as if out of") if fails else nullcontext():
        measure_moments(model, targets, toy_batches(2, 4), loss, 6)
    assert set(modes) == {False}, "the loss is taken in evaluation mode"
    assert model.training == training
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, weights[name])
    assert not model(toy_batches(6)[0]).requires_grad


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
        require_usable(layers)


def test_loss_that_reaches_no_target_at_all_names_them() -> None:
    model = Toy()
    model.used = []
    with pytest.raises(ValueError, match=r"6 got none: layers\.0\.up"):
        require_usable(measured(model, toy_batches(6)))


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
        layers, loss, method = measure_moments(
            Toy(),
            find_targets(Toy(), NAMES),
            batches[first:] if rank else batches[:first],
            toy_loss,
            6,
            group,
        )
        result[case] = {
            "layers": [entry.model_dump() for entry in layers],
            "loss": loss,
            "method": method,
        }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier(group)  # neither may leave while the other still speaks with it
    dist.destroy_process_group()


SHARES = {
    "one microbatch each": ((2,), (4,)),
    "unequal numbers of microbatches": ((1, 2), (3,)),
    "nothing on the second": ((6,), ()),
}


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
    assert first["method"] == "accumulators"
    _, loss, _ = measure_moments(Toy(), find_targets(Toy(), NAMES), toy_batches(6), toy_loss, 6)
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    layers = [LayerGradient.model_validate(entry) for entry in first["layers"]]
    assert_same(layers, measured(Toy(), toy_batches(6)))


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


def classification_batches(tokenizer: Any, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
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
    batches = classification_batches(tokenizer, sizes)
    used = check_against_autograd(model, ("query", "value"), batches, classification_loss, 6)
    assert used == method


def test_minilm_does_not_depend_on_padding(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    targets = find_targets(model, ("query", "value"))
    (together, _, _), (apart, _, _) = (
        measure_moments(
            model, targets, classification_batches(tokenizer, sizes), classification_loss, 6
        )
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
