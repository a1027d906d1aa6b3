"""The contract of every family of adapters, over ways of sharing and kinds of models.

A family is tested as soon as it is registered: see :mod:`tests.cases`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from e2lora.adapters import (
    FAMILIES,
    adapt,
    count_adapter_parameters,
    count_parameters,
    is_head,
    require_possible_trial,
    trainable_parameters,
)
from e2lora.adapters.export import FORMS, export_adapter
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, PlanConfig, TrainConfig
from e2lora.models import Base, reset_head
from e2lora.plan import build_plan
from e2lora.targets import find_targets, is_transposed
from e2lora.weights import weights_fingerprint
from tests.cases import (
    CASES,
    FORMULAS,
    MERGING,
    SLICING,
    SOME,
    SOME_KINDS,
    TENSORS,
    Case,
    able,
    adapted_as,
    aliases,
    base_output,
    beside_types,
    expected_sharers,
    leaves_the_base,
    made,
    over,
    require_near,
    require_tied,
    sharers,
    sharings_of,
    steps,
    types_of,
)
from tests.kinds import ALPHA, KINDS, LLAMA, Adapted, R, fill, loss_of, make_base, output_of
from tests.small import small_trial

# ---- what is made -----------------------------------------------------------------------------


def test_every_registered_family_stands_in_the_tables() -> None:
    assert FAMILIES.keys() <= FORMULAS.keys()
    assert FORMULAS.keys() == TENSORS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_e2_plan_has_unequal_groups_and_ranks(kind: str) -> None:
    """What the tests below rely on; every second module type is the other way round."""
    plan = Adapted(kind, "E²").plan
    first, second = (plan.groups_of(name) for name in plan.module_types[:2])
    assert [(group.layers, group.r) for group in first] == [((0, 1), 2), ((2,), 4), ((3,), 8)]
    assert [(group.layers, group.r) for group in second] == [((0, 1), 6), ((2, 3), 2)]


@over(CASES)
def test_count_is_that_of_the_formula(case: Case) -> None:
    adapted = made(case).adapted
    head = sum(
        parameter.numel()
        for name in adapted.base.head
        for parameter in make_base(case.kind).model.get_submodule(name).parameters()
    )
    expected = sum(map(FORMULAS[case.family], types_of(adapted))) + beside_types(adapted)
    if case.family == "full":
        expected = make_base(case.kind).model.num_parameters() - head
    else:
        assert count_adapter_parameters(adapted.plan, adapted.config) == expected
    if FAMILIES[case.family].count_is_limit:
        limit, expected = expected, count_parameters(adapted.model)[0]
        assert 0.9 * limit < expected <= limit
    assert count_parameters(adapted.model) == (expected, head)
    optimised = {id(p): p.numel() for p in adapted.model.parameters() if p.requires_grad}
    assert sum(optimised.values()) == expected + head


@over(CASES)
def test_untrained_adapter_changes_no_output_unless_it_is_meant_to(case: Case) -> None:
    adapted, untrained = made(case)
    expected = base_output(case.kind)
    if FAMILIES[case.family].starts_moved:
        assert (untrained - expected).norm() > 1e-3 * expected.norm()
    else:
        require_near(untrained, expected, FAMILIES[case.family].drift)
    assert not torch.allclose(adapted.output(), expected, rtol=1e-2)


@over(CASES)
def test_tensors_are_shared_by_the_layers_of_a_group_and_by_no_others(case: Case) -> None:
    adapted = made(case).adapted
    require_tied(adapted.model, adapted)


@over(CASES)
def test_every_trainable_tensor_gets_a_gradient_and_nothing_else_does(case: Case) -> None:
    model = made(case).adapted.model
    model.zero_grad()
    loss_of(model, case.kind).backward()
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert tensor.grad.abs().sum() > 0, name
        else:
            assert tensor.grad is None, name
    assert not any(buffer.requires_grad for buffer in model.buffers())
    model.zero_grad()


@over(SOME)
def test_copy_is_tied_in_itself_and_to_nothing_of_the_original(case: Case) -> None:
    adapted = made(case).adapted
    expected = adapted.output()
    copied = copy.deepcopy(adapted.model)
    require_tied(copied, adapted)
    assert torch.equal(output_of(copied, case.kind), expected)
    fill(copied, seed=9)
    assert not torch.allclose(output_of(copied, case.kind), expected)
    assert torch.equal(adapted.output(), expected)


@pytest.mark.filterwarnings("ignore:Specified to not save basis")
@over(able("peft"))
def test_gradient_of_a_shared_tensor_is_the_sum_over_untied_copies(
    case: Case, tmp_path: Path
) -> None:
    """The reference is plain PEFT with the expanded weights, every layer with its own."""
    adapted = adapted_as(case)
    fill(adapted.model)
    plain = PeftModel.from_pretrained(
        make_base(case.kind).model, adapted.save_plain(tmp_path), is_trainable=True
    ).eval()
    for model in (adapted.model, plain):
        loss_of(model.double(), case.kind).backward()
    separate = dict(plain.named_parameters())
    of_tensor: dict[nn.Parameter, list[Tensor]] = {}
    for name, tensor in aliases(adapted.model).items():
        if not is_head(name):
            if case.family == "rasa":
                gradient = _through_product(adapted.model, plain, name)
            elif case.family in ("bslora", "ralora"):
                gradient = _through_weight(adapted.model, plain, name)
            else:
                gradient = separate[name].grad
            if case.family == "lora_fa":
                gradient = _preconditioned(gradient, plain, name)
            of_tensor.setdefault(tensor, []).append(gradient)
    copies = {id(gradient) for gradients in of_tensor.values() for gradient in gradients}
    assert len(copies) == sum(map(len, of_tensor.values())), "the reference is untied"
    for tensor, gradients in of_tensor.items():
        expected = sum(_fitted(gradient, tensor) for gradient in gradients)
        require_near(tensor.grad, expected, max(SLICING, 100 * FAMILIES[case.family].drift))


def _fitted(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Filled up where a layer sees a part of the tensor, cut where plain PEFT has more of it."""
    fitted = torch.zeros_like(tensor)
    common = tuple(slice(0, min(sizes)) for sizes in zip(gradient.shape, tensor.shape, strict=True))
    fitted[common] = gradient[common]
    return fitted


def _preconditioned(gradient: Tensor, plain: Any, name_of_b: str) -> Tensor:
    """LoRA-FA's step of B: the gradient times (A Aᵀ)⁻¹ / s²."""
    a = plain.get_parameter(name_of_b.replace("lora_B", "lora_A"))
    return gradient @ torch.linalg.inv(a @ a.T) / (ALPHA / R) ** 2


def _through_product(model: Any, plain: Any, name: str) -> Tensor:
    """RaSA's, of the gradient of A = [A_l; A_S] or of B = [B_l, B_S] diag(D)."""
    path, _, part = name.rpartition(".")
    module, gradient = model.get_submodule(path), plain.get_parameter(f"{path}.weight").grad
    whole = torch.cat([module.private_weight, module.pool_weight], module.dim).detach()
    if part == "diagonal":
        return (gradient * whole).sum(0, keepdim=True)
    if module.dim == 1:
        gradient = gradient * module.diagonal.detach()
    private = module.private_weight.shape[module.dim]
    rank = gradient.shape[module.dim]
    return gradient.split([private, rank - private], module.dim)[part == "pool_weight"]


def _through_weight(model: Any, plain: Any, name: str) -> Tensor:
    """Of the gradient of A or B, by what a module makes of its parameters for PEFT.

    That this is as it should be has tests of its own, in those of the family.
    """
    path = name.rpartition(".")[0]
    weight = model.get_submodule(path).weight
    of_weight = plain.get_parameter(f"{path}.weight").grad
    return torch.autograd.grad(weight, model.get_parameter(name), of_weight)[0]


@over(SOME)
def test_a_step_changes_what_is_trained_and_nothing_else(case: Case) -> None:
    adapted = adapted_as(case)
    fill(adapted.model)
    before = {name: tensor.clone() for name, tensor in _tensors(adapted.model)}
    trained = {id(p) for p in adapted.model.parameters() if p.requires_grad}
    steps(adapted, adapted.model, 1)
    for name, tensor in _tensors(adapted.model):
        assert torch.equal(tensor, before[name]) == (id(tensor) not in trained), name
    assert {name for name, _ in _tensors(adapted.model)} == before.keys()
    require_tied(adapted.model, adapted)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@over([case for case in SOME if case.sharing == "E²" or FAMILIES[case.family].no_allocation])
def test_start_depends_on_the_torch_seed_only(case: Case) -> None:
    first, again = (dict(_tensors(adapted_as(case).model)) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@over([case for case in SOME if case.kind == "llama" and case.family != "full"])
def test_frozen_projections_follow_from_their_seed_alone(case: Case) -> None:
    family = FAMILIES[case.family]
    if case.family not in ("lora_fa", "lori", "vera", "randlora"):
        assert not family.frozen(adapted_as(case).model, "default")
        return
    first, again, other = (
        family.frozen(
            adapted_as(case, torch_seed=torch_seed, projection_seed=seed).model, "default"
        )
        for torch_seed, seed in ((1, 0), (2, 0), (1, 1))
    )
    assert first
    assert first.keys() == other.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])


@over([case for case in SOME if case.kind == "llama" and case.family != "full"])
def test_dropout_passes_through(case: Case) -> None:
    adapted = adapted_as(case, lora_dropout=0.25)
    fill(adapted.model)
    expected = made(case).adapted.output()
    assert torch.equal(adapted.output(), expected)
    dropouts = [m for m in adapted.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert [module.p for module in dropouts] == [0.25] * len(adapted.plan.targets)
    adapted.model.train()  # this base has no dropout of its own
    assert not torch.allclose(adapted.output(), expected)


# ---- what can be made of it -------------------------------------------------------------------


@over(able("merge"))
def test_merged_model_gives_the_outputs_of_the_unmerged(case: Case) -> None:
    adapted = made(case).adapted
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    assert type(merged) is type(adapted.base.model)
    require_near(output_of(merged, case.kind), adapted.output(), MERGING)


@over(able("portable"))
def test_factors_are_what_merging_makes_of_the_original_weight(case: Case) -> None:
    adapted = made(case).adapted
    merged, original = copy.deepcopy(adapted.model).merge_and_unload(), make_base(case.kind).model
    for target in adapted.plan.targets:
        after, before = (model.get_submodule(target.path) for model in (merged, original))
        change = after.weight - before.weight
        layer = adapted.model.get_base_model().get_submodule(target.path)
        factors = FAMILIES[case.family].factors(layer, "default")
        added = factors.scale * factors.b @ factors.a
        require_near(added, change.T if is_transposed(after) else change, MERGING)


@pytest.mark.filterwarnings("ignore:Specified to not save basis")
@over(able("peft"))
def test_save_pretrained_gives_a_plain_peft_adapter_with_equal_outputs(
    case: Case, tmp_path: Path
) -> None:
    adapted = made(case).adapted
    base = make_base(case.kind, head_seed=5)
    plain = PeftModel.from_pretrained(base.model, adapted.save_plain(tmp_path)).eval()
    is_sliced = case.sharing in ("E²ShareLoRA", "E² + shared AB") or case.family == "vera"
    is_sliced |= case.family == "rasa"  # D is in PEFT's B, and multiplies A x here
    is_sliced |= case.family == "ralora"  # there are zeros around its blocks in PEFT's A and B
    relative = max(SLICING * is_sliced, FAMILIES[case.family].drift)
    require_near(output_of(plain, case.kind), adapted.output(), relative)


@over(SOME)
def test_loaded_adapter_is_tied_again_and_goes_on_identically(case: Case, tmp_path: Path) -> None:
    adapted = adapted_as(case)
    fill(adapted.model)
    folder, base = adapted.save(tmp_path), make_base(case.kind, head_seed=5)
    torch.manual_seed(8)
    loaded = load_adapter(base.model, folder).eval()
    require_tied(loaded, adapted)
    assert count_parameters(loaded) == count_parameters(adapted.model)
    assert torch.equal(output_of(loaded, case.kind), adapted.output())
    losses = [steps(adapted, model, 2) for model in (adapted.model, loaded)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


@over(SOME)
def test_state_dict_goes_into_another_adapter_of_the_same_plan(case: Case) -> None:
    trained, fresh = made(case).adapted, adapted_as(case)
    fresh.model.load_state_dict(trained.model.state_dict())
    require_tied(fresh.model, fresh)
    assert torch.equal(fresh.output(), trained.output())


@over([case for case in SOME if not KINDS[case.kind].head])
def test_state_survives_bf16(case: Case, tmp_path: Path) -> None:
    def half_base() -> Base:
        model = make_base(case.kind).model.bfloat16()
        return Base(model, None, (), weights_fingerprint(model))

    adapted = adapted_as(case, base=half_base())
    fill(adapted.model)
    adapted.model.bfloat16()
    require_tied(adapted.model, adapted)
    loaded = load_adapter(half_base().model, adapted.save(tmp_path)).eval().bfloat16()
    require_tied(loaded, adapted)
    output = output_of(loaded, case.kind)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, adapted.output())


# ---- the base afterwards ----------------------------------------------------------------------


def inventory(model: nn.Module) -> list[Any]:
    """All modules and parameters by name and kind, in order."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return [*modules, *((name, tuple(p.shape)) for name, p in model.named_parameters())]


@pytest.mark.parametrize("kind", ["bert", *SOME_KINDS])
def test_unload_gives_the_base_back_bit_for_bit_round_after_round(kind: str) -> None:
    base = make_base(kind)
    before = inventory(base.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in CASES:
            if case.kind == kind and leaves_the_base(case):
                adapted = adapted_as(case, base=base)
                steps(adapted, adapted.model, 1)
                adapted.model.unload()
                base.model.requires_grad_(False)
                assert inventory(base.model) == before, case
                assert weights_fingerprint(base.model, base.head) == base.fingerprint, case
    assert not [str(w.message) for w in caught if "PEFT" in str(w.message)]


@over([case for case in SOME if case.kind != "gpt2" and leaves_the_base(case)])
def test_used_base_gives_the_numbers_of_a_fresh_one(case: Case) -> None:
    base = make_base(case.kind)
    used = Adapted(case.kind, "own", "dora", base=base)
    steps(used, used.model, 1)
    used.model.unload()
    base.model.requires_grad_(False)
    reset_head(base.model, base.head, seed=0)
    losses = []
    for candidate in (base, make_base(case.kind)):
        adapted = adapted_as(case, base=candidate)
        losses.append(steps(adapted, adapted.model, 3))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


# ---- training under ZeRO ----------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
@over([Case(key, sharing, "llama") for key in FAMILIES for sharing in sharings_of(key)])
def test_engine_trains_like_a_plain_loop_at_every_stage_declared(case: Case) -> None:
    from e2lora.training.engine import Engine

    plain = adapted_as(case)
    fill(plain.model)
    losses = steps(plain, plain.model, 3, rate=1e-3)
    final = trainable_parameters(plain.model)
    for stage in set(FAMILIES[case.family].zero_stages) & {0, 1, 2}:
        adapted = adapted_as(case)
        fill(adapted.model)
        training = TrainConfig(
            max_steps=3,
            learning_rate=1e-3,
            schedule="constant",
            global_batch_size=1,
            max_grad_norm=1e9,
            zero_stage=stage,
        )
        engine = Engine(adapted.model, adapted.config, training)
        try:
            for step, expected in enumerate(losses):
                loss = loss_of(engine.module, case.kind)
                assert loss.item() == pytest.approx(expected, rel=1e-5), (stage, step)
                engine.backward(loss)
                engine.micro_step(step)
        finally:
            engine.close()
        trained = trainable_parameters(adapted.model)
        assert trained.keys() == final.keys()
        for name, parameter in trained.items():
            torch.testing.assert_close(parameter, final[name], rtol=1e-5, atol=1e-5)
        require_tied(adapted.model, adapted)


@pytest.mark.usefixtures("one_process")
@over([Case(k, sharings_of(k)[-1], "llama") for k in FAMILIES if 3 in FAMILIES[k].zero_stages])
def test_losses_at_stage_3_are_those_of_a_plain_loop_where_it_is_declared(case: Case) -> None:
    """Every tensor partitioned, however small."""
    from e2lora.training.engine import Engine

    plain, adapted = adapted_as(case), adapted_as(case)
    for one in (plain, adapted):
        fill(one.model)
    expected = steps(plain, plain.model, 3, rate=1e-3)
    training = TrainConfig(
        max_steps=3,
        learning_rate=1e-3,
        schedule="constant",
        global_batch_size=1,
        max_grad_norm=1e9,
        zero_stage=3,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    engine = Engine(adapted.model, adapted.config, training)
    losses = []
    try:
        for step in range(3):
            loss = loss_of(engine.module, case.kind)
            losses.append(loss.item())
            engine.backward(loss)
            engine.micro_step(step)
    finally:
        engine.close()
    # BSLoRA has 24 ranks at a scale of 3 here: float32 gradients are 4e-5 from those in float64
    assert losses == pytest.approx(expected, rel=1e-4 if case.family == "bslora" else 1e-5)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in FAMILIES if key != "full"])
def test_what_a_family_does_not_allow_is_refused_with_the_reason(key: str) -> None:
    family = FAMILIES[key]
    if family.no_allocation:
        with pytest.raises(ValueError, match=r"can't follow ranks.*allocation='uniform'") as caught:
            Adapted("llama", "E²", key)
        assert family.no_allocation in str(caught.value)
    for scope in {"layer", "interval", "type"} - set(family.scopes):
        for tensor in ("a_scope", "b_scope"):
            with pytest.raises(ValueError, match=rf"{tensor}='{scope}'.*Use one of"):
                Adapted("llama", "own", key, **{tensor: scope})
    for word in {"default", "gaussian", "orthogonal", "olora", "pissa"} - set(
        family.initialisations
    ):
        with pytest.raises(ValueError, match=rf"init_lora_weights='{word}'.*Use one of"):
            Adapted("llama", "own", key, init_lora_weights=word)


@over([Case(key, sharings_of(key)[-1], "llama") for key in FAMILIES])
def test_form_that_a_family_lacks_is_refused_with_the_reason(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family as it is, and as if it had none."""
    folder, family = adapted_as(case).save(tmp_path / "adapter"), FAMILIES[case.family]
    narrow = type("Narrow", (type(family),), {"lacks": dict.fromkeys(FORMS.values(), "made up")})
    for candidate in (family, narrow()):
        monkeypatch.setitem(FAMILIES, case.family, candidate)
        for form, ability in FORMS.items():
            if ability in candidate.lacks:
                reason = re.escape(candidate.lacks[ability])
                with pytest.raises(ValueError, match=f"can't be exported as '{form}': {reason}"):
                    export_adapter(folder, form, tmp_path / "out")


@pytest.mark.parametrize("key", FAMILIES)
def test_stage_that_a_family_does_not_declare_is_refused_with_the_reason(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family as it is, and as if it could be trained without ZeRO only."""
    family = FAMILIES[key]
    narrow = {"zero_stages": (0,), "why_not_other_stages": "it is made up"}
    for candidate in (family, type("Narrow", (type(family),), narrow)()):
        monkeypatch.setitem(FAMILIES, key, candidate)
        for stage in (0, 1, 2):
            trial = small_trial(zero_stage=stage)
            names = () if key == "full" else trial.adapter.target_modules
            adapter = AdapterConfig(family=key, target_modules=names)  # type: ignore[arg-type]
            trial = trial.model_copy(update={"adapter": adapter})
            if stage in candidate.zero_stages:
                require_possible_trial(trial)
                continue
            with pytest.raises(ValueError, match=rf"ZeRO stage {stage}.*Use zero_stage") as caught:
                require_possible_trial(trial)
            assert candidate.why_not_other_stages in str(caught.value)


# ---- counts from the configuration alone ------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("dora", 7_143_424),  # published
        ("lora_fa", 8 * 32 * 10_240),
        ("lori", 8 * 32 * 10_240),
        ("vera", 32 * (10_240 + 4 * 8)),
        ("adalora", 12 * 32 * (26_624 + 4)),
        ("increlora", 16 * 32 * (26_624 + 4)),
        ("rasa", 6_820_736),  # LoRA's 6,815,744, and 4 · 32 times D of 7 + 32 numbers
        ("hydralora", 13_631_488),
        ("bslora", 6_815_744 + (32 * 4 + 16) * 8192),
    ],
)
def test_count_on_llama_8b_is_met_by_formula_and_by_adapted_model(
    family: Any, expected: int
) -> None:
    """Of r = 8 on q, k, v, o: per layer 10,240 rows, 26,624 rows and columns. Those of LoRA and
    ShareLoRA stand in ``test_models.py``.
    """
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = build_plan(find_targets(model, LLAMA), PlanConfig(r=8))
    adapter = AdapterConfig(family=family, target_modules=LLAMA)
    assert count_adapter_parameters(plan, adapter) == expected
    assert count_parameters(adapt(model, plan, adapter)) == (expected, 0)


@over(
    [
        case
        for case in CASES
        if case.kind == "llama"
        and leaves_the_base(case)
        and not FAMILIES[case.family].needs_gradients
    ]
)
def test_model_without_weights_is_adapted_like_one_with_weights(case: Case) -> None:
    real = made(case).adapted
    with torch.device("meta"):
        model = KINDS[case.kind].build(4)
    adapted = adapt(model.requires_grad_(False), real.plan, real.config)
    assert count_parameters(adapted) == count_parameters(real.model)
    assert sharers(adapted, real.plan) == expected_sharers(real)
