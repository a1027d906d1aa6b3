"""The compact folder: as small as it can be, whole or refused, and its card's lines run."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import e2lora
from e2lora.adapters import count_parameters, trainable_parameters
from e2lora.adapters.adalora import set_kept_ranks
from e2lora.adapters.storage import read_folder, save_adapter
from e2lora.adapters.tensors import MaskedLinear
from e2lora.config import ModelConfig, TextClassificationConfig, TrainConfig, TrialConfig
from e2lora.records import Evaluation
from e2lora.weights import weights_fingerprint
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


def rows_of(folder: Path) -> dict[str, str]:
    """Of the card's first table."""
    card = (folder / "README.md").read_text()
    return dict(re.findall(r"^\| ([^|`]*[^| ]) \| ([^|]*) \|$", card, re.MULTILINE))


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


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("lora", {"init_lora_weights": "pissa"}),
        ("lora", {"init_lora_weights": "olora"}),
        ("lora_ga", {}),
        ("lori", {"lori": {"mask_after": 3, "keep": 0.2}}),
        ("adalora", {}),
        ("gora", {}),
        ("bslora", {}),
        ("ralora", {}),
    ],
)
def test_card_counts_what_was_trained_whatever_is_stored(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """What a started family took from the base lies there, too; masked and pruned values don't."""
    sharing = "own" if "init_lora_weights" in options else "LSS only"
    adapted = saved(tmp_path, sharing=sharing, family=family, **options)
    count = count_parameters(adapted.model)[0]
    rows = rows_of(tmp_path)
    assert rows["trained parameters"].startswith(f"{count:,}, ")
    assert "kept of these" not in rows, "nothing was masked or pruned yet"
    assert rows.get("adapter", "") == {
        "pissa": "init_lora_weights pissa",
        "olora": "init_lora_weights olora",
        "lori": "mask_after 3, keep 0.2",
    }.get(options.get("init_lora_weights", family), "")


def test_card_says_what_masking_kept(tmp_path: Path) -> None:
    adapted = trained("bert", "LSS only", "lori", lori={"mask_after": 3, "keep": 0.2})
    kept = 0
    for module in adapted.model.modules():
        if isinstance(module, MaskedLinear):
            module.mask.copy_(torch.arange(module.mask.numel()).reshape(module.mask.shape) % 5 == 0)
    for mask in {m.mask for m in adapted.model.modules() if isinstance(m, MaskedLinear)}:
        kept += int(mask.sum())
    e2lora.save(adapted.model, tmp_path)
    assert rows_of(tmp_path)["kept of these"] == f"{kept:,} (20%)"


def test_card_says_which_ranks_pruning_kept(tmp_path: Path) -> None:
    """Of each group's 6 the first two, and of one group none."""
    adapted = trained("bert", "LSS only", "adalora")
    groups = adapted.plan.group_of_target()
    some, none = torch.arange(6) < 2, torch.zeros(6, dtype=torch.bool)
    kept = {path: none if g == adapted.plan.groups[0] else some for path, g in groups.items()}
    set_kept_ranks(adapted.model, "default", kept)
    e2lora.save(adapted.model, tmp_path)
    number = len(adapted.plan.groups)
    values = (number - 1) * 2 * (32 + 32 + 1)
    share = values / count_parameters(adapted.model)[0]
    told = f"{values:,} ({share:.0%}), {2 * (number - 1)} of {6 * number} ranks"
    assert rows_of(tmp_path)["kept of these"] == told


def test_card_says_what_differs_from_defaults(tmp_path: Path) -> None:
    saved(tmp_path, sharing="ShareLoRA-A", lora_dropout=0.25)
    assert rows_of(tmp_path)["adapter"] == "a_scope type, lora_dropout 0.25"


def test_others_may_read_what_they_may_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        saved(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {0o640}


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


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("lora", "makes what PEFT or vLLM and llama.cpp or transformers can load"),
        ("randlora", "makes what PEFT or transformers can load"),
        ("hydralora", "Nothing else loads it: PEFT alone has no router of heads; load the adapter"),
    ],
)
def test_card_tells_who_else_can_read_the_adapter(family: str, told: str, tmp_path: Path) -> None:
    saved(tmp_path, family=family, sharing="own")
    assert told in (tmp_path / "README.md").read_text()


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
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not: it is truncated") as caught:
        e2lora.load(base.model, tmp_path)
    assert ".." not in str(caught.value)
    assert str(caught.value).endswith(". Unless you edited it, take another copy.")
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


def edit_record(folder: Path, **adapter: Any) -> None:
    record = json.loads((folder / "e2lora.json").read_text())
    record["adapter"].update(adapter)
    (folder / "e2lora.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("own", "family", "name"),
    [
        ("lora", "dora", "DoRA"),
        ("lora", "adalora", "AdaLoRA"),
        ("dora", "lora", "LoRA"),
        ("lora", "vera", "VeRA"),
        ("lora", "lora_fa", "LoRA-FA"),
    ],
)
def test_record_of_another_family_than_its_weights_is_named(
    own: str, family: str, name: str, tmp_path: Path
) -> None:
    saved(tmp_path, sharing="LSS only", family=own)
    edit_record(tmp_path, family=family)
    base = make_base("bert")
    with pytest.raises(ValueError, match=rf"(as weights of|names) {name}[, ].*is damaged"):
        e2lora.load(base.model, tmp_path)
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


def test_record_with_a_wrong_value_says_where(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_record(tmp_path, lora_dropout=7.0)
    with pytest.raises(ValueError, match=r"e2lora\.json is not.*lora_dropout.*got 7") as caught:
        e2lora.load(make_base("bert").model, tmp_path)
    assert ".." not in str(caught.value)


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


def test_adapter_that_touched_its_base_records_the_type_it_had_then(tmp_path: Path) -> None:
    """Also when the whole was cast since: that is the base which the fingerprint is of."""
    made = Adapted("llama", "own", "lora", init_lora_weights="pissa")
    made.model.bfloat16()
    e2lora.save(made.model, tmp_path)
    record = read_folder(tmp_path)[0]
    assert record.base.dtype == "float32"
    e2lora.load(make_base("llama").model, tmp_path)
