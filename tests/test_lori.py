"""LoRI-S: the mask, what it does to gradients, and how it is stored. See also test_hooks.py."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from e2lora.adapters import (
    FAMILIES,
    count_parameters,
    require_possible_trial,
    trainable_parameters,
)
from e2lora.adapters.lori import largest
from e2lora.adapters.storage import load_adapter
from e2lora.adapters.tensors import MaskedLinear, pack_bits, unpack_bits
from e2lora.config import AdapterConfig, TrialConfig
from tests.kinds import Adapted, fill, loss_of, make_base, output_of
from tests.small import small_trial
from tests.test_train import with_training

MASKED = {"lori": {"mask_after": 3, "keep": 0.2}}
some_sharings = pytest.mark.parametrize("sharing", ["own", "E²", "E² + shared B", "E² + own B"])


def masks_of(model: Any) -> dict[str, Tensor]:
    """Of each B, by its name."""
    return {
        f"{path}.weight": module.mask
        for path, module in model.named_modules()
        if isinstance(module, MaskedLinear)
    }


def masked(sharing: str, kind: str = "llama") -> Adapted:
    """As after training: a mask over all of B, and zeros where it is zero."""
    adapted = Adapted(kind, sharing, "lori", **MASKED)
    fill(adapted.model)
    modules = [m for m in adapted.model.modules() if isinstance(m, MaskedLinear)]
    for module, mask in zip(modules, largest([m.weight for m in modules], 0.2), strict=True):
        module.mask.copy_(mask)
        module.weight.data *= mask
    return adapted


def test_largest_are_those_of_all_tensors_together() -> None:
    tensors = [torch.randn(5, 7), 10 * torch.randn(4, 3), torch.randn(6)]
    masks = largest(tensors, 0.25)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    taken = np.concatenate([t[m].abs().numpy() for t, m in zip(tensors, masks, strict=True)])
    everything = np.sort(np.abs(np.concatenate([t.numpy().ravel() for t in tensors])))
    assert len(taken) == round(0.25 * 53)
    np.testing.assert_array_equal(np.sort(taken), everything[-len(taken) :])


def test_of_equal_magnitudes_the_first_are_taken() -> None:
    first, second = largest([torch.tensor([[1.0, -2.0, 1.0]]), torch.tensor([-1.0, 1.0])], 0.6)
    assert first.tolist() == [[True, True, True]]
    assert second.tolist() == [False, False]
    first, second = largest([torch.zeros(3), torch.zeros(2)], 0.1)
    assert (first.tolist(), second.tolist()) == ([True, False, False], [False, False])


@pytest.mark.parametrize("shape", [(3, 5), (8,), (1, 1), (0, 4)])
def test_bits_are_packed_eight_in_a_byte(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), mask)


@some_sharings
def test_before_its_mask_it_is_what_lori_d_is(sharing: str) -> None:
    plain, adapted = (Adapted("llama", sharing, "lori", **options) for options in ({}, MASKED))
    assert not masks_of(plain.model)
    tensors = trainable_parameters(plain.model)
    assert (
        trainable_parameters(adapted.model).keys()
        == tensors.keys()
        == masks_of(adapted.model).keys()
    )
    assert count_parameters(plain.model) == count_parameters(adapted.model)
    for each in (plain, adapted):
        fill(each.model)
        loss_of(each.model, "llama").backward()
    assert torch.equal(adapted.output(), plain.output())
    for name, tensor in trainable_parameters(adapted.model).items():
        assert torch.equal(tensor.grad, tensors[name].grad)


@some_sharings
def test_masked_entries_get_no_gradient_and_the_others_theirs(sharing: str) -> None:
    adapted, plain = masked(sharing), Adapted("llama", sharing, "lori")
    tensors = trainable_parameters(plain.model)
    for name, tensor in trainable_parameters(adapted.model).items():
        tensors[name].data.copy_(tensor)
    for each in (plain, adapted):
        loss_of(each.model, "llama").backward()
    for name, tensor in trainable_parameters(adapted.model).items():
        mask = masks_of(adapted.model)[name]
        assert torch.equal(tensor.grad, tensors[name].grad * mask)
        assert tensors[name].grad[~mask].abs().sum() > 0


def test_mask_goes_along_with_a_copy_and_into_other_types() -> None:
    adapted = masked("all")
    again = copy.deepcopy(adapted.model).to(torch.bfloat16)
    masks = masks_of(again)
    assert masks.keys() == masks_of(adapted.model).keys()
    assert all(torch.equal(masks[name], mask) for name, mask in masks_of(adapted.model).items())
    assert all(masks[name] is not mask for name, mask in masks_of(adapted.model).items())
    loss_of(again, "llama").backward()
    for name, tensor in trainable_parameters(again).items():
        assert not tensor.grad[~masks[name]].any()


@pytest.mark.parametrize("sharing", ["LSS only", "E² + shared B"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_stored_are_kept_values_and_a_bit_per_entry_and_training_can_go_on(
    tmp_path: Path, kind: str, sharing: str
) -> None:
    adapted = masked(sharing, kind)
    stored = load_file(adapted.save(tmp_path) / "adapter.safetensors")
    masks = masks_of(adapted.model)
    kept = sum(int(mask.sum()) for mask in masks.values())
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    head = count_parameters(adapted.model)[1]
    assert sum(t.numel() * t.element_size() for t in stored.values()) == 4 * (kept + head) + bits
    assert kept == round(0.2 * count_parameters(adapted.model)[0])
    loaded = load_adapter(make_base(kind).model, tmp_path).eval()
    assert torch.equal(output_of(loaded, kind), adapted.output())
    for name, mask in masks_of(loaded).items():
        assert torch.equal(mask, masks[name])
    tensors = trainable_parameters(loaded)
    assert tensors.keys() == trainable_parameters(adapted.model).keys(), "shared as before"
    for name, tensor in trainable_parameters(adapted.model).items():
        assert torch.equal(tensors[name], tensor)


def test_folder_without_a_mask_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = masked("all").save(tmp_path) / "adapter.safetensors"
    stored = load_file(weights)
    save_file(
        {
            n: t
            for n, t in stored.items()
            if not n.endswith("layers.0.self_attn.q_proj.lora_B.mask")
        },
        weights,
    )
    with pytest.raises(ValueError, match=r"take another\s+copy"):
        load_adapter(make_base("llama").model, tmp_path)


def test_peft_alone_loads_it_and_merging_changes_nothing(tmp_path: Path) -> None:
    adapted = masked("E²")
    expected = adapted.output()
    plain = PeftModel.from_pretrained(make_base("llama").model, adapted.save_plain(tmp_path))
    torch.testing.assert_close(output_of(plain, "llama"), expected, rtol=1e-4, atol=1e-4)
    merged = adapted.model.merge_and_unload()
    torch.testing.assert_close(output_of(merged, "llama"), expected, rtol=1e-4, atol=1e-4)


# ---- the frozen A ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lora_fa", "lori"])
def test_frozen_a_of_each_owner_is_another(family: str) -> None:
    adapted = Adapted("llama", "own", family)
    frozen = FAMILIES[family].frozen(adapted.model, "default")
    assert len(frozen) == len(adapted.plan.targets)
    for (one, a), (other, b) in combinations(frozen.items(), 2):
        assert not torch.equal(a, b), (one, other)
    again = FAMILIES[family].frozen(Adapted("llama", "own", family, torch_seed=2).model, "default")
    assert all(torch.equal(again[owner], a) for owner, a in frozen.items())


@pytest.mark.parametrize("family", ["lora_fa", "lori", "vera", "randlora"])
def test_folder_whose_random_projections_are_others_is_refused(family: str, tmp_path: Path) -> None:
    record = Adapted("llama", "own", family).save(tmp_path) / "e2lora.json"
    told = json.loads(record.read_text())
    assert len(told["frozen_fingerprint"]) == 16
    record.write_text(json.dumps(told | {"frozen_fingerprint": "0" * 16}))
    base = make_base("llama").model
    with pytest.raises(ValueError, match="projections must be those it was trained with"):
        load_adapter(base, tmp_path)
    assert torch.equal(output_of(base, "llama"), output_of(make_base("llama").model, "llama"))


# ---- what is refused ---------------------------------------------------------------------------


def trial(**training: Any) -> TrialConfig:
    adapter = AdapterConfig(family="lori", target_modules=("query",), **MASKED)
    return small_trial(**training).model_copy(update={"adapter": adapter})


def test_mask_needs_steps_after_it() -> None:
    require_possible_trial(trial(max_steps=4))
    with pytest.raises(ValueError, match="below max_steps; got 3 and 3"):
        require_possible_trial(trial(max_steps=3))


def test_stage_3_is_refused_for_lori_s_alone() -> None:
    third = with_training(trial(), zero_stage=3)
    with pytest.raises(ValueError, match="stage 3 partitions; got zero_stage=3"):
        require_possible_trial(third)
    plain = AdapterConfig(family="lori", target_modules=("query",))
    require_possible_trial(third.model_copy(update={"adapter": plain}))
