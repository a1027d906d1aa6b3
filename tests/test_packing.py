"""Packed rows give the loss and gradients of padded ones; a model that mixes rows is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from e2lora.config import ModelConfig, SftConfig, TextClassificationConfig, TrainConfig
from e2lora.data import Batches, require_packs
from e2lora.models import load_base
from e2lora.tasks import TrialData, load_task, require_can_pack
from e2lora.tasks.packing import attends_flat, first_fit, packed
from tests.conftest import data_folder, model_folder
from tests.kinds import KINDS, SMALL
from tests.test_sft import BOS, EOS, byte_tokenizer

GROUPED = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2}
OTHER_NAMES = {"vocab_size": 64, "initializer_range": 0.2}

# A window narrower than the rows; experts.
APART: dict[str, Any] = {
    "llama": lambda: KINDS["llama"].build(2),
    "gpt2": lambda: KINDS["gpt2"].build(2),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_hidden_layers=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4)),
}
# Of transformers 5.20–5.23: these make their masks without position ids, or have a state.
MIXING: dict[str, Any] = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            word_embed_proj_dim=32,
            vocab_size=64,
            init_std=0.2,
        )
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(hidden_size=32, n_head=4, n_layer=2, **OTHER_NAMES)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, **OTHER_NAMES)
    ),
}


def build(kind: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    model = (APART | MIXING)[kind]().eval().to(dtype)
    if kind in APART:
        model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("data")
    row = {"prompt": "p", "answer": "a"}
    (folder / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return load_task(SftConfig(data=str(folder), validation_size=1))


TOKENIZER = byte_tokenizer(bos_token=BOS, eos_token=EOS)
PROMPT_TOKENS = 2


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random tokens; those after the first two are supervised."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = rng.integers(2, 64, length).tolist()
        labels = [-100] * PROMPT_TOKENS + ids[PROMPT_TOKENS:]
        rows.append({"input_ids": ids, "labels": labels[:length]})
    return rows


def trial_data(task: Any, rows: list[dict[str, Any]]) -> TrialData:
    return TrialData(task, rows, rows[:1])


# ---- layout -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 90))
def test_first_fit_places_every_row_once_within_the_capacity(
    lengths: list[int], capacity: int
) -> None:
    sequences = first_fit(lengths, capacity)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in rows) for rows in sequences]
    assert max(filled) <= capacity
    for k, rows in enumerate(sequences):
        for row in rows:
            assert all(size + lengths[row] > capacity for size in filled[:k]), (
                "in the first it fits"
            )


@settings(deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=12), st.booleans())
def test_packed_batch_holds_every_row_whole_with_positions_of_its_own(
    lengths: list[int], one_sequence: bool
) -> None:
    rows = rows_of(lengths)
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    batch = {k: v.numpy() for k, v in packed(ids, labels, 1, -100, one_sequence).items()}
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    width = batch["input_ids"].shape[1]
    assert width == (sum(lengths) if one_sequence else max(lengths))
    if one_sequence:
        assert len(batch["input_ids"]) == 1
    found = []
    for tokens, targets, positions in zip(*batch.values(), strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), width]
        for begin, end in pairwise(starts):
            assert positions[begin:end].tolist() == list(range(end - begin))
            part = tokens[begin:end].tolist()
            while part[-1] == 1:  # padding; no row holds this token
                part.pop()
            found.append((part, targets[begin : begin + len(part)].tolist()))
            assert set(targets[begin + len(part) : end].tolist()) <= {-100}
    assert sorted(found) == sorted(zip(ids, labels, strict=True))


def test_first_token_of_a_row_is_never_asked_of_the_row_before() -> None:
    batch = packed([[5, 6], [7, 8]], [[5, 6], [7, 8]], 1, -100, one_sequence=True)
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]


# ---- losses and gradients ---------------------------------------------------------------------


def loss_and_gradients(task: Any, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    weights = [w for w in model.parameters() if w.requires_grad]
    loss = task.loss_sum(model, batch)
    return loss, torch.autograd.grad(loss, weights, allow_unused=True)


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("one_sequence", [False, True])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_rows(
    task: Any, kind: str, attention: str, one_sequence: bool
) -> None:
    rows, model = rows_of([9, 3, 14, 5, 5, 8, 2]), build(kind, attention=attention)
    batch = task.pack(rows, TOKENIZER, one_sequence)
    assert len(batch["input_ids"]) == (1 if one_sequence else 4)
    loss, gradients = loss_and_gradients(task, model, batch)
    expected, expected_gradients = loss_and_gradients(task, model, task.collate(rows, TOKENIZER))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            assert (gradient - other).norm() <= 1e-5 * other.norm()


def test_rows_without_company_are_not_masked_at_all(task: Any) -> None:
    """So attention that is causal by itself needs no mask, though rows are padded."""
    model, rows = build("llama", attention="sdpa"), rows_of([9, 8, 7])
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, options: seen.append(options["attention_mask"]), with_kwargs=True
        )
    task.loss_sum(model, task.pack(rows, TOKENIZER))
    task.loss_sum(model, task.pack(rows_of([9, 4, 5]), TOKENIZER))
    assert [mask is None for mask in seen] == [True, True, False, False]


def test_batches_of_a_trial_are_packed_when_it_says_so(task: Any) -> None:
    data = trial_data(task, rows_of([3, 9, 4, 7, 5, 2, 8, 6]))
    options = {"max_steps": 2, "learning_rate": 0.1, "global_batch_size": 8}
    plain, packing, flat = (
        Batches(data, TOKENIZER, TrainConfig(**options, packing=p), seed=0, one_sequence=one).at(0)
        for p, one in ((False, False), (True, False), (True, True))
    )
    sizes = [batch.microbatches[0]["input_ids"].shape for batch in (plain, packing, flat)]
    assert [tuple(size) for size in sizes] == [(8, 9), (5, 9), (1, 44)]
    for batch in (plain, packing, flat):
        assert batch.num_tokens == 44
        assert batch.num_supervised == 44 - 8 * PROMPT_TOKENS
        (micro,) = batch.microbatches
        assert int((micro["labels"] != -100).sum()) == batch.num_supervised
    assert "attention_mask" not in packing.microbatches[0]


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", APART)
def test_model_that_keeps_rows_apart_is_let_through(
    task: Any, kind: str, attention: str, dtype: torch.dtype
) -> None:
    model = build(kind, dtype, attention).train()
    require_packs(model, trial_data(task, rows_of([5, 9, 12])), TOKENIZER)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXING)
def test_model_that_mixes_rows_is_refused(task: Any, kind: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype).train()
    message = rf"keep the rows.*apart; {type(model).__name__} .*logits change by \d.*Set `packing=F"
    with pytest.raises(ValueError, match=message):
        require_packs(model, trial_data(task, rows_of([5, 9, 12])), TOKENIZER)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_counts_positions_on_is_refused(
    task: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its attention keeps rows apart: GPT-2 learns a vector for every position."""
    model = build("gpt2", dtype)
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(
        model.transformer.wpe,
        "forward",
        lambda positions: embed(torch.arange(positions.shape[-1]).expand(positions.shape)),
    )
    with pytest.raises(ValueError, match=r"logits differ by \d.*from those it has alone\. Set"):
        require_packs(model, trial_data(task, rows_of([5, 9, 12])), TOKENIZER)


def test_model_without_position_ids_is_refused(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = model.forward

    def strict(input_ids: Tensor, use_cache: bool) -> Any:
        return forward(input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", strict)
    with pytest.raises(ValueError, match=r"takes no position ids \(.*position_ids.*\)\. Set"):
        require_packs(model, trial_data(task, rows_of([5, 9, 12])), TOKENIZER)


class Flat:
    """A model whose attention tells rows apart in a single sequence only, as flash attention."""

    def __init__(self, model: Any, attention: str) -> None:
        self.model = model
        self.config = SimpleNamespace(_attn_implementation=attention)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any
    ) -> Any:
        told = position_ids if len(input_ids) == 1 else None
        return self.model(input_ids, position_ids=told, **options)


def test_attention_that_tells_rows_apart_in_one_sequence_gets_one(task: Any) -> None:
    data = trial_data(task, rows_of([5, 9, 12]))
    flash = Flat(build("llama"), "flash_attention_2")
    assert attends_flat(flash)
    require_packs(flash, data, TOKENIZER)
    unknown = Flat(build("llama"), "sdpa")
    assert not attends_flat(unknown)
    with pytest.raises(ValueError, match="keep the rows of a sequence apart"):
        require_packs(unknown, data, TOKENIZER)


def test_task_that_asks_about_whole_rows_cannot_be_packed(tmp_path: Path) -> None:
    config = TextClassificationConfig(data="anything")
    with pytest.raises(ValueError, match=r"task 'text_classification' asks.*Set `packing=False`"):
        require_can_pack(config)
    require_can_pack(SftConfig(data="anything"))
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: Any = load_task(TextClassificationConfig(data=str(tmp_path), validation_size=2))
    features = [{"input_ids": [1], "labels": 0}]
    training = TrainConfig(max_steps=1, learning_rate=0.1, packing=True)
    for act in (
        lambda: task.pack(features, TOKENIZER),
        lambda: Batches(TrialData(task, features, features), TOKENIZER, training, seed=0),
    ):
        with pytest.raises(ValueError, match=r"'text_classification' asks"):
            act()


# ---- a real model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_learns_from_packed_gsm8k_what_it_learns_from_padded() -> None:
    config = SftConfig(data=data_folder("gsm8k"), prompt_column="question", validation_split="test")
    task: Any = load_task(config)
    base = load_base(
        ModelConfig(name=model_folder("smollm2-135m")), task.auto_class, None, torch.float32
    )
    rows = task.features("validation", base.processor)
    require_packs(base.model, trial_data(task, rows), base.processor)
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    room = len(ordered[0]["input_ids"]) + len(ordered[1]["input_ids"])
    chosen = [*ordered[:4], next(row for row in ordered if len(row["input_ids"]) >= room)]
    weight = base.model.model.layers[3].self_attn.q_proj.weight.requires_grad_()
    batch = task.pack(chosen, base.processor)
    assert len(batch["input_ids"]) < len(chosen)
    loss = task.loss_sum(base.model, batch)
    expected = task.loss_sum(base.model, task.collate(chosen, base.processor))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,), (other,) = (torch.autograd.grad(total, weight) for total in (loss, expected))
    assert float((gradient - other).norm() / other.norm()) < 1e-5
