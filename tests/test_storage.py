"""The compact folder: as small as it can be, whole or refused, and its card's lines run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import e2lora
from e2lora.adapters import trainable_parameters
from e2lora.adapters.storage import read_folder, save_adapter
from e2lora.config import ModelConfig, TextClassificationConfig, TrainConfig, TrialConfig
from e2lora.models import weights_fingerprint
from e2lora.records import Evaluation
from tests.kinds import KINDS, SHARINGS, Adapted, fill, make_base, output_of


def trained(kind: str = "bert", sharing: str = "E²", family: str = "lora", **options: Any) -> Any:
    adapted = Adapted(kind, sharing, family, **options)
    fill(adapted.model)
    return adapted


def saved(folder: Path, **options: Any) -> Any:
    adapted = trained(**options)
    e2lora.save(adapted.model, folder)
    return adapted


def saved_with_its_base(folder: Path, kind: str = "bert", **options: Any) -> tuple[Any, Path]:
    """The base as a folder of transformers, by which the adapter's record names it."""
    base = make_base(kind)
    base.model.save_pretrained(folder / "base")
    base.model.name_or_path = str(folder / "base")
    adapted = trained(kind, base=base, **options)
    e2lora.save(adapted.model, folder / "adapter")
    return adapted, folder / "adapter"


def trial_of(adapted: Any) -> TrialConfig:
    return TrialConfig(
        model=ModelConfig(name="some/model", revision="abc", config_overrides={"layer_drop": 0.1}),
        task=TextClassificationConfig(data="some/data", subset="part"),
        adapter=adapted.config,
        plan=adapted.plan.options,
        training=TrainConfig(max_steps=100, learning_rate=3e-3),
        seed=11,
    )


# ---- how large --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_is_a_header_and_the_trained_bytes(
    kind: str, sharing: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    adapted = trained(kind, sharing)
    adapted.model.to(dtype)
    e2lora.save(adapted.model, tmp_path)
    content = (tmp_path / "adapter.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    parameters = adapted.model.get_nb_trainable_parameters()[0]
    assert len(content) == 8 + header + parameters * dtype.itemsize
    names = json.loads(content[8 : 8 + header])
    longest = max(len(target.path) for target in adapted.plan.targets)
    spent = sum(len(name) for name in names)
    assert spent <= len(names) * (longest + len(".lora_A.weight") + len("modules_to_save."))
    assert "__metadata__" not in names


def test_magnitudes_of_dora_lie_there_once_too(tmp_path: Path) -> None:
    adapted = saved(tmp_path, kind="llama", family="dora")
    stored = load_file(tmp_path / "adapter.safetensors")
    assert (
        sum(math.prod(tensor.shape) for tensor in stored.values())
        == (adapted.model.get_nb_trainable_parameters()[0])
    )


# ---- what is written beside -------------------------------------------------------------------


def test_record_says_how_the_base_is_loaded_again(tmp_path: Path) -> None:
    adapted, folder = saved_with_its_base(tmp_path)
    base = read_folder(folder)[0].base
    assert base.model == ModelConfig(name=str(tmp_path / "base"))
    assert (base.architecture, base.num_labels) == ("BertForSequenceClassification", 3)
    assert (base.dtype, base.weights_fingerprint) == ("float32", adapted.base.fingerprint)


def test_record_of_a_trial_takes_the_model_from_its_configuration(tmp_path: Path) -> None:
    adapted = trained()
    trial = trial_of(adapted)
    save_adapter(tmp_path, adapted.model, adapted.base, adapted.plan, adapted.config, trial)
    assert read_folder(tmp_path)[0].base.model == trial.model


def test_card_of_a_trial_tells_what_was_trained_and_how_it_went(tmp_path: Path) -> None:
    adapted = trained(sharing="E²")
    evaluation = Evaluation(step=100, metrics={"accuracy": 0.8125, "loss": 0.4})
    save_adapter(
        tmp_path,
        adapted.model,
        adapted.base,
        adapted.plan,
        adapted.config,
        trial_of(adapted),
        evaluation,
    )
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/model\n")
    assert "E²LoRA, r = 4" in card
    assert "| some/model at abc (BertForSequenceClassification, float32" in card
    assert "| at step 100 | accuracy 0.8125, loss 0.4 |" in card
    assert "| text_classification, data some/data, subset part |" in card
    assert "11 (trial), 0 (gradient profile)" in card
    trunk = sum(
        parameter.numel()
        for name, parameter in trainable_parameters(adapted.model).items()
        if "lora_" in name
    )
    share = trunk / adapted.plan.lora_parameters
    assert f"{trunk:,}, {share:.0%} of LoRA's {adapted.plan.lora_parameters:,}" in card
    assert "| head | classifier: 99 parameters |" in card
    for module_type in adapted.plan.module_types:
        groups = adapted.plan.groups_of(module_type)
        ranks = " ".join(str(group.r) for group in groups)
        row = rf"\| `{re.escape(module_type)}` \| {len(groups)} \| [-\d ]+ \| {ranks} \|"
        assert re.search(row, card)
    spent = sum(budget.spent for budget in adapted.plan.budgets)
    assert f"{spent:,} are spent" in card
    assert 'revision="abc",\n    num_labels=3,\n    layer_drop=0.1,' in card


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
@pytest.mark.parametrize("family", ["lora", "lora_fa"])
def test_lines_of_the_card_load_the_adapter(
    kind: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, folder = saved_with_its_base(tmp_path, kind, family=family)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(output_of(names["model"].eval(), kind), adapted.output())


def test_card_without_a_name_for_the_base_says_so(tmp_path: Path) -> None:
    saved(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model:" not in card
    assert '"BASE_MODEL"' in card


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e2lora.json", "plan.json", "adapter.safetensors"])
def test_missing_part_is_named(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {re.escape(name)}\. Name the `adapter`"):
        e2lora.load(make_base("bert").model, tmp_path)


@pytest.mark.parametrize("version", [1, 3, None])
def test_record_of_another_version_is_refused(version: int | None, tmp_path: Path) -> None:
    saved(tmp_path)
    record = json.loads((tmp_path / "e2lora.json").read_text())
    record["version"], record["something"] = version, "new"
    (tmp_path / "e2lora.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"version {version}, this program reads 2.*that wrote"):
        e2lora.load(make_base("bert").model, tmp_path)


@pytest.mark.parametrize("name", ["e2lora.json", "plan.json", "adapter.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_part_is_refused_and_the_base_left_alone(
    name: str, share: float, tmp_path: Path
) -> None:
    saved(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    base = make_base("bert")
    with pytest.raises(ValueError, match=r"must be whole.*take another copy"):
        e2lora.load(base.model, tmp_path)
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    assert not [path for path, _ in base.model.named_modules() if "lora" in path]


@pytest.mark.parametrize("damage", ["lacks", "has", "shape"])
def test_weights_that_do_not_fit_are_refused_and_the_base_is_bare_again(
    damage: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    file = tmp_path / "adapter.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    if damage == "lacks":
        del tensors[name]
    elif damage == "has":
        tensors[name.replace("layer.", "layer.9")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, 1:].clone()
    save_file(tensors, file)
    base = make_base("bert")
    with pytest.raises(ValueError, match=r"fit the plan exactly.*layer.*damaged"):
        e2lora.load(base.model, tmp_path)
    assert not [path for path, _ in base.model.named_modules() if "lora" in path]
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


def test_base_in_another_type_is_told_from_another_base(tmp_path: Path) -> None:
    base = make_base("bert")
    base.model.to(torch.bfloat16)
    adapted = trained(base=base)
    e2lora.save(adapted.model, tmp_path)
    with pytest.raises(ValueError, match=r"was bfloat16, this is float32.*dtype=torch\.bfloat16"):
        e2lora.load(make_base("bert").model, tmp_path)
    again = make_base("bert")
    again.model.to(torch.bfloat16)
    assert torch.equal(
        output_of(e2lora.load(again.model, tmp_path).eval(), "bert"), adapted.output()
    )
    other = make_base("bert", num_layers=5).model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"belongs to the base weights.*Load that base model"):
        e2lora.load(other, tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A folder whose weights are a pickle under the right name is refused as damaged."""
    saved(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="must be whole"):
        e2lora.load(make_base("bert").model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_changed_its_base_is_saved_with_the_fingerprint_from_before(
    init: str, tmp_path: Path
) -> None:
    adapted = trained("llama", "own", init_lora_weights=init)
    e2lora.save(adapted.model, tmp_path)
    loaded = e2lora.load(make_base("llama").model, tmp_path).eval()
    torch.testing.assert_close(output_of(loaded, "llama"), adapted.output(), rtol=1e-4, atol=1e-4)
    assert KINDS["llama"].head == ()
