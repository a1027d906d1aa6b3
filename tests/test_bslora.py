"""BSLoRA against its formula written out, however shapes are met; who shares; what is left."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import e2lora
from e2lora.adapters import (
    adapt,
    count_adapter_parameters,
    count_parameters,
    trainable_parameters,
)
from e2lora.adapters.bslora import Joined
from e2lora.adapters.export import export_adapter
from e2lora.adapters.family import layers_of
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, BsLoraOptions, PlanConfig, TrainConfig
from e2lora.plan import build_plan
from e2lora.targets import find_targets, is_transposed
from e2lora.training.activations import require_checkpointable
from tests.cases import steps
from tests.kinds import ALPHA, KINDS, LLAMA, Adapted, R, fill, loss_of, make_base, output_of

SHAPES = {
    "slice": BsLoraOptions(intra_r=2, inter_r=3),
    "gate": BsLoraOptions(intra_r=2, inter_r=3, shapes="gate", share_size=12),
    "kronecker": BsLoraOptions(intra_r=2, inter_r=3, shapes="kronecker", share_size=8),
}
every_shape = pytest.mark.parametrize("shapes", SHAPES)


def bslora(shapes: str = "slice", sharing: str = "E²", kind: str = "llama", **more: Any) -> Adapted:
    adapted = Adapted(kind, sharing, "bslora", bslora=SHAPES[shapes], **more)
    fill(adapted.model)
    return adapted


# ---- what is computed -------------------------------------------------------------------------


def owners(adapted: Adapted, path: str) -> dict[str, Any]:
    """Who holds each part of a target's adapter: its group, the layer's path, the model."""
    target = next(t for t in adapted.plan.targets if t.path == path)
    head, _, _ = path.partition(f".{target.layer}.")
    return {
        "local": adapted.plan.group_of_target()[path],
        "intra": f"{head}.{target.layer}",
        "inter": "model",
    }


def added(x: Tensor, own: dict[str, Tensor], shapes: str, sizes: tuple[int, int]) -> Tensor:
    """What one target's adapter adds to y, without the scale: part by part."""
    width, height = sizes
    total = x @ own["A local_weight"].T @ own["B local_weight"].T
    for part in ("intra", "inter"):
        a, b = own[f"A {part}_weight"], own[f"B {part}_weight"]
        if shapes == "slice":
            left, top = (a.shape[1] - width) // 2, (b.shape[0] - height) // 2
            a = a[:, [left + i for i in range(width)]]
            b = b[[top + i for i in range(height)]]
            total = total + x @ a.T @ b.T
        elif shapes == "kronecker":
            a = torch.cat([factor * a for factor in own[f"A {part}_sampler"][0]], 1)
            b = torch.cat([factor * b for factor in own[f"B {part}_sampler"][:, 0]], 0)
            total = total + x @ a.T @ b.T
        else:
            inside = (x @ own[f"A {part}_down"][0])[..., None] * own[f"A {part}_up"][:, 0]
            outside = inside @ a.T @ b.T
            gated = (outside @ own[f"B {part}_down"][0])[..., None] * own[f"B {part}_up"][:, 0]
            total = total + gated
    return total


@every_shape
@pytest.mark.parametrize(
    ("kind", "sharing"), [("llama", "E²"), ("gpt2", "own"), ("t5", "blocks(3)"), ("clip", "E²")]
)
def test_layers_and_gradients_are_those_of_the_formula(
    kind: str, sharing: str, shapes: str
) -> None:
    """Each shared tensor is one leaf of the formula, whatever the shapes of those who share it."""
    adapted = bslora(shapes, sharing, kind)
    adapted.model.double()
    leaves: dict[Any, Tensor] = {}
    held: dict[Any, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(1)
    for path, layer in layers_of(adapted.model, adapted.plan).items():
        of_part, own = owners(adapted, path), {}
        for slot in "AB":
            module = getattr(layer, f"lora_{slot}")["default"]
            for name, parameter in module.named_parameters():
                part, _, what = name.partition("_")
                key = (slot, name, of_part[part] if what == "weight" else path)
                assert held.setdefault(key, parameter) is parameter
                if key not in leaves:
                    leaves[key] = parameter.detach().clone().requires_grad_()
                own[f"{slot} {name}"] = leaves[key]
        x, y = (
            torch.randn(2, 3, size, generator=generator).double()
            for size in (layer.in_features, layer.out_features)
        )
        base = layer.get_base_layer()
        expected = x @ (base.weight if is_transposed(base) else base.weight.T)
        expected = expected + (0 if base.bias is None else base.bias)
        sizes = layer.in_features, layer.out_features
        expected = expected + ALPHA / R * added(x, own, shapes, sizes)
        found = layer(x)
        torch.testing.assert_close(found, expected)
        (found * y).sum().backward()
        (expected * y).sum().backward()
    assert len({id(parameter) for parameter in held.values()}) == len(leaves)
    assert len(leaves) == len(trainable_parameters(adapted.model))
    for key, parameter in held.items():
        torch.testing.assert_close(parameter.grad, leaves[key].grad)


@pytest.mark.parametrize(("own", "start"), [(7, 0), (6, 0), (5, 1), (4, 1), (1, 3)])
def test_slices_are_the_middle_of_what_is_shared(own: int, start: int) -> None:
    shared = torch.arange(14.0).reshape(2, 7)
    for dim in (0, 1):
        local = torch.zeros(1, own) if dim == 0 else torch.zeros(own, 1)
        joined = Joined(nn.Parameter(local), dim)
        for part in ("intra", "inter"):
            joined.join(part, nn.Parameter(shared if dim == 0 else shared.T), {})
        expected = shared[:, start : start + own]
        lying = joined.weight if dim == 0 else joined.weight.T
        assert torch.equal(lying[1:3], expected)
        assert torch.equal(lying[3:5], expected)


# ---- who shares, and how it starts ------------------------------------------------------------


def test_stacks_share_with_one_another_in_the_model_but_not_in_a_layer() -> None:
    """T5's encoder and decoder both have layers from 0 on; CLIP's towers differ in width."""
    for kind, stacks in (("t5", ("encoder", "decoder")), ("clip", ("text_model", "vision_model"))):
        adapted = bslora(kind=kind)
        intra: dict[str, set[int]] = {stack: set() for stack in stacks}
        inter, shapes = set(), set()
        for path, layer in layers_of(adapted.model, adapted.plan).items():
            a = layer.lora_A["default"]
            stack = next(stack for stack in stacks if f"{stack}." in path)
            intra[stack].add(id(a.intra_weight))
            inter.add(id(a.inter_weight))
            shapes.add((stack, a.intra_weight.shape[1], a.inter_weight.shape[1]))
        assert {stack: len(found) for stack, found in intra.items()} == dict(
            zip(stacks, (4, 3), strict=True)
        )
        assert not set.intersection(*intra.values())
        assert len(inter) == 1
        widths = {"t5": (64, 64, 64), "clip": (32, 48, 48)}[kind]
        assert shapes == {(stacks[0], widths[0], widths[2]), (stacks[1], widths[1], widths[2])}


@every_shape
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_a_starts_at_random_and_every_b_at_zero_at_the_plans_scale(
    shapes: str, use_rslora: bool
) -> None:
    base = make_base("llama")
    config = AdapterConfig(family="bslora", target_modules=LLAMA, bslora=SHAPES[shapes])
    groups = [
        {"module": module, "layers": layers, "r": {"q_proj": 6, "k_proj": 4}.get(module, 2)}
        for module in LLAMA
        for layers in ((0, 1), (2, 3))
    ]
    options = PlanConfig(
        topology="explicit",
        groups=tuple(groups),  # type: ignore[arg-type]
        r=4,
        lora_alpha=8,
        use_rslora=use_rslora,
    )
    plan = build_plan(find_targets(base.model, LLAMA), options)
    torch.manual_seed(1)
    adapted = adapt(base.model, plan, config)
    for layer in layers_of(adapted, plan).values():
        assert layer.scaling["default"] == pytest.approx(4.0 if use_rslora else 2.0)
    for name, parameter in trainable_parameters(adapted).items():
        slot, _, own = name.split(".")[-3:]
        if slot == "lora_B" and own.endswith("_weight"):
            assert not parameter.any(), name
            continue
        bound = parameter.shape[1] ** -0.5
        assert parameter.abs().max() <= bound, name
        assert parameter.unique().numel() == parameter.numel(), name
        if parameter.numel() > 50:
            assert parameter.abs().max() > 0.9 * bound, name


# ---- counts -----------------------------------------------------------------------------------


def test_counts_of_ranks_2_4_8_on_llama_8b() -> None:
    """q, k, v, o: in + out of all targets of all layers are 851,968, at most 4096 each."""
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
    plan = build_plan(find_targets(model, LLAMA), PlanConfig(r=2, lora_alpha=4))
    local, shared = 2 * 851_968, 32 * 4 + 8
    expected: dict[tuple[Any, int | None], int] = {
        ("slice", None): 2_818_048,
        ("gate", None): local + shared * 2048 + 2 * (851_968 + 128 * 2 * 1024),
        ("kronecker", None): local + shared * 512 + 2 * 851_968 // 256,
        ("kronecker", 1024): local + shared * 2048 + 2 * 851_968 // 1024,
    }
    for (shapes, size), count in expected.items():
        options = BsLoraOptions(intra_r=4, inter_r=8, shapes=shapes, share_size=size)
        adapter = AdapterConfig(family="bslora", target_modules=LLAMA, bslora=options)
        assert count_adapter_parameters(plan, adapter) == count
        adapted = adapt(model, plan, adapter)
        assert count_parameters(adapted) == (count, 0)
        adapted.unload()


# ---- what is left of it -----------------------------------------------------------------------


def identities(model: Any) -> set[frozenset[str]]:
    """The names under which each trained tensor of an adapter is reached."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            names.setdefault(id(parameter), set()).add(name)
    return {frozenset(found) for found in names.values()}


@every_shape
def test_sharing_survives_a_copy_a_folder_and_merging_gives_the_same(
    shapes: str, tmp_path: Path
) -> None:
    adapted = bslora(shapes)
    expected = adapted.output()
    with torch.random.fork_rng():
        loaded = load_adapter(make_base("llama").model, adapted.save(tmp_path / "own")).eval()
    for model in (copy.deepcopy(adapted.model), loaded):
        assert identities(model) == identities(adapted.model)
        assert torch.equal(output_of(model, "llama"), expected)
    stored = load_file(tmp_path / "own" / "adapter.safetensors")
    assert sum(map(Tensor.numel, stored.values())) == count_parameters(adapted.model)[0]
    plain = PeftModel.from_pretrained(
        make_base("llama").model, adapted.save_plain(tmp_path / "plain")
    ).eval()
    assert torch.equal(output_of(plain, "llama"), expected)
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    torch.testing.assert_close(output_of(merged, "llama"), expected, rtol=1e-3, atol=1e-3)


@every_shape
@pytest.mark.parametrize("form", ["peft", "portable"])
def test_exports_are_plain_lora_of_all_ranks_together(
    form: Any, shapes: str, tmp_path: Path
) -> None:
    base = make_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.model.name_or_path = str(tmp_path / "base")
    adapted = bslora(shapes, base=base)
    e2lora.save(adapted.model, tmp_path / "adapter")
    done = export_adapter(tmp_path / "adapter", form, tmp_path / "out")
    assert done.comparison is not None
    assert done.comparison.lost < 1e-4
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {path: g.r + 5 for path, g in adapted.plan.group_of_target().items()}
    widest = max(ranks.values())
    expected = {}
    for target in adapted.plan.targets:
        r = widest if form == "portable" else ranks[target.path]
        name = f"base_model.model.{target.path}"
        expected[f"{name}.lora_A.weight"] = (r, target.in_features)
        expected[f"{name}.lora_B.weight"] = (target.out_features, r)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected


def test_product_alone_is_not_taken_for_the_parameters() -> None:
    trained, fresh = bslora(), bslora(torch_seed=7)
    state = trained.model.state_dict()
    products = {key: tensor for key, tensor in state.items() if not key.endswith("local_weight")}
    assert any(key.endswith("lora_A.default.weight") for key in products)
    with pytest.raises(RuntimeError, match=r"Missing key.*local_weight") as caught:
        fresh.model.load_state_dict(products)
    assert "Unexpected" not in str(caught.value)


@every_shape
def test_weight_tells_its_type_while_its_parts_lie_with_all_workers(shapes: str) -> None:
    """As PEFT's layer asks for at stage 3, before it calls the module that gathers them."""
    adapted = bslora(shapes)
    for layer in layers_of(adapted.model.bfloat16(), adapted.plan).values():
        for module in (layer.lora_A["default"], layer.lora_B["default"]):
            for parameter in module.parameters():
                if parameter.numel():
                    parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
                    parameter.data = parameter.new_empty(0)
            assert module.weight.dtype == torch.bfloat16
            assert not module.weight.numel()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shapes", ["gate", "kronecker"])
def test_extended_parts_train_at_stage_3_as_in_a_plain_loop(shapes: str) -> None:
    """Slices stand in the contract of all families."""
    from e2lora.training.engine import Engine

    plain, adapted = bslora(shapes, "own"), bslora(shapes, "own")
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
    try:
        for step in range(3):
            loss = loss_of(engine.module, "llama")
            assert loss.item() == pytest.approx(expected[step], rel=1e-4)
            engine.backward(loss)
            engine.micro_step(step)
    finally:
        engine.close()
    assert identities(adapted.model) == identities(plain.model)


# ---- refusals ---------------------------------------------------------------------------------


def test_sizes_that_kronecker_products_cannot_meet_are_refused() -> None:
    options = BsLoraOptions(shapes="kronecker", share_size=12)
    with pytest.raises(ValueError, match=r"divide in and out.*got 12.*is 32 x 32.*share_size"):
        Adapted("llama", "own", "bslora", bslora=options)


def test_size_of_what_is_sliced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no effect.*bslora\.share_size"):
        AdapterConfig(family="bslora", target_modules=("q",), bslora=BsLoraOptions(share_size=12))


def test_reentrant_checkpointing_is_refused_under_every_plan() -> None:
    """The inter-layer pair is shared even where the plan shares nothing."""
    targets = find_targets(make_base("llama").model, KINDS["llama"].names)
    plan = build_plan(targets, PlanConfig(r=R))
    training = TrainConfig(
        max_steps=1, learning_rate=1e-3, activation_checkpointing="reentrant", global_batch_size=1
    )
    require_checkpointable(plan, AdapterConfig(target_modules=LLAMA), training)
    config = AdapterConfig(family="bslora", target_modules=LLAMA)
    with pytest.raises(ValueError, match=r"share: all targets of BSLoRA.*non_reentrant"):
        require_checkpointable(plan, config, training)
