"""What export writes is read by other programs alone, and computes what the adapter does."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from safetensors.torch import load_file
from torch import Tensor

import e2lora
from e2lora.adapters import export, is_head, portable, trainable_parameters
from e2lora.adapters.comparison import random_batch
from e2lora.adapters.export import export_adapter
from e2lora.adapters.family import layers_of
from e2lora.adapters.portable import portable_warnings, shortest_endings
from e2lora.records import TrialFolder
from e2lora.training import Reports, run_trial
from jobs.export import main
from tests.kinds import KINDS, SHARINGS, Adapted, Sharing, fill, make_base, output_of
from tests.small import small_trial
from tests.test_train import load_small, plan_of

FORMS = ("peft", "portable", "merged")
SYSTEMS = {  # name → sharing, family, options
    "LoRA": ("own", "lora", {}),
    "E²LoRA": ("E²", "lora", {}),
    "E²ShareLoRA": ("E²ShareLoRA", "lora", {}),
    "E² + shared AB": ("E² + shared AB", "lora", {}),
    "E²LoRA, rsLoRA": ("E² rsLoRA", "lora", {}),
    "E²DoRA": ("E²", "dora", {}),
    "E²LoRA-FA": ("E²", "lora_fa", {}),
    "PiSSA": ("own", "lora", {"init_lora_weights": "pissa"}),
    "E²VeRA": ("E²", "vera", {}),
}
FULL = {"FFT": ("own", "full", {})}
PORTABLE = [system for system in SYSTEMS if system != "E²DoRA"]
KINDS_OF_TEXT = (
    "bert",
    "llama",
    pytest.param("gpt2", marks=pytest.mark.slow),
    pytest.param("t5", marks=pytest.mark.slow),
)
WITHOUT_RANKS = ("rank_pattern", "alpha_pattern", "use_rslora")


@pytest.fixture(autouse=True)
def _rslora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHARINGS, "E² rsLoRA", Sharing({"topology": "e2", "use_rslora": True}))


def saved(
    folder: Path, kind: str, system: str, dtype: torch.dtype = torch.float32, size: float = 1.0
) -> Any:
    """An adapter in ``folder/adapter``, by whose record the base is ``folder/base``.

    Args:
        size: of what training changed, of the head always 1.
    """
    sharing, family, options = {**SYSTEMS, **FULL}[system]
    base = make_base(kind)
    base.model.to(dtype).save_pretrained(folder / "base")
    base.model.name_or_path = str(folder / "base")
    adapted = Adapted(kind, sharing, family, base, **options)
    adapted.model.to(dtype)
    trainable = trainable_parameters(adapted.model)
    start = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    fill(adapted.model)
    for name, parameter in trainable.items():
        if size < 1 and not is_head(name, adapted.model):
            parameter.data.copy_(start[name] + size * (parameter.data - start[name]))
    e2lora.save(adapted.model, folder / "adapter")
    return adapted


def exported(folder: Path, form: Any, **options: Any) -> Path:
    out = folder / form
    export_adapter(folder / "adapter", form, out, **options)
    return out


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def code_of(folder: Path) -> str:
    """The lines of its card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def read_by_peft(folder: Path, kind: str) -> Tensor:
    return output_of(PeftModel.from_pretrained(make_base(kind).model, folder).eval(), kind)


# ---- the same function ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_OF_TEXT)
@pytest.mark.parametrize("system", SYSTEMS)
def test_plain_peft_computes_what_the_adapter_does(kind: str, system: str, tmp_path: Path) -> None:
    adapted = saved(tmp_path, kind, system)
    found = read_by_peft(exported(tmp_path, "peft"), kind)
    torch.testing.assert_close(found, adapted.output(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS_OF_TEXT)
@pytest.mark.parametrize("system", PORTABLE)
def test_portable_form_needs_no_more_than_r_and_alpha(
    kind: str, system: str, tmp_path: Path
) -> None:
    """PEFT with every pattern deleted; and W + (α/r) B A by hand."""
    adapted = saved(tmp_path, kind, system)
    folder = exported(tmp_path, "portable")
    config = config_of(folder)
    assert not any(config.pop(name) for name in WITHOUT_RANKS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    expected = adapted.output()
    torch.testing.assert_close(read_by_peft(folder, kind), expected, rtol=1e-4, atol=2e-4)

    base, tensors = make_base(kind), load_file(folder / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    for name, a in tensors.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if ".lora_A." in name:
            delta = tensors[name.replace("lora_A", "lora_B")] @ a
            weight = base.model.get_submodule(path).weight
            weight.data += delta.T if kind == "gpt2" else delta
        elif ".lora_B." not in name:
            assert path.startswith(KINDS[kind].head)
            base.model.get_parameter(path).data.copy_(a)
    torch.testing.assert_close(output_of(base.model, kind), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS_OF_TEXT)
@pytest.mark.parametrize("system", SYSTEMS)
def test_merged_model_needs_transformers_alone(kind: str, system: str, tmp_path: Path) -> None:
    adapted = saved(tmp_path, kind, system)
    folder = exported(tmp_path, "merged")
    model = type(adapted.base.model).from_pretrained(folder).eval()
    torch.testing.assert_close(output_of(model, kind), adapted.output(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_models_of_images_are_compared_too(kind: str, form: Any, tmp_path: Path) -> None:
    adapted = saved(tmp_path, kind, "E²LoRA")
    done = export_adapter(tmp_path / "adapter", form, tmp_path / "out")
    assert done.comparison is not None
    assert done.comparison.difference.largest < 1e-4 * adapted.output().abs().max().item()


# ---- how the portable form is written ---------------------------------------------------------


def test_target_modules_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    endings = {
        "llama": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "gpt2": ["attn.c_proj", "c_attn"],
        "bert": ["query", "value"],
        "t5": ["q", "wo"],
    }
    for kind, expected in endings.items():
        paths = [target.path for target in Adapted(kind).plan.targets]
        assert shortest_endings(make_base(kind).model, paths) == expected
        assert shortest_endings(Adapted(kind).model.get_base_model(), paths) == expected
    llama = make_base("llama").model
    some = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)]
    assert shortest_endings(llama, some) == ["0.self_attn.q_proj", "2.self_attn.q_proj"]


def test_names_and_configuration_are_those_of_peft(tmp_path: Path) -> None:
    saved(tmp_path, "bert", "E²LoRA")
    folders = [exported(tmp_path, form) for form in ("peft", "portable")]
    plain, portable = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert plain.keys() == portable.keys()
    configs = [config_of(folder) for folder in folders]
    assert configs[0].keys() == configs[1].keys()
    changed = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert changed == {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "modules_to_save",  # PEFT adds every name that a classifier may have
    }
    assert configs[1]["modules_to_save"] == ["classifier"]
    assert configs[1]["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(("alpha", "dtype"), [(16.0, torch.bfloat16), (12.0, torch.float32)])
def test_bf16_adapter_is_not_rounded_when_its_scale_goes_into_b(
    alpha: float, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale 4 moves exponents alone; 3 needs more digits than bfloat16 has."""
    monkeypatch.setattr("tests.kinds.make_plan.__defaults__", (4, alpha))
    adapted = saved(tmp_path, "llama", "E²LoRA", torch.bfloat16)
    tensors = load_file(exported(tmp_path, "portable") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    for path, group in adapted.plan.group_of_target().items():
        layer = adapted.model.get_base_model().get_submodule(path)
        a, b = (tensors[f"base_model.model.{path}.lora_{slot}.weight"] for slot in "AB")
        assert torch.equal(a[: group.r].double(), layer.lora_A["default"].weight.double())
        scaled = alpha / 4 * layer.lora_B["default"].weight.double()
        assert torch.equal(b[:, : group.r].double(), scaled)
        assert not a[group.r :].any()
        assert not b[:, group.r :].any()


def test_limits_of_readers_are_told() -> None:
    assert portable_warnings(16, ()) == []
    assert "--max-lora-rank 64" in portable_warnings(33, ())[0]
    assert "merged form" in portable_warnings(513, ())[0]
    assert "(score)" in portable_warnings(8, ("score",))[0]


@pytest.mark.parametrize("form", FORMS)
def test_lines_of_the_card_load_the_export(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = saved(tmp_path, "bert", "E²LoRA")
    folder = exported(tmp_path, form)
    code = code_of(folder)
    assert "e2lora" not in code
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    found = output_of(names["model"].eval(), "bert")
    torch.testing.assert_close(found, adapted.output(), rtol=1e-4, atol=1e-4)


AUTO = {
    "llama": (AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "gpt2": (AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "t5": (AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "bert": (AutoPeftModelForSequenceClassification, "SEQ_CLS"),
    "vit": (AutoPeftModel, None),
}


@pytest.mark.parametrize("form", ["peft", "portable"])
@pytest.mark.parametrize("kind", AUTO)
def test_auto_classes_of_peft_find_base_and_adapter(
    kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder than the one in which the base was named."""
    adapted = saved(tmp_path, kind, "E²LoRA")
    monkeypatch.chdir(tmp_path)
    folder = exported(tmp_path, form, model="base")
    monkeypatch.chdir("/")
    auto, task = AUTO[kind]
    found = output_of(auto.from_pretrained(folder).eval(), kind)
    torch.testing.assert_close(found, adapted.output(), rtol=1e-4, atol=2e-4)
    assert config_of(folder)["base_model_name_or_path"] == str(tmp_path / "base")
    if form == "portable":
        assert config_of(folder)["task_type"] == task


@pytest.mark.parametrize("form", FORMS)
def test_others_may_read_what_they_may_of_any_file(form: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    before = os.umask(0o027)
    try:
        folder = exported(tmp_path, form)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


# ---- how much of the adapter is there ---------------------------------------------------------


def outputs_in_float32(folder: Path, kind: str, merged: Path) -> list[Tensor]:
    """Of the base, the adapter and the merged model, on the batch of the comparison."""
    base = type(make_base(kind).model).from_pretrained(folder / "base", dtype=torch.bfloat16)
    adapted = e2lora.load(copy.deepcopy(base), folder / "adapter")
    read = type(base).from_pretrained(merged)
    batch = random_batch(base)
    with torch.no_grad():
        return [model.eval().float()(**batch)[0].double() for model in (base, adapted, read)]


def rms(change: Tensor) -> float:
    return float(change.square().mean().sqrt())


@pytest.mark.parametrize(("size", "warns"), [(1.0, False), (0.01, True)])
def test_what_rounding_loses_is_measured_by_what_the_adapter_does(
    size: float, warns: bool, tmp_path: Path
) -> None:
    saved(tmp_path, "llama", "E²LoRA", torch.bfloat16, size)
    done = export_adapter(tmp_path / "adapter", "merged", tmp_path / "out")
    base, adapted, merged = outputs_in_float32(tmp_path, "llama", tmp_path / "out")
    effect, difference = adapted - base, merged - adapted
    assert done.comparison is not None
    for change, expected in (
        (done.comparison.effect, effect),
        (done.comparison.difference, difference),
    ):
        assert change.largest == pytest.approx(float(expected.abs().max()), rel=1e-3)
        assert change.root_mean_square == pytest.approx(rms(expected), rel=1e-3)
    lost = rms(difference) / rms(effect)
    assert done.comparison.lost == pytest.approx(lost, rel=1e-3)
    assert (lost > 0.05) == warns
    told = f"rounding to bfloat16 loses {lost:.0%} of what the adapter does: merge in float32"
    assert [told in warning for warning in done.warnings] == [True] * warns


def test_adapter_that_rounding_removes_is_refused_and_kept_in_float32(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "E²LoRA", torch.bfloat16, 1e-4)
    place = tmp_path / "adapter", "merged"
    with pytest.raises(ValueError, match=r"nearer to the adapter than.*loses 98%.*--dtype float32"):
        export_adapter(*place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = export_adapter(*place, tmp_path / "out", dtype="float32")
    assert done.comparison is not None
    assert done.comparison.lost < 0.01
    assert done.warnings == ()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    base, adapted, merged = outputs_in_float32(tmp_path, "llama", tmp_path / "out")
    assert rms(merged - adapted) < 0.01 * rms(adapted - base)
    names: dict[str, Any] = {}
    exec(code_of(tmp_path / "out").replace('"."', repr(str(tmp_path / "out"))), names)
    assert names["model"].dtype == torch.float32


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    """As W + s B A in float64 is when it is rounded to bfloat16."""
    adapted = saved(tmp_path, "llama", "E²LoRA", torch.bfloat16)
    tensors = load_file(exported(tmp_path, "merged") / "model.safetensors")
    base = make_base("llama").model.to(torch.bfloat16)
    for path, layer in layers_of(adapted.model, adapted.plan).items():
        a, b = (getattr(layer, s)["default"].weight.double() for s in ("lora_A", "lora_B"))
        exact = base.get_submodule(path).weight.double() + layer.scaling["default"] * b @ a
        written = tensors[f"{path}.weight"]
        unequal = (written != exact.bfloat16()).float().mean()
        assert unequal < 0.002, "halfway cases of float32 and float64"


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("system", ["E²LoRA", "PiSSA", "E²VeRA"])
def test_adapter_that_does_nothing_is_exported(
    system: str, dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    """Untrained, but for the head: which is no effect of the adapter."""
    saved(tmp_path, kind, system, dtype, size=0.0)
    for form in FORMS:
        done = export_adapter(tmp_path / "adapter", form, tmp_path / form)
        assert done.comparison is not None
        assert done.warnings == () or form == "portable"
        if system != "PiSSA":
            assert done.comparison.effect.largest == 0
    export_adapter(tmp_path / "adapter", "merged", tmp_path / "rounded", dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 0.01])
def test_fully_trained_model_loses_nothing(size: float, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, "bert", "FFT", dtype, size)
    done = export_adapter(tmp_path / "adapter", "merged", tmp_path / "out")
    assert done.comparison is not None
    assert done.comparison.lost == 0
    assert (done.comparison.effect.largest > 0) == (size > 0)


def test_export_of_nothing_is_noticed_however_little_the_adapter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all that it does lies within the tolerance for rounding."""
    saved(tmp_path, "llama", "E²LoRA", size=1e-5)
    done = export_adapter(tmp_path / "adapter", "portable", tmp_path / "right")
    assert done.comparison is not None
    assert 0 < done.comparison.effect.largest < 3e-4
    right = portable._padded
    monkeypatch.setattr(portable, "_padded", lambda pair, r: [0 * f for f in right(pair, r)])
    with pytest.raises(ValueError, match="nearer to the adapter than the base"):
        export_adapter(tmp_path / "adapter", "portable", tmp_path / "out")


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "family", "form", "reason"),
    [
        ("E²", "dora", "portable", "rescales whole rows"),
        ("LSS only", "randlora", "portable", "full rank"),
        ("own", "full", "peft", "there is no adapter"),
    ],
)
def test_form_that_the_family_lacks_is_refused_with_its_reason(
    sharing: str, family: str, form: Any, reason: str, tmp_path: Path
) -> None:
    e2lora.save(Adapted("llama", sharing, family).model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"can't be exported as '{form}'.*{reason}"):
        export_adapter(tmp_path / "adapter", form, tmp_path / "out")


def test_folder_that_is_there_is_not_written_to(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    with pytest.raises(ValueError, match=r"written to a new folder; .*adapter is there"):
        export_adapter(tmp_path / "adapter", "peft", tmp_path / "adapter")


def test_folder_inside_of_the_adapters_is_not_written_to(tmp_path: Path) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    with pytest.raises(ValueError, match=r"beside the adapter, not into it; .*adapter/x/y is"):
        export_adapter(tmp_path / "adapter", "peft", tmp_path / "adapter" / "x" / "y")
    assert not (tmp_path / "adapter" / "x").exists()


def test_folder_that_can_not_be_made_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    (tmp_path / "file").touch()
    monkeypatch.setattr(export, "_loader", None)
    with pytest.raises(OSError, match=r"would be made in .*file, which.*: Not a dir.*--out"):
        export_adapter(tmp_path / "adapter", "peft", tmp_path / "file" / "below" / "out")


@pytest.mark.parametrize("form", ["peft", "portable"])
def test_dtype_is_chosen_for_merged_weights_only(form: Any, tmp_path: Path) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    with pytest.raises(ValueError, match=r"dtype can be chosen for merged.*got float32"):
        export_adapter(tmp_path / "adapter", form, tmp_path / "out", dtype="float32")


def test_model_of_another_architecture_is_refused_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    make_base("gpt2").model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(export, "_loader", None)
    told = r"LlamaForCausalLM \(llama\); .*other is another, GPT2LMHeadModel \(gpt2\)"
    with pytest.raises(ValueError, match=told):
        export_adapter(
            tmp_path / "adapter", "peft", tmp_path / "out", model=str(tmp_path / "other")
        )


def test_base_without_a_name_must_be_named_and_be_the_right_one(tmp_path: Path) -> None:
    e2lora.save(Adapted("llama").model, tmp_path / "adapter")
    place = (tmp_path / "adapter", "peft", tmp_path / "out")
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM\. Name it with --model"):
        export_adapter(*place)
    base = make_base("llama").model
    base.save_pretrained(tmp_path / "right")
    base.model.norm.weight.data[0] += 1
    base.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="belongs to the base weights it was trained on"):
        export_adapter(*place, model=str(tmp_path / "wrong"))
    assert not (tmp_path / "out").exists()
    export_adapter(*place, model=str(tmp_path / "right"))


def test_export_of_another_function_is_noticed_and_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama", "E²LoRA")
    right = portable._padded

    def wrong(pair: Any, r: int) -> tuple[Tensor, Tensor]:
        a, b = right(pair, r)
        return a, 1.2 * b

    monkeypatch.setattr(portable, "_padded", wrong)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must compute what the adapter does"):
        export_adapter(tmp_path / "adapter", "portable", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    unseen = export_adapter(tmp_path / "adapter", "portable", tmp_path / "out", verify=False)
    assert unseen.comparison is None


# ---- a real model, from the command line ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_adapter_of_a_trial_is_exported_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = load_small()
    config = small_trial("e2", r=4)
    plan = plan_of(config, base, data)
    assert len({group.r for group in plan.groups}) > 1
    place = TrialFolder(tmp_path / "00000")
    run_trial(base, data, plan, config, place, Reports())
    for form in FORMS:
        assert main([str(place.adapter), "--form", form, "--out", str(tmp_path / form)]) == 0
    told = capsys.readouterr()
    changes = {
        what: [float(x) for x in re.findall(rf"{what} +(\S+) +\S+\n", told.out)]
        for what in ("adapter − base", "export − adapter")
    }
    assert max(changes["export − adapter"]) < 1e-4 < min(changes["adapter − base"])
    assert [len(of) for of in changes.values()] == [3, 3]
    for form in ("peft", "portable"):
        assert Path(config_of(tmp_path / form)["base_model_name_or_path"], "config.json").is_file()
        assert "import e2lora" not in code_of(tmp_path / form)
        assert "resolve" not in code_of(tmp_path / form)
    assert "vLLM and llama.cpp refuse adapters that bring a head" in told.err

    batch = data.task.collate(data.validation[:8], base.processor)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    monkeypatch.chdir(place.adapter)
    names: dict[str, Any] = {}
    exec(code_of(place.adapter), names)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) > 30_000
    models = [names["model"], merged]
    for form in ("peft", "portable"):
        bare, _ = load_small()
        models.append(PeftModel.from_pretrained(bare.model, tmp_path / form))
    with torch.no_grad():
        outputs = [model.eval()(**inputs).logits for model in models]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)

    sizes = {"compact": (place.adapter / "adapter.safetensors").stat().st_size}
    for form in FORMS:
        sizes[form] = sum(file.stat().st_size for file in (tmp_path / form).glob("*.safetensors"))
    with capsys.disabled():
        print(f"\nE²LoRA on MiniLM, bytes of weights: {sizes}")
    assert sizes["compact"] < sizes["peft"] < sizes["portable"] < sizes["merged"]

    assert main([str(place.adapter), "--form", "peft", "--out", str(tmp_path / "peft")]) == 2
    assert main([str(tmp_path), "--form", "peft", "--out", str(tmp_path / "new")]) == 2
    errors = capsys.readouterr().err
    assert "error: an export is written to a new folder" in errors
    assert "error: an adapter is a folder with e2lora.json" in errors
