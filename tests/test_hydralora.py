"""HydraLoRA against its formula written out; its router; and that nothing else is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from e2lora.adapters import adapt, count_parameters
from e2lora.adapters.family import layers_of
from e2lora.config import AdapterConfig, HydraLoraOptions
from e2lora.targets import is_transposed
from e2lora.weights import weights_fingerprint
from tests.kinds import ALPHA, KINDS, Adapted, R, fill, loss_of, make_base, output_of

SLOTS = ("lora_A", "lora_B", "lora_router")


def hydra(sharing: str, heads: int = 3, kind: str = "llama", **options: Any) -> Adapted:
    return Adapted(kind, sharing, "hydralora", hydralora=HydraLoraOptions(heads=heads), **options)


def filled(*arguments: Any, **options: Any) -> Adapted:
    adapted = hydra(*arguments, **options)
    fill(adapted.model)
    return adapted


def added(a: Tensor, heads: list[Tensor], router: Tensor, x: Tensor) -> Tensor:
    """Token by token and head by head: Σ_e softmax(W_g x)_e B_e A x, of tokens (number × in)."""
    rows = []
    for token in x:
        logits = torch.stack([row @ token for row in router])
        shares = logits.exp() / logits.exp().sum()
        rows.append(
            torch.stack([g * (b @ (a @ token)) for g, b in zip(shares, heads, strict=True)]).sum(0)
        )
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("sharing", "heads"), [("own", 3), ("own", 2), ("E²", 4)])
def test_layers_and_gradients_are_those_of_the_formula(kind: str, sharing: str, heads: int) -> None:
    """A and heads are one leaf per group, whatever its rank; the router is one per layer."""
    adapted = filled(sharing, heads, kind)
    adapted.model.double()
    leaves: dict[Any, Tensor] = {}
    held: dict[Any, nn.Parameter] = {}
    generator = torch.Generator().manual_seed(1)
    for path, layer in layers_of(adapted.model, adapted.plan).items():
        group = adapted.plan.group_of_target()[path]
        keys = {"lora_A": group, "lora_B": group, "lora_router": path}
        for slot, owner in keys.items():
            parameter = held[slot, owner] = getattr(layer, slot)["default"].weight
            if (slot, owner) not in leaves:
                leaves[slot, owner] = parameter.detach().clone().requires_grad_()
        a, b, router = (leaves[slot, owner] for slot, owner in keys.items())
        assert a.shape == (group.r, layer.in_features)
        assert b.shape == (layer.out_features, heads * group.r)
        assert router.shape == (heads, layer.in_features)

        x, y = (
            torch.randn(2, 3, size, generator=generator).double()
            for size in (layer.in_features, layer.out_features)
        )
        base = layer.get_base_layer()
        expected = x @ (base.weight if is_transposed(base) else base.weight.T)
        expected = expected + (0 if base.bias is None else base.bias)
        change = added(a, list(b.split(group.r, dim=1)), router, x.flatten(0, 1))
        expected = expected + ALPHA / R * change.reshape(y.shape)
        found = layer(x)
        # the softmax is one of float32, as in the authors' code
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        (found * y).sum().backward()
        (expected * y).sum().backward()
    for key, parameter in held.items():
        torch.testing.assert_close(parameter.grad, leaves[key].grad, rtol=1e-4, atol=1e-4)


def test_heads_are_weighted_for_each_token_by_itself() -> None:
    adapted = filled("own")
    (layer, *_) = layers_of(adapted.model, adapted.plan).values()
    x = torch.randn(1, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.cat([layer(token) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(layer(x), one_by_one)
    assert not torch.allclose(layer(2 * x), 2 * layer(x), atol=1e-2), "it isn't linear in x"


def test_router_sees_x_without_the_dropout_that_a_sees() -> None:
    adapted = filled("own", lora_dropout=0.5)
    seen: dict[str, Tensor] = {}
    layer = layers_of(adapted.model, adapted.plan)["model.layers.0.self_attn.q_proj"]
    for slot in ("lora_A", "lora_router"):
        getattr(layer, slot)["default"].register_forward_hook(
            lambda _, inputs, __, slot=slot: seen.update({slot: inputs[0]})
        )
    x = torch.randn(2, 3, layer.in_features)
    layer.train()(x)
    assert torch.equal(seen["lora_router"], x)
    dropped = seen["lora_A"] == 0
    assert 0.2 < dropped.float().mean() < 0.8
    torch.testing.assert_close(seen["lora_A"][~dropped], 2 * x[~dropped])


def test_start_is_kaiming_for_a_and_router_and_zero_for_the_heads() -> None:
    adapted = hydra("E²")
    routers = set()
    for layer in layers_of(adapted.model, adapted.plan).values():
        a, b, router = (getattr(layer, slot)["default"].weight for slot in SLOTS)
        assert not b.any()
        for weight in (a, router):
            bound = layer.in_features**-0.5
            assert 0.7 * bound < weight.abs().max() <= bound
        routers.add(tuple(router.flatten().tolist()))
    assert len(routers) == len(adapted.plan.targets)


def test_heads_alone_get_a_gradient_from_the_start() -> None:
    adapted = hydra("E²")
    loss_of(adapted.model, "llama").backward()
    for layer in layers_of(adapted.model, adapted.plan).values():
        a, b, router = (getattr(layer, slot)["default"].weight for slot in SLOTS)
        assert not a.grad.any()
        assert not router.grad.any()
        assert all(part.any() for part in b.grad.split(b.shape[1] // 3, dim=1))


@pytest.mark.parametrize("heads", [2, 5])
def test_each_head_is_counted_and_its_row_of_every_router(heads: int) -> None:
    adapted = hydra("own", heads)
    expected = sum(
        layers * (R * (inner + heads * outer) + heads * inner)
        for layers, inner, outer in KINDS["llama"].types
    )
    assert count_parameters(adapted.model) == (expected, 0)


# ---- what is made of it -----------------------------------------------------------------------


def test_what_save_pretrained_writes_goes_back_into_the_same_plan_and_into_no_plain_lora(
    tmp_path: Path,
) -> None:
    trained, fresh = filled("E²"), hydra("E²", torch_seed=7)
    folder = trained.save_plain(tmp_path)
    written = load_file(folder / "adapter_model.safetensors")
    assert not set_peft_model_state_dict(fresh.model, dict(written)).unexpected_keys
    assert torch.equal(fresh.output(), trained.output())
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_B"):
        PeftModel.from_pretrained(make_base("llama").model, folder)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_leaves_everything_as_it_was(call: str, safe: bool) -> None:
    adapted = filled("E²")
    expected = adapted.output()
    with pytest.raises(ValueError, match=r"HydraLoRA can't be merged; got adapter 'default'.*load"):
        getattr(adapted.model, call)(safe_merge=safe)
    assert torch.equal(adapted.output(), expected)
    adapted.model.unload()
    assert weights_fingerprint(adapted.base.model) == adapted.base.fingerprint


def test_adapter_can_be_left_out_and_stand_beside_another() -> None:
    first, base = filled("E²"), make_base("llama").model
    expected = first.output()
    with first.model.disable_adapter():
        assert torch.equal(first.output(), output_of(base, "llama"))
    lora = AdapterConfig(target_modules=KINDS["llama"].names)
    for config, name in ((first.config, "other"), (lora, "plain")):
        model = adapt(first.model, first.plan, config, adapter_name=name).eval()
        assert torch.equal(output_of(model, "llama"), output_of(base, "llama"))
    fill(model)
    changed = output_of(model, "llama")
    model.set_adapter("default")
    assert torch.equal(output_of(model, "llama"), expected)
    model.set_adapter("plain")
    for name in ("default", "other"):
        model.delete_adapter(name)
    assert torch.equal(output_of(model, "llama"), changed)
    assert not [name for name, _ in model.named_parameters() if "router" in name]


def test_one_head_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        HydraLoraOptions(heads=1)
