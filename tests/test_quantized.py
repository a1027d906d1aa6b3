"""QLoRA: adapters on a base of four bits compute, train and are stored as on what it means."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from e2lora.adapters import FAMILIES, adapt, require_possible_trial, trainable_parameters
from e2lora.adapters.export import export_adapter
from e2lora.adapters.record import loading_lines
from e2lora.adapters.storage import load_adapter, read_folder, save_adapter
from e2lora.config import AdapterConfig, ModelConfig, TrainConfig, TrialConfig
from e2lora.models import Base, load_base, load_model, reset_head
from e2lora.partitioned import Partitioning, is_partitioned
from e2lora.profile import measure_profile
from e2lora.quantized import is_quantised, require_bitsandbytes
from e2lora.tasks import TrialData, load_task
from e2lora.training.engine import Engine
from e2lora.weights import weights_fingerprint
from tests.conftest import needs_package
from tests.kinds import (
    KINDS,
    SHARINGS,
    SMALL,
    fill,
    loss_of,
    made_up_gradients,
    make_plan,
    output_of,
)
from tests.small import MODEL, small_trial
from tests.toy import by_autograd, measure, require_equal

F32, BF16 = torch.float32, torch.bfloat16
WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 128}  # blocks of 64 weights
WIDE_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 64}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**WIDE, num_hidden_layers=4, num_key_value_heads=2)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**WIDE, num_hidden_layers=4, num_labels=3)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**WIDE, num_hidden_layers=4)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(**WIDE_T5, num_layers=4, num_decoder_layers=3)
    ),
}


def levels() -> np.ndarray:
    """NF4's sixteen, as QLoRA (Dettmers et al., 2023, appendix E) defines them."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    return values / values.max()


def meant(linear: Any) -> Tensor:
    """The weight (out × in) that a quantised layer stands for, by our own arithmetic."""
    state = linear.weight.quant_state
    packed = linear.weight.detach().flatten().numpy()
    numbers = np.stack([packed >> 4, packed & 15], 1).flatten()
    inner = state.state2
    scales = inner.code.numpy()[state.absmax.numpy()]
    scales = scales * np.repeat(inner.absmax.numpy(), inner.blocksize)[: len(scales)]
    scales = scales + state.offset.item()
    weight = levels()[numbers] * np.repeat(scales, state.blocksize)[: len(numbers)]
    return torch.tensor(weight, dtype=F32).view(linear.out_features, linear.in_features)


def with_floats(model: Any, original: Any) -> Any:
    """The plain model with the weights that the quantised one means."""
    plain = copy.deepcopy(original)
    for name, module in model.named_modules():
        if is_quantised(module):
            weight = plain.get_submodule(name).weight
            value = meant(module)
            weight.data.copy_(
                value.T if type(plain.get_submodule(name)) is not nn.Linear else value
            )
    return plain


def in_folder(folder: Path, kind: str) -> Any:
    """A tiny model's checkpoint; of a classifier without its head."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    kept = getattr(model, model.base_model_prefix) if KINDS[kind].head else model
    kept.save_pretrained(folder)
    return model


class Pair:
    """One tiny model twice: quantised, and plain with the weights that this one means."""

    def __init__(self, folder: Path, kind: str = "llama", dtype: torch.dtype = F32) -> None:
        needs_package("bitsandbytes", "qlora")
        self.kind, self.original = kind, in_folder(folder, kind)
        self.config = ModelConfig(name=str(folder), quantization="nf4")
        labels = 3 if KINDS[kind].head else None
        model, head = load_model(self.config, type(self.original), labels, dtype)
        reset_head(model, head, 0)
        reset_head(self.original, head, 0)
        plain = with_floats(model, self.original).to(dtype).requires_grad_(False)
        self.bases = [
            Base(m, None, head, weights_fingerprint(m, skip=head)) for m in (model, plain)
        ]

    def adapted(self, family: str = "lora", sharing: str = "E²", filled: bool = True) -> list[Any]:
        chosen = AdapterConfig(
            family=family,  # type: ignore[arg-type]
            target_modules=KINDS[self.kind].names,
            **SHARINGS[sharing].scopes,  # type: ignore[arg-type]
        ).seeded(0)
        self.adapter = chosen
        self.plan = make_plan(self.bases[0], chosen, SHARINGS[sharing].plan)
        gradients = made_up_gradients(self.plan) if FAMILIES[family].needs_gradients else None
        models = []
        for base in self.bases:
            torch.manual_seed(1)
            adapted = adapt(
                base.model, self.plan, chosen, base.head, gradients=gradients, in_loop=True
            )
            models.append(adapted.eval())
            if filled:
                fill(models[-1])
        return models


# ---- what is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_quantised_base_computes_with_the_weights_that_its_four_bits_mean(
    kind: str, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, kind)
    quantised, plain = (base.model for base in pair.bases)
    layers = {name for name, module in quantised.named_modules() if is_quantised(module)}
    assert len(layers) >= 4 * len(KINDS[kind].names)
    with torch.no_grad():
        outputs = [output_of(model, kind) for model in (quantised, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for name in layers:
        weight = pair.original.get_submodule(name).weight
        apart = (plain.get_submodule(name).weight - weight).norm() / weight.norm()
        assert 0.02 < apart < 0.13, name


def test_fresh_head_is_of_floats_and_the_seeds(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "bert")
    quantised, plain = (base.model for base in pair.bases)
    assert pair.bases[0].head == ("bert.pooler.dense", "classifier")[1:]
    assert type(quantised.classifier) is nn.Linear
    assert torch.equal(quantised.classifier.weight, plain.classifier.weight)


def test_evaluation_changes_no_weights(tmp_path: Path) -> None:
    """Also on a CPU where bitsandbytes would repack them for its own kernel."""
    model = Pair(tmp_path).bases[0].model
    layers = [module for module in model.modules() if is_quantised(module)]
    assert not any(module.support_avx512bf16_for_cpu for module in layers)
    before = [module.weight.detach().clone() for module in layers]
    with torch.no_grad():
        first, second = output_of(model, "llama"), output_of(model, "llama")
    assert torch.equal(first, second)
    for module, weight in zip(layers, before, strict=True):
        assert torch.equal(module.weight, weight)
        assert module.weight.quant_state.nested


def test_fingerprint_shows_scales_too(tmp_path: Path) -> None:
    """Two weights of which one is twice the other have the same four bits."""
    base = Pair(tmp_path).bases[0]
    state = base.model.model.layers[1].self_attn.v_proj.weight.quant_state
    for tensor in (state.absmax, state.state2.absmax, state.offset):
        kept = tensor.clone()
        tensor.add_(1)
        assert weights_fingerprint(base.model) != base.fingerprint
        tensor.copy_(kept)
    assert weights_fingerprint(base.model) == base.fingerprint


@pytest.mark.parametrize(
    ("family", "sharing"),
    [
        ("lora", "E²ShareLoRA"),
        ("lora", "E² + own B"),
        ("dora", "E²"),
        ("lora_fa", "E²"),
        ("lori", "E²"),
        ("vera", "E²"),
        ("randlora", "own"),
        ("rasa", "E²"),
        ("hydralora", "E²"),
        ("bslora", "E²"),
        ("adalora", "LSS only"),
        ("increlora", "LSS only"),
        ("gora", "LSS only"),
        ("ralora", "LSS only"),
    ],
)
def test_adapter_and_its_gradients_are_those_on_floats(
    family: str, sharing: str, tmp_path: Path
) -> None:
    pair = Pair(tmp_path)
    models = pair.adapted(family, sharing)
    for model in models:
        for parameter in trainable_parameters(model).values():
            parameter.data *= 0.2  # random attention of larger weights is saturated
    outputs = [output_of(model, pair.kind) for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for model in models:
        loss_of(model, pair.kind).backward()
    trained = [trainable_parameters(model) for model in models]
    assert list(trained[0]) == list(trained[1])
    for name, parameter in trained[0].items():
        expected = trained[1][name].grad
        assert (expected is None) == (parameter.grad is None), name
        if expected is not None:
            scale = float(expected.abs().max())
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * scale)


def test_gradient_profile_is_autograds_on_floats(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    quantised, plain = (base.model for base in pair.bases)
    batches = [KINDS["llama"].inputs["input_ids"]]

    def loss_sum(model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits.log_softmax(-1)[..., 0].sum()

    for model in (quantised, plain):
        model.enable_input_require_grads()
    names = KINDS["llama"].names
    result = measure(quantised, names, batches, loss_sum, 3)
    targets = [entry.target for entry in result.layers]
    require_equal(result.layers, by_autograd(plain, targets, batches, loss_sum, 3))


def test_profile_of_a_real_model_is_that_of_what_its_bits_mean() -> None:
    needs_package("bitsandbytes", "qlora")
    trial = quantised_trial()
    task = load_task(trial.task)
    loaded = [
        load_base(config, task.auto_class, task.num_labels, F32) for config in (trial.model, MODEL)
    ]
    quantised, plain = loaded
    assert quantised.head == plain.head
    assert quantised.fingerprint != plain.fingerprint
    plain = replace(plain, model=with_floats(quantised.model, plain.model))
    features = (task.features(split, plain.processor) for split in ("train", "validation"))
    data = TrialData(task, *features)
    profiles = [measure_profile(base, data, trial) for base in (quantised, plain)]
    for one, other in zip(*(profile.layers for profile in profiles), strict=True):
        assert one.target == other.target
        assert one.moments.std == pytest.approx(other.moments.std, rel=1e-4)
    assert weights_fingerprint(quantised.model, skip=quantised.head) == quantised.fingerprint


# ---- training ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("stage", "precision", "tolerance"),
    [(0, "fp32", 1e-4), (1, "fp32", 1e-4), (2, "fp32", 1e-4), (1, "bf16", 0.02), (2, "bf16", 0.02)],
)
def test_training_is_that_on_floats_and_leaves_the_base(
    stage: Any, precision: Any, tolerance: float, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, dtype=F32 if precision == "fp32" else BF16)
    training = TrainConfig(
        max_steps=6, learning_rate=2e-3, global_batch_size=3, zero_stage=stage, precision=precision
    )
    inputs = dict(KINDS["llama"].inputs)
    inputs["labels"] = inputs["input_ids"]
    curves = []
    for model in pair.adapted("lora", "E²ShareLoRA", filled=False):
        engine = Engine(model, pair.adapter, training)
        losses = []
        for step in range(training.num_steps):
            loss = engine.module(**inputs).loss.float()
            losses.append(loss.item())
            engine.backward(loss)
            engine.micro_step(step)
        engine.close()
        model.unload()
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=tolerance)
    assert curves[0][-1] < curves[0][0] - 0.02
    base = pair.bases[0]
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


@pytest.mark.usefixtures("one_process")
def test_partitioned_base_of_four_bits_is_the_same_base_and_trains_the_same(
    tmp_path: Path,
) -> None:
    pair = Pair(tmp_path)
    spread, head = load_model(
        pair.config, LlamaForCausalLM, None, F32, partitioning=Partitioning(F32)
    )
    assert is_partitioned(spread)
    assert weights_fingerprint(spread) == pair.bases[0].fingerprint
    pair.bases[1] = Base(spread, None, head, pair.bases[0].fingerprint)
    inputs = dict(KINDS["llama"].inputs)
    inputs["labels"] = inputs["input_ids"]
    curves = []
    for stage, model in zip((1, 3), pair.adapted("lora", "E²", filled=False), strict=True):
        training = TrainConfig(
            max_steps=4, learning_rate=2e-3, global_batch_size=3, zero_stage=stage
        )
        engine = Engine(model, pair.adapter, training)
        curves.append([])
        for step in range(training.num_steps):
            loss = engine.module(**inputs).loss
            curves[-1].append(loss.item())
            engine.backward(loss)
            engine.micro_step(step)
        engine.close()
        model.unload()
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert weights_fingerprint(spread) == pair.bases[0].fingerprint


# ---- stored -----------------------------------------------------------------------------------


def test_stored_adapter_is_loaded_on_four_bits_by_its_cards_own_lines(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "model", "bert")
    model = pair.adapted()[0]
    expected = output_of(model, "bert")
    folder = tmp_path / "adapter"
    save_adapter(folder, model, pair.bases[0], pair.plan, pair.adapter)
    record, *_ = read_folder(folder)
    assert record.base.model is not None
    assert record.base.model.quantization == "nf4"
    lines = loading_lines(record.base, head=record.head)
    assert lines in (folder / "README.md").read_text()
    assert "NF4" in (folder / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(lines.replace('(base, ".")', f"(base, {str(folder)!r})"), names)
    again = names["model"].eval()
    assert torch.equal(output_of(again, "bert"), expected)
    assert len(trainable_parameters(again)) == len(trainable_parameters(model))


def test_adapter_of_four_bits_is_not_taken_for_one_of_floats(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "model")
    save_adapter(tmp_path / "adapter", pair.adapted()[0], pair.bases[0], pair.plan, pair.adapter)
    with pytest.raises(ValueError, match="belongs to the base weights it was trained on"):
        load_adapter(copy.deepcopy(pair.original), tmp_path / "adapter")


def test_export_for_peft_computes_the_same_on_four_bits(tmp_path: Path) -> None:
    pair = Pair(tmp_path / "model")
    save_adapter(tmp_path / "adapter", pair.adapted()[0], pair.bases[0], pair.plan, pair.adapter)
    for form in ("peft", "portable"):
        done = export_adapter(tmp_path / "adapter", form, tmp_path / form)  # type: ignore[arg-type]
        assert done.comparison is not None
        assert done.comparison.difference.largest < 1e-4
        assert "BitsAndBytesConfig(" in (tmp_path / form / "README.md").read_text()
    with pytest.raises(ValueError, match="rounded to the base's four bits"):
        export_adapter(tmp_path / "adapter", "merged", tmp_path / "merged")


# ---- what is refused --------------------------------------------------------------------------


def quantised_trial(adapter: AdapterConfig | None = None, **training: Any) -> TrialConfig:
    trial = small_trial(**training)
    changes: dict[str, Any] = {"model": MODEL.model_copy(update={"quantization": "nf4"})}
    if adapter:
        changes["adapter"] = adapter
    return trial.model_copy(update=changes)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "full"},
        {"family": "lora_ga"},
        *({"init_lora_weights": start} for start in ("pissa", "olora")),
    ],
    ids=str,
)
def test_what_changes_base_weights_is_refused_before_anything_is_loaded(
    options: dict[str, Any],
) -> None:
    names = () if options.get("family") == "full" else ("query", "value")
    adapter = AdapterConfig(target_modules=names, **options)
    assert FAMILIES[adapter.family].touches_base(adapter)
    with pytest.raises(ValueError, match=r"quantised weights are frozen.*quantization='nf4'"):
        require_possible_trial(quantised_trial(adapter))
    require_possible_trial(quantised_trial())


def test_layer_that_would_be_computed_wrong_on_a_cpu_is_refused(tmp_path: Path) -> None:
    needs_package("bitsandbytes", "qlora")
    KINDS["llama"].build(2).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), quantization="nf4")
    with pytest.raises(ValueError, match=r"multiple of 64 inputs; model\.layers.*takes 32"):
        load_model(config, LlamaForCausalLM, None, F32)


def test_missing_package_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("e2lora.quantized.find_spec", lambda name: None)
    config = MODEL.model_copy(update={"quantization": "nf4"})
    with pytest.raises(ValueError, match=r"pip install 'e2lora\[qlora\]'"):
        load_base(config, AutoModelForSequenceClassification, 2, F32)


def test_package_that_is_there_is_found() -> None:
    needs_package("bitsandbytes", "qlora")
    assert importlib.util.find_spec("bitsandbytes")
    require_bitsandbytes()
