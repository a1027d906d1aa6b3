"""The probe's moments against plain autograd; nothing of the probe stays on the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2lora.gradients import (
    BLOCK_ROWS,
    measure_gradients,
)
from e2lora.moments import require_usable
from e2lora.partition import rmi_literal
from e2lora.targets import find_targets
from tests.conftest import model_folder
from tests.toy import (
    NAMES,
    Toy,
    assert_same,
    by_autograd,
    check_against_autograd,
    measure,
    measured,
    one_fold,
    require_equal,
    toy_batches,
    toy_loss,
)


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
