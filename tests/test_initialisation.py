"""Where A and B of the LoRA family start; and adapters that change their base for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.starting import Started
from e2lora.adapters.storage import load_adapter
from e2lora.config import ExplicitGroup, GroupSpec, TrialConfig
from e2lora.models import Base
from e2lora.plan import build_plan
from e2lora.records import TrialFolder
from e2lora.resident import Resident
from e2lora.targets import find_targets, is_transposed
from e2lora.training import Reports, TrialStopped, run_trial
from e2lora.weights import weights_fingerprint
from tests.kinds import (
    ALPHA,
    KINDS,
    SHARINGS,
    Adapted,
    R,
    fill,
    loss_of,
    make_base,
    make_plan,
    output_of,
)
from tests.small import small_trial

CHANGING = ("pissa", "pissa_niter_8", "olora")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest change of a fresh adapter to the outputs, relative to the largest of them."""
TRAINED = 1e-4
"""The same in float32 once it is trained: its values are larger then."""
every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
every_changing = pytest.mark.parametrize("init", CHANGING)
every_type = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> Base:
    base = make_base(kind)
    base.model.to(dtype)
    return Base(base.model, None, base.head, weights_fingerprint(base.model, skip=base.head))


def adapted_by(
    init: str, kind: str = "llama", dtype: torch.dtype = torch.float32, sharing: str = "own"
) -> Adapted:
    return Adapted(kind, sharing, base=base_of(kind, dtype), init_lora_weights=init)


def weight_of(model: Any, path: str) -> Tensor:
    """The base weight of a target as (out × in), below an adapter or without one."""
    module = model.get_submodule(path)
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return module.weight.detach().T if is_transposed(module) else module.weight.detach()


def difference(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs().max() / other.abs().max()).detach())


def product(layer: Any, name: str = "default") -> Tensor:
    b, a = layer.lora_B[name].weight, layer.lora_A[name].weight
    return (layer.scaling[name] * (b @ a)).detach()


# ---- where they start -------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_own_adapters_start_where_peft_starts_them(kind: str, init: str) -> None:
    adapted, reference = adapted_by(init, kind), base_of(kind).model
    paths = [target.path for target in adapted.plan.targets]
    torch.manual_seed(1)
    options: Any = {"init_lora_weights": True if init == "default" else init}
    plain = get_peft_model(
        reference, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=paths, **options)
    )
    for path in paths:
        ours, theirs = (m.get_base_model() for m in (adapted.model, plain))
        assert difference(weight_of(ours, path), weight_of(theirs, path)) < 1e-6
        for slot in ("lora_A", "lora_B"):
            one, other = (getattr(m.get_submodule(path), slot)["default"] for m in (ours, theirs))
            assert torch.equal(one.weight, other.weight)


@every_kind
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_64"])
def test_pissa_takes_the_largest_singular_values_out_of_each_weight(kind: str, init: str) -> None:
    """With numpy's singular values as the reference."""
    adapted, untouched = adapted_by(init, kind), base_of(kind).model
    inner = adapted.model.get_base_model()
    for target in adapted.plan.targets:
        values = np.linalg.svd(weight_of(untouched, target.path).numpy(), compute_uv=False)
        left = np.linalg.svd(weight_of(inner, target.path).numpy(), compute_uv=False)
        taken = np.linalg.svd(product(inner.get_submodule(target.path)).numpy(), compute_uv=False)
        close = {"rtol": 1e-4 if init == "pissa" else 1e-2, "atol": 1e-5}
        np.testing.assert_allclose(taken[:R], values[:R], **close)
        np.testing.assert_allclose(left[: len(values) - R], values[R:], **close)


@every_kind
def test_olora_starts_from_the_qr_decomposition_whichever_way_weights_lie(kind: str) -> None:
    """PEFT's own takes W as it lies: nothing on GPT-2 would fit."""
    adapted, untouched = adapted_by("olora", kind), base_of(kind).model
    for target in adapted.plan.targets:
        layer = adapted.model.get_base_model().get_submodule(target.path)
        a, b = (getattr(layer, s)["default"].weight.detach() for s in ("lora_A", "lora_B"))
        torch.testing.assert_close(b.T @ b, torch.eye(R), rtol=0, atol=1e-5)
        expected = b.T @ weight_of(untouched, target.path)
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5)
        assert not a.tril(-1).any()


@every_kind
@every_type
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", *CHANGING])
def test_fresh_adapter_changes_outputs_by_rounding_at_most(
    kind: str, dtype: torch.dtype, init: str
) -> None:
    expected = output_of(base_of(kind, dtype).model, kind)
    adapted = adapted_by(init, kind, dtype)
    assert all(p.dtype == dtype for n, p in adapted.model.named_parameters() if "lora_" not in n)
    drift = difference(adapted.output(), expected)
    assert drift <= (0.0 if init in ("default", "gaussian") else ROUNDING[dtype])
    fill(adapted.model)
    assert difference(adapted.output(), expected) > 2 * ROUNDING[dtype]


@every_kind
@every_type
@every_changing
def test_base_gives_up_what_the_adapter_adds(kind: str, dtype: torch.dtype, init: str) -> None:
    """Rounded once: the pair is of the weights' own type when it is taken out."""
    adapted, untouched = adapted_by(init, kind, dtype), base_of(kind, dtype).model
    inner = adapted.model.get_base_model()
    for target in adapted.plan.targets:
        whole = weight_of(untouched, target.path).float()
        expected = (whole - product(inner.get_submodule(target.path))).to(dtype)
        assert torch.equal(weight_of(inner, target.path), expected)
        assert difference(expected.float(), whole) > 0.1
    others = weights_fingerprint(untouched, skip=[t.path for t in adapted.plan.targets])
    adapted.model.unload()
    assert others == weights_fingerprint(inner, skip=[t.path for t in adapted.plan.targets])


# ---- the way to disk, and into PEFT -----------------------------------------------------------


@every_kind
@every_type
@every_changing
def test_adapter_loaded_onto_the_original_base_goes_on_identically(
    kind: str, dtype: torch.dtype, init: str, tmp_path: Path
) -> None:
    adapted = adapted_by(init, kind, dtype)
    fill(adapted.model)
    torch.manual_seed(99)  # what is stored decides, no chance
    loaded = load_adapter(base_of(kind, dtype).model, adapted.save(tmp_path)).eval()
    before = adapted.output()
    for _ in range(2):
        outputs = []
        for model in (adapted.model, loaded):
            outputs.append(output_of(model, kind))
            loss_of(model, kind).backward()
            torch.optim.SGD(trainable_parameters(model).values(), lr=1e-2).step()
        assert torch.equal(*outputs)
    assert not torch.equal(output_of(loaded, kind), before)
    stored = load_file(tmp_path / "adapter.safetensors")
    targets = {t.path for t in adapted.plan.targets}
    expected = {f"initial/{path}.{slot}" for path in targets for slot in ("lora_A", "lora_B")}
    assert {name for name in stored if name.startswith("initial/")} == expected


def test_folder_without_what_was_taken_from_the_base_is_refused() -> None:
    adapted = adapted_by("pissa")
    initial = FAMILIES["lora"].initial(adapted.model, "default")
    first = next(iter(initial))
    smaller = {**initial, first: initial[first][:2]}
    for damaged, found in (({}, "nothing"), (smaller, r"a tensor \(2, 32\)")):
        base = base_of("llama")
        with pytest.raises(ValueError, match=f"taken again; .*finds {found}.*another copy"):
            adapt(base.model, adapted.plan, adapted.config, initial=damaged)


@every_kind
@every_changing
@pytest.mark.parametrize("use_rslora", [False, True])
def test_save_pretrained_writes_what_is_right_on_a_base_that_was_never_touched(
    kind: str, init: str, use_rslora: bool, tmp_path: Path
) -> None:
    """Of ranks that differ, so that PEFT reads patterns of ranks and of α."""
    base = base_of(kind)
    adapted = adapted_by(init, kind)
    targets = find_targets(base.model, KINDS[kind].names)
    options = adapted.plan.options.model_copy(
        update={"topology": "explicit", "groups": own_groups(adapted), "use_rslora": use_rslora}
    )
    plan = build_plan(targets, options)
    assert len({group.r for group in plan.groups}) > 1
    model = adapt(base.model, plan, adapted.config, base.head).eval()
    fill(model)
    with pytest.MonkeyPatch.context() as patch:  # nothing of it is to depend on singular vectors
        patch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("it decomposes again"))
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        plain = PeftModel.from_pretrained(base_of(kind).model, tmp_path).eval()
    assert difference(output_of(plain, kind), output_of(model, kind)) < TRAINED
    assert difference(output_of(plain, kind), output_of(base_of(kind).model, kind)) > 0.1
    assert plain.peft_config["default"].init_lora_weights is True
    layer = plain.get_base_model().get_submodule(targets[0].path)
    assert layer.r["default"] == 2 * plan.group_of_target()[targets[0].path].r
    if kind == "bert":
        assert torch.equal(
            plain.get_base_model().classifier.modules_to_save["default"].weight,
            model.get_base_model().classifier.modules_to_save["default"].weight,
        )


def own_groups(adapted: Adapted) -> Any:
    return tuple(
        ExplicitGroup(module=t.module_type, layers=(t.layer,), r=R + 2 * (t.layer % 2))
        for t in adapted.plan.targets
    )


@every_kind
@every_changing
def test_factors_are_those_on_the_original_base(kind: str, init: str) -> None:
    adapted, untouched = adapted_by(init, kind), base_of(kind).model
    fill(adapted.model)
    inner = adapted.model.get_base_model()
    for target in adapted.plan.targets:
        layer = inner.get_submodule(target.path)
        factors = FAMILIES["lora"].factors(layer, "default")
        assert factors.a.shape == (2 * R, target.in_features)
        expected = weight_of(inner, target.path) + product(layer)
        found = weight_of(untouched, target.path) + factors.scale * factors.b @ factors.a
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_kind
@every_changing
def test_merged_weights_compute_what_the_adapter_does(kind: str, init: str) -> None:
    adapted = adapted_by(init, kind)
    fill(adapted.model)
    expected = adapted.output()
    assert difference(output_of(adapted.model.merge_and_unload(), kind), expected) < TRAINED


# ---- copies and states ------------------------------------------------------------------------


def test_copy_keeps_what_was_taken_from_the_base(tmp_path: Path) -> None:
    adapted = adapted_by("pissa")
    twin = copy.deepcopy(adapted.model)
    fill(adapted.model)
    family = FAMILIES["lora"]
    taken = (family.initial(model, "default") for model in (adapted.model, twin))
    for one, other in zip(*(tensors.values() for tensors in taken), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    twin.load_state_dict(adapted.model.state_dict())
    assert torch.equal(output_of(twin, "llama"), adapted.output())


def test_state_that_started_elsewhere_is_refused() -> None:
    states = [adapted_by(init).model.state_dict() for init in ("pissa", "olora")]
    model = adapted_by("pissa").model
    model.load_state_dict(states[0])
    with pytest.raises(RuntimeError, match="started elsewhere"):
        model.load_state_dict(states[1])
    name = next(name for name in states[0] if "lora_A" in name)
    with pytest.raises(RuntimeError, match=r"size mismatch.*\(4, 32\) given, \(8, 32\) wanted"):
        model.load_state_dict({**states[0], name: states[0][name][:R]})
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        model.load_state_dict({n: tensor for n, tensor in states[0].items() if n != name})


def test_what_was_taken_is_neither_trained_nor_counted() -> None:
    model = adapted_by("pissa").model
    started = [module for module in model.modules() if isinstance(module, Started)]
    assert len(started) == 2 * 16
    assert not any("initial" in name for name in trainable_parameters(model))
    assert not any("initial" in name for name in model.state_dict())
    loss_of(model, "llama").backward()
    assert all(module.initial.grad is None for module in started)
    model.double()
    assert all(module.initial.dtype == torch.float64 for module in started)


# ---- refusals ---------------------------------------------------------------------------------


@every_changing
def test_singular_vectors_of_one_layer_are_not_given_to_another(init: str) -> None:
    with pytest.raises(ValueError, match=r"mean nothing to another layer.*\[0, 1, 2, 3\].*'none'"):
        adapted_by(init, sharing="all")


@pytest.mark.parametrize("init", ["orthogonal", *CHANGING])
@pytest.mark.parametrize("sharing", ["ShareLoRA-A", "ShareLoRA-AB", "E² + own B"])
def test_pair_made_together_must_serve_the_same_layers(init: str, sharing: str) -> None:
    with pytest.raises(ValueError, match=rf"{init!r} makes A and B for one another"):
        adapted_by(init, sharing=sharing)


@pytest.mark.parametrize("init", ["gaussian", "default"])
def test_initialisations_of_single_tensors_go_with_every_sharing(init: str) -> None:
    adapted = adapted_by(init, sharing="E²ShareLoRA")
    assert torch.equal(adapted.output(), output_of(base_of("llama").model, "llama"))


def test_orthogonal_pair_is_shared_and_refuses_odd_ranks() -> None:
    adapted = adapted_by("orthogonal", sharing="blocks(3)")
    layers = [adapted.model.get_base_model().get_submodule(t.path) for t in adapted.plan.targets]
    assert len({layer.lora_A["default"] for layer in layers}) == 2 * 4
    assert all(float(product(layer).abs().max()) < 1e-6 for layer in layers)
    base = base_of("llama")
    plan = make_plan(base, adapted.config, SHARINGS["own"].plan, r=3)
    with pytest.raises(ValueError, match=r"even ranks; .*has r=3 in layers"):
        adapt(base.model, plan, adapted.config)


@every_changing
def test_weights_that_are_not_floats_are_refused(init: str) -> None:
    base = base_of("llama", torch.float64)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16; .*float64.*default"):
        Adapted("llama", "own", base=base, init_lora_weights=init)
    assert not any("lora" in name for name, _ in base.model.named_modules()), "left as it was"


@pytest.mark.parametrize("family", ["dora", "lora_fa", "lori"])
def test_families_that_can_not_start_so_refuse(family: str) -> None:
    with pytest.raises(ValueError, match="can be initialised by"):
        Adapted("llama", "own", family, init_lora_weights="pissa")


# ---- trials -----------------------------------------------------------------------------------


def trial_with(init: str, **training: Any) -> TrialConfig:
    config = small_trial(**training)
    adapter = config.adapter.model_copy(update={"init_lora_weights": init})
    return config.model_copy(update={"adapter": adapter})


def train(resident: Resident, config: TrialConfig, folder: Path, stop: int | None = None) -> Any:
    """A trial on the group's base, as a worker runs it; afterwards the worker looks at the base."""
    base, data = resident.load(config)
    plan = build_plan(find_targets(base.model, config.adapter.target_modules), config.plan)

    def on_step(step: int, measured: dict[str, float]) -> None:
        if step == stop:
            raise TrialStopped

    try:
        return run_trial(base, data, plan, config, TrialFolder(folder), Reports(on_step=on_step))
    except TrialStopped:
        assert stop is not None
    finally:
        resident.drop_changed_base()


@pytest.mark.usefixtures("one_process")
def test_trial_after_one_that_changed_the_base_equals_a_fresh_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, changing = trial_with("default", max_steps=3), trial_with("pissa", max_steps=3)
    used = Resident(GroupSpec.of(plain.training), torch.device("cpu"))
    first = train(used, plain, tmp_path / "00000")
    assert "changed the base" not in capsys.readouterr().out
    base, _ = used.load(plain)
    whole = train(used, changing, tmp_path / "00001")
    assert weights_fingerprint(base.model, skip=base.head) != base.fingerprint
    assert "changed the base model, as its adapter must" in capsys.readouterr().out
    assert used.load(plain)[0] is not base
    assert train(used, plain, tmp_path / "00002").losses == first.losses
    assert train(used, changing, tmp_path / "00003").losses == whole.losses
    assert whole.losses != first.losses
    capsys.readouterr()
    base, _ = used.load(plain)
    base.model.get_submodule("bert.encoder.layer.0.attention.self.key").weight.data[0, 0] += 1
    used.drop_changed_base()
    assert "though it must not: please report" in capsys.readouterr().out
    assert used.load(plain)[0] is not base
    base, _ = used.load(plain)
    attention = base.model.get_submodule("bert.encoder.layer.0.attention.self")
    attention.key = torch.nn.ModuleDict({"base_layer": attention.key})  # left by what failed
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    used.drop_changed_base()
    assert used.load(plain)[0] is not base


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_trial_starts_from_what_was_taken_then(precision: str, tmp_path: Path) -> None:
    """Bit for bit; and its adapter loads onto the original base with the same outputs."""
    config = trial_with("pissa_niter_2", precision=precision)
    resident = Resident(GroupSpec.of(config.training), torch.device("cpu"))
    whole = train(resident, config, tmp_path / "00000")
    train(resident, config, tmp_path / "00001", stop=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "svd_lowrank", lambda *a, **k: pytest.fail("it decomposes again"))
        resumed = train(resident, config, tmp_path / "00001")
    assert (resumed.losses, resumed.evaluations) == (whole.losses, whole.evaluations)
    files = [tmp_path / number / "adapter/adapter.safetensors" for number in ("00000", "00001")]
    assert files[0].read_bytes() == files[1].read_bytes()
