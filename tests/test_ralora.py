"""RaLoRA: effective ranks and numbers of blocks, blocks against a loop, and what is left of it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from e2lora.adapters import (
    FAMILIES,
    adapt,
    count_adapter_parameters,
    count_parameters,
    require_possible_trial,
    trainable_parameters,
)
from e2lora.adapters.export import export_adapter
from e2lora.adapters.family import layers_of
from e2lora.adapters.ralora import effective_rank, num_blocks
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, PlanConfig, RaLoraOptions, TrialConfig
from e2lora.moments import Target
from e2lora.plan import SharingPlan, build_plan
from e2lora.records import TrialFolder
from e2lora.targets import find_targets, is_transposed
from e2lora.training import Reports, TrialStopped, run_trial
from e2lora.weights import weights_fingerprint
from tests.cases import sharers
from tests.kinds import ALPHA, KINDS, LLAMA, SHARINGS, fill, make_base, make_plan, output_of
from tests.small import small_trial
from tests.test_lora_ga import load_small, plan_of

every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
every_sharing = pytest.mark.parametrize("sharing", ["own", "blocks(3)", "LSS only"])


def with_values(values: Any, out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A matrix (out × in) with these singular values, the others zero."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.standard_normal((out_features, len(values))))
    v, _ = np.linalg.qr(draw.standard_normal((in_features, len(values))))
    return torch.from_numpy(u * np.asarray(values) @ v.T).float()


# ---- effective rank and numbers of blocks -----------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 12])
def test_effective_rank_of_equal_singular_values_is_their_number(k: int, scale: float) -> None:
    assert effective_rank(with_values([scale] * k, 24, 16)) == pytest.approx(k, rel=1e-4)


@pytest.mark.parametrize("decay", [0.3, 0.8, 0.99])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values(
    decay: float, shape: tuple[int, int]
) -> None:
    values = decay ** np.arange(16)
    p = values / values.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    found = effective_rank(with_values(values, *shape))
    assert found == pytest.approx(expected, rel=1e-4)
    assert 1 < found < 16


def test_gradient_without_dimensions_is_refused() -> None:
    for value in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and not zero"):
            effective_rank(torch.full((3, 2), value))


@pytest.mark.parametrize(
    ("erank", "r", "sizes", "max_blocks", "expected"),
    [
        (1.0, 8, (64, 64), 32, 1),
        (8.0, 8, (64, 64), 32, 1),
        (15.9, 8, (64, 64), 32, 1),
        (16.0, 8, (64, 64), 32, 2),
        (16.0 * (1 - 1e-8), 8, (64, 64), 32, 2),  # rounding
        (63.0, 8, (64, 64), 32, 4),
        (700.0, 8, (4096, 1024), 32, 32),
        (700.0, 8, (4096, 1024), 1024, 64),
        (700.0, 8, (4096, 1024), 63, 32),
        (700.0, 8, (4096, 1024), 1, 1),
        (700.0, 8, (768, 3072), 1024, 64),
        (700.0, 8, (4096, 1000), 1024, 8),  # 1000 = 8 · 125
        (700.0, 8, (4096, 1001), 1024, 1),
        (5.9, 3, (48, 30), 32, 1),
        (12.0, 3, (48, 30), 32, 2),  # not 4, which 30 isn't divided by
    ],
)
def test_blocks_are_a_power_of_two_that_effective_rank_sizes_and_limit_allow(
    erank: float, r: int, sizes: tuple[int, int], max_blocks: int, expected: int
) -> None:
    target = Target(
        path="l.0.q", module_type="l.*.q", layer=0, in_features=sizes[0], out_features=sizes[1]
    )
    assert num_blocks(erank, r, target, max_blocks) == expected


# ---- adapters ---------------------------------------------------------------------------------

NUMBERS = (1, 5, 9, 16, 3)
"""Of equal singular values of the groups' gradients, one after another."""


def gradients_of(plan: SharingPlan) -> dict[str, Tensor]:
    """∂loss/∂W of each target: one for all of a group."""
    sizes = {t.module_type: (t.out_features, t.in_features) for t in plan.targets}
    of_group = {
        group: with_values([0.1] * NUMBERS[i % len(NUMBERS)], *sizes[group.module_type], seed=i)
        for i, group in enumerate(plan.groups)
    }
    return {path: of_group[group] for path, group in plan.group_of_target().items()}


class Split:
    """A tiny base with an adapter of rank 2."""

    def __init__(
        self, kind: str = "llama", sharing: str = "LSS only", use_rslora: bool = False, **own: Any
    ) -> None:
        self.kind, self.base = kind, make_base(kind)
        self.config = AdapterConfig(
            family="ralora", target_modules=KINDS[kind].names, ralora=RaLoraOptions(**own)
        )
        options = {**SHARINGS[sharing].plan, "use_rslora": use_rslora}
        self.plan = make_plan(self.base, self.config, options, r=2, alpha=ALPHA)
        torch.manual_seed(1)
        self.model = adapt(
            self.base.model,
            self.plan,
            self.config,
            self.base.head,
            gradients=gradients_of(self.plan),
        ).eval()

    def layers(self) -> dict[str, Any]:
        return layers_of(self.model, self.plan)

    def blocks(self) -> dict[str, int]:
        """Path → n, by the shape of what is trained."""
        return {p: len(layer.lora_A["default"].blocks) // 2 for p, layer in self.layers().items()}


def expected_blocks(plan: SharingPlan) -> dict[str, int]:
    """⌊log₂(k / 2)⌋ of gradients with k equal singular values, at rank 2."""
    of_k = {1: 1, 3: 1, 5: 2, 9: 4, 16: 8}
    of_group = {g: of_k[NUMBERS[i % len(NUMBERS)]] for i, g in enumerate(plan.groups)}
    return {path: of_group[group] for path, group in plan.group_of_target().items()}


@every_kind
@every_sharing
def test_every_group_has_as_many_blocks_as_its_gradient_asks_for(kind: str, sharing: str) -> None:
    split = Split(kind, sharing)
    assert split.blocks() == expected_blocks(split.plan)
    assert len(set(split.blocks().values())) > 1
    lora = AdapterConfig(target_modules=split.config.target_modules)
    expected = count_adapter_parameters(split.plan, lora)
    assert count_adapter_parameters(split.plan, split.config) == expected
    assert count_parameters(split.model)[0] == expected
    limited = Split(kind, sharing, max_blocks=2).blocks()
    assert limited == {path: min(n, 2) for path, n in split.blocks().items()}


def looped(x: Tensor, a: Tensor, b: Tensor, n: int) -> Tensor:
    """Σ over blocks: B_j A_j on the j-th part of x, at the j-th part of y."""
    wide, high, r = x.shape[-1] // n, len(b) // n, b.shape[1]
    parts = []
    for j in range(n):
        a_j, b_j = a[j * r : (j + 1) * r], b[j * high : (j + 1) * high]
        parts.append(x[..., j * wide : (j + 1) * wide] @ a_j.T @ b_j.T)
    return torch.cat(parts, -1)


@every_kind
@every_sharing
def test_layers_and_gradients_are_those_of_a_loop_over_blocks(kind: str, sharing: str) -> None:
    split = Split(kind, sharing)
    fill(split.model)
    split.model.double()
    leaves: dict[Any, Tensor] = {}
    held: dict[Any, Any] = {}
    generator = torch.Generator().manual_seed(1)
    for path, layer in split.layers().items():
        group = split.plan.group_of_target()[path]
        for slot in "AB":
            parameter = getattr(layer, f"lora_{slot}")["default"].blocks
            assert held.setdefault((slot, group), parameter) is parameter
            leaves.setdefault((slot, group), parameter.detach().clone().requires_grad_())
        x, y = (
            torch.randn(2, 3, size, generator=generator).double()
            for size in (layer.in_features, layer.out_features)
        )
        base = layer.get_base_layer()
        expected = x @ (base.weight if is_transposed(base) else base.weight.T)
        expected = expected + (0 if base.bias is None else base.bias)
        n = expected_blocks(split.plan)[path]
        expected = expected + ALPHA / 2 * looped(x, leaves["A", group], leaves["B", group], n)
        found = layer(x)
        torch.testing.assert_close(found, expected)
        (found * y).sum().backward()
        (expected * y).sum().backward()
    for key, parameter in held.items():
        torch.testing.assert_close(parameter.grad, leaves[key].grad)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_is_that_of_all_blocks_together_at_loras_scale(use_rslora: bool) -> None:
    split = Split(use_rslora=use_rslora)
    scale = ALPHA / math.sqrt(2) if use_rslora else ALPHA / 2
    for path, layer in split.layers().items():
        n, a = split.blocks()[path], layer.lora_A["default"]
        assert layer.scaling["default"] == pytest.approx(scale)
        assert layer.r["default"] == 2 * n
        bound = math.sqrt(n / layer.in_features)
        assert 0.8 * bound < a.blocks.abs().max() <= bound
        assert a.blocks.unique().numel() == a.blocks.numel()
        assert not layer.lora_B["default"].blocks.any()
    fill(split.model)
    for path, layer in split.layers().items():
        factors = FAMILIES["ralora"].factors(layer, "default")
        added = (factors.b @ factors.a).detach().double()
        assert torch.linalg.matrix_rank(added, rtol=1e-5) == 2 * split.blocks()[path]


# ---- what is left of it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sharing"), [("llama", "LSS only"), ("gpt2", "own"), ("roberta", "blocks(3)")]
)
def test_loaded_adapter_has_its_blocks_again_without_gradients(
    kind: str, sharing: str, tmp_path: Path
) -> None:
    from e2lora import save

    split = Split(kind, sharing)
    fill(split.model)
    save(split.model, tmp_path / "one")
    torch.manual_seed(99)
    loaded = load_adapter(make_base(kind).model, tmp_path / "one").eval()
    assert torch.equal(output_of(loaded, kind), output_of(split.model, kind))
    assert sharers(loaded, split.plan) == sharers(split.model, split.plan)
    save(loaded, tmp_path / "two")
    one, two = (tmp_path / name / "adapter.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    stored = load_file(one)
    head = sum(p.numel() for n, p in trainable_parameters(split.model).items() if "_to_save" in n)
    numbers = {key: int(t) for key, t in stored.items() if key.startswith("initial/")}
    rest = sum(tensor.numel() for key, tensor in stored.items() if key not in numbers)
    assert rest == count_adapter_parameters(split.plan, split.config) + head
    first = {g: path for path, g in reversed(split.plan.group_of_target().items())}.values()
    assert numbers == {f"initial/{path}.num_blocks": split.blocks()[path] for path in first}


@pytest.mark.parametrize("n", [None, 0, 3, 64])
def test_folder_with_a_wrong_number_of_blocks_is_refused_and_the_base_is_as_it_was(
    n: int | None, tmp_path: Path
) -> None:
    from e2lora import save

    split = Split()
    save(split.model, tmp_path)
    file = tmp_path / "adapter.safetensors"
    stored: dict[str, Tensor] = load_file(file)
    key = next(key for key in stored if key.endswith(".num_blocks"))
    del stored[key]
    save_file(stored if n is None else {**stored, key: torch.tensor(n)}, file)
    path = key.removeprefix("initial/").removesuffix(".num_blocks")
    base = make_base("llama")
    with pytest.raises(ValueError, match=rf"for {path} \(.*there is {n or 'none'}\..*damaged"):
        load_adapter(base.model, tmp_path)
    assert weights_fingerprint(base.model) == base.fingerprint
    assert not hasattr(base.model, "peft_config")


@pytest.mark.parametrize(("kind", "use_rslora"), [("llama", False), ("gpt2", True)])
def test_peft_alone_reads_blocks_as_lora_of_their_rank(
    kind: str, use_rslora: bool, tmp_path: Path
) -> None:
    split = Split(kind, use_rslora=use_rslora)
    fill(split.model)
    split.model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {path: 2 * n for path, n in split.blocks().items()}
    assert len(set(ranks.values())) > 2
    plain = PeftModel.from_pretrained(make_base(kind).model, tmp_path).eval()
    for path, r in ranks.items():
        layer = plain.get_base_model().get_submodule(path)
        assert len(layer.lora_A["default"].weight) == layer.r["default"] == r
    assert config["use_rslora"] == use_rslora
    expected = output_of(split.model, kind)
    torch.testing.assert_close(output_of(plain, kind), expected, rtol=1e-4, atol=1e-4)
    merged = copy.deepcopy(split.model).merge_and_unload()
    torch.testing.assert_close(output_of(merged, kind), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["peft", "portable"])
def test_exports_hold_plain_lora_of_all_blocks_and_nothing_else(form: Any, tmp_path: Path) -> None:
    from e2lora import save

    split = Split()
    make_base("llama").model.save_pretrained(tmp_path / "base")
    split.base.model.name_or_path = str(tmp_path / "base")
    fill(split.model)
    save(split.model, tmp_path / "adapter")
    done = export_adapter(tmp_path / "adapter", form, tmp_path / "out")
    assert done.comparison is not None
    assert done.comparison.lost < 1e-4
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {path: 2 * n for path, n in split.blocks().items()}
    expected = {}
    for target in split.plan.targets:
        r = max(ranks.values()) if form == "portable" else ranks[target.path]
        name = f"base_model.model.{target.path}"
        expected[f"{name}.lora_A.weight"] = (r, target.in_features)
        expected[f"{name}.lora_B.weight"] = (target.out_features, r)
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected


def test_two_adapters_of_a_model_have_blocks_of_their_own() -> None:
    split, limited = Split(), Split(max_blocks=2)
    fill(split.model)
    fill(limited.model, seed=9)
    expected, other = (output_of(one.model, "llama") for one in (split, limited))
    model, plan = split.model, split.plan
    adapt(model, plan, limited.config, adapter_name="b", gradients=gradients_of(plan))
    fill(model, seed=9)
    assert torch.equal(output_of(model, "llama"), other)
    family = FAMILIES["ralora"]
    for name, one in (("default", split), ("b", limited)):
        numbers = family.initial(model, name)
        assert {key: int(n) for key, n in numbers.items()} == {
            f"{path}.num_blocks": n
            for path, n in one.blocks().items()
            if f"{path}.num_blocks" in numbers
        }
        assert len(numbers) == len(plan.groups)
    model.set_adapter("default")
    assert torch.equal(output_of(model, "llama"), expected)


def test_count_on_llama_8b_is_loras_whatever_the_blocks() -> None:
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
    adapter = AdapterConfig(family="ralora", target_modules=LLAMA)
    assert count_adapter_parameters(plan, adapter) == 6_815_744
    initial = {f"{t.path}.num_blocks": torch.tensor(2 ** (t.layer % 7)) for t in plan.targets}
    assert count_parameters(adapt(model, plan, adapter, initial=initial)) == (6_815_744, 0)


# ---- refusals ---------------------------------------------------------------------------------


def test_ranks_allocated_by_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RaLoRA can't follow.*blocks.*allocation='uniform'"):
        require_possible_trial(small("e2", allocation=None))
    require_possible_trial(small("e2", allocation="uniform"))


def test_gradients_are_asked_for_of_every_target() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="ralora", target_modules=LLAMA)
    plan = build_plan(find_targets(base.model, LLAMA), PlanConfig(r=2))
    with pytest.raises(ValueError, match="RaLoRA starts from gradients, and none were given"):
        adapt(base.model, plan, config)
    gradients: Mapping[str, Tensor] = gradients_of(plan)
    lacking = {path: g for path, g in gradients.items() if path != plan.targets[3].path}
    with pytest.raises(ValueError, match=r"RaLoRA starts from a gradient of every.*lack 1 of 16"):
        adapt(base.model, plan, config, gradients=lacking)


# ---- a trial ----------------------------------------------------------------------------------


def small(topology: str = "none", allocation: str | None = None, **training: Any) -> TrialConfig:
    config = small_trial(topology, **{"learning_rate": 1e-3, **training})
    return config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update={"family": "ralora"}),
            "plan": config.plan.model_copy(update={"allocation": allocation}),
        }
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_resumed_trial_measures_nothing_again_and_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    config = small()
    base, data = load_small()
    plan = plan_of(config, base, data)
    places = [TrialFolder(tmp_path / number) for number in ("00000", "00001")]
    whole = run_trial(base, data, plan, config, places[0], Reports())
    assert whole.adapter_parameters == plan.parameters

    def stop(step: int, measured: dict[str, float]) -> None:
        if step == 5:
            raise TrialStopped

    with pytest.raises(TrialStopped):
        run_trial(base, data, plan, config, places[1], Reports(on_step=stop))
    with pytest.MonkeyPatch.context() as patch:
        measure = "e2lora.training.outset.measure_group_gradients"
        patch.setattr(measure, lambda *_: pytest.fail("measured again"))
        resumed = run_trial(base, data, plan, config, places[1], Reports())
    assert (resumed.losses, resumed.evaluations) == (whole.losses, whole.evaluations)
    files = [place.adapter / "adapter.safetensors" for place in places]
    assert files[0].read_bytes() == files[1].read_bytes()
    numbers = {int(t) for k, t in load_file(files[0]).items() if k.endswith(".num_blocks")}
    assert max(numbers) > 1
