"""LoRA-GA: whole gradients against autograd, where a group starts, and what its first step does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraGAConfig
from torch import Tensor

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.storage import load_adapter
from e2lora.config import AdapterConfig, CalibrationConfig, PlanConfig, TrialConfig
from e2lora.config.adapter import LoraGaOptions
from e2lora.gradients.whole import sum_gradients
from e2lora.models import Base, load_base
from e2lora.plan import SharingPlan, build_plan
from e2lora.profile import measure_group_gradients, measure_profile
from e2lora.records import TrialFolder
from e2lora.targets import find_targets
from e2lora.tasks import TrialData, load_task
from e2lora.training import Reports, TrialStopped, run_trial
from e2lora.weights import weights_fingerprint
from tests.kinds import (
    KINDS,
    Adapted,
    R,
    fill,
    loss_of,
    made_up_gradients,
    make_base,
    output_of,
)
from tests.small import small_trial
from tests.test_initialisation import difference, product, weight_of
from tests.toy import NAMES, Toy, by_autograd, toy_batches, toy_loss

ROOT = Path(__file__).resolve().parents[1]
every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
every_sharing = pytest.mark.parametrize("sharing", ["own", "blocks(3)", "E²"])


# ---- whole gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6,), (1, 2, 3)])
@pytest.mark.parametrize("twice", [False, True])
def test_gradient_of_a_group_is_the_sum_of_its_targets_by_autograd(
    sizes: tuple[int, ...], twice: bool
) -> None:
    model, batches = Toy(twice=twice), toy_batches(*sizes)
    targets = find_targets(model, NAMES)
    groups = [
        [t for t in targets if t.path.endswith(name) and (t.layer < 2) == first]
        for name in NAMES
        for first in (True, False)
    ]
    found = sum_gradients(model, groups, batches, toy_loss, 6)
    expected = by_autograd(model, targets, batches, toy_loss, 6)
    assert found.keys() == expected.keys()
    for members in groups:
        whole = sum(expected[target.path] for target in members)
        for target in members:
            assert found[target.path] is found[members[0].path], "one tensor is held per group"
            assert difference(found[target.path].double(), whole) < 1e-5


def test_checkpointing_runs_forward_again_and_changes_no_gradient() -> None:
    model = make_base("llama").model
    groups = [[target] for target in find_targets(model, ("v_proj", "gate_proj"))]
    calls: list[int] = []
    first = model.get_submodule(groups[0][0].path)
    first.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        found.append(
            sum_gradients(model, groups, [None], lambda m, _: loss_of(m, "llama"), 5, checkpointing)
        )
        assert len(calls) == times
    for path, gradient in found[0].items():
        torch.testing.assert_close(found[1][path], gradient)


def test_gradient_that_is_zero_or_not_finite_is_refused() -> None:
    model = Toy()
    groups = [[target] for target in find_targets(model, ("up",))]
    model.used = [0, 1]
    with pytest.raises(ValueError, match=r"finite and not zero; .*layers\.2\.up.* sum 0"):
        sum_gradients(model, groups, toy_batches(6), toy_loss, 6)
    model.used = [0, 1, 2]
    model.layers[1]["up"].weight.data[0, 0] = math.nan  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"finite and not zero; .*nan"):
        sum_gradients(model, groups, toy_batches(6), toy_loss, 6)


def sharers(adapted: Any, plan: SharingPlan) -> set[tuple[str, frozenset[str]]]:
    """Which targets hold the same parameter, by its identity."""
    found: dict[tuple[str, int], set[str]] = {}
    for target in plan.targets:
        layer = adapted.get_base_model().get_submodule(target.path)
        for slot in ("lora_A", "lora_B"):
            weight = getattr(layer, slot)["default"].weight
            found.setdefault((slot, id(weight)), set()).add(target.path)
    return {(slot, frozenset(paths)) for (slot, _), paths in found.items()}


# ---- where a group starts ---------------------------------------------------------------------


def started(
    kind: str = "llama",
    sharing: str = "E²",
    base: Base | None = None,
    **options: Any,
) -> tuple[Adapted, dict[str, Tensor]]:
    adapted = Adapted(kind, sharing, "lora_ga", base, lora_ga=LoraGaOptions(**options))
    return adapted, made_up_gradients(adapted.plan)


@every_kind
@pytest.mark.parametrize("scale", typing.get_args(typing.get_type_hints(LoraGAConfig)["scale"]))
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_pair_is_of_the_singular_vectors_that_the_direction_says(
    kind: str, direction: Any, scale: Any
) -> None:
    """With numpy's as the reference; in which way the weight lies doesn't matter."""
    gamma = {"stable_gamma": 9.0} if scale == "stable" else {}
    adapted, gradients = started(kind, "own", direction=direction, scale=scale, **gamma)
    untouched = make_base(kind).model
    groups = adapted.plan.group_of_target()
    for path, gradient in gradients.items():
        layer, r = adapted.model.get_base_model().get_submodule(path), groups[path].r
        left, values, right = np.linalg.svd(gradient.numpy().astype(np.float64))
        of_a, of_b = {
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
            "A2rBr": (slice(r, 2 * r), slice(0, r)),
            "ArB2r": (slice(0, r), slice(r, 2 * r)),
        }[direction]
        norm = np.linalg.norm(weight_of(untouched, path).numpy(), 2)
        factor_of_b = {
            "stable": gradient.shape[0] ** 0.25 / math.sqrt(9.0),
            "weight_svd": norm / values[of_b][0],
            "gd_scale": 1 / layer.scaling["default"],
            "unit": 1.0,
        }[scale]
        factor_of_a = 1 / layer.scaling["default"] if scale == "gd_scale" else 1.0
        expected_a = factor_of_a * right[of_a]
        expected_b = factor_of_b * left[:, of_b] * values[of_b]
        a, b = (getattr(layer, s)["default"].weight.detach() for s in ("lora_A", "lora_B"))
        # U and V are known up to a common sign of each pair, and the randomised ones nearly
        np.testing.assert_allclose(a.abs(), np.abs(expected_a), atol=0.3 * factor_of_a)
        np.testing.assert_allclose(a @ a.T, expected_a @ expected_a.T, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(b, axis=0), np.linalg.norm(expected_b, axis=0), rtol=0.05
        )


@every_kind
@every_sharing
def test_every_layer_of_a_group_gives_up_the_one_product(kind: str, sharing: str) -> None:
    adapted, _ = started(kind, sharing)
    untouched, inner = make_base(kind).model, adapted.model.get_base_model()
    paths = {(t.module_type, t.layer): t.path for t in adapted.plan.targets}
    groups = [
        frozenset(paths[group.module_type, layer] for layer in group.layers)
        for group in adapted.plan.groups
    ]
    assert sharers(adapted.model, adapted.plan) == {
        (slot, group) for group in groups for slot in ("lora_A", "lora_B")
    }
    for path in paths.values():
        part = product(inner.get_submodule(path))
        assert float(part.abs().max()) > 1e-2
        torch.testing.assert_close(
            weight_of(inner, path), weight_of(untouched, path) - part, rtol=0, atol=1e-6
        )
        assert not hasattr(inner.get_submodule(path).get_base_layer(), "_peft_loraga_grad")
    family = FAMILIES["lora_ga"]
    drift = difference(adapted.output(), output_of(untouched, kind))
    assert 0 < drift < family.drift


@every_sharing
def test_loaded_adapter_needs_no_gradients_and_goes_on_identically(
    sharing: str, tmp_path: Path
) -> None:
    adapted, _ = started("gpt2", sharing)
    fill(adapted.model)
    torch.manual_seed(99)
    loaded = load_adapter(make_base("gpt2").model, adapted.save(tmp_path)).eval()
    assert torch.equal(output_of(loaded, "gpt2"), adapted.output())
    assert sharers(loaded, adapted.plan) == sharers(adapted.model, adapted.plan)
    for model in (adapted.model, loaded):
        loss_of(model, "gpt2").backward()
        torch.optim.SGD(trainable_parameters(model).values(), lr=1e-2).step()
    assert torch.equal(output_of(loaded, "gpt2"), adapted.output())


def test_gradients_that_lack_a_target_are_refused_and_name_it() -> None:
    base, (adapted, gradients) = make_base("llama"), started()
    lacking = adapted.plan.targets[5].path
    some = {path: gradient for path, gradient in gradients.items() if path != lacking}
    with pytest.raises(ValueError, match=rf"lack 1 of 16, such as \['{lacking}'\]"):
        adapt(base.model, adapted.plan, adapted.config, gradients=some)


# ---- the first step ---------------------------------------------------------------------------


def effective(model: Any, plan: SharingPlan) -> dict[str, Tensor]:
    """W + s·BA of each target, in float64."""
    inner = model.get_base_model()
    return {
        t.path: weight_of(inner, t.path).double() + product(inner.get_submodule(t.path)).double()
        for t in plan.targets
    }


@every_kind
@every_sharing
def test_first_step_follows_the_gradient_as_far_as_its_rank_can(kind: str, sharing: str) -> None:
    """Measured on the batch that is trained on: the step of B is the best of rank r there is.

    Its cosine with −G is √(Σ_{i≤r} σ_i² / Σ σ_i²), G the group's summed gradient.
    """
    cosines: dict[str, list[float]] = {"lora": [], "lora_ga": []}
    predicted: list[float] = []
    for family, found in cosines.items():
        base = make_base(kind)
        base.model.double()
        config = AdapterConfig(family=family, target_modules=KINDS[kind].names)  # type: ignore[arg-type]
        plan = Adapted(kind, sharing).plan
        members: dict[Any, list[Any]] = {}
        for target in plan.targets:
            members.setdefault(plan.group_of_target()[target.path], []).append(target)
        gradients = sum_gradients(
            base.model, list(members.values()), [None], lambda model, _: loss_of(model, kind), 1000
        )
        base.model.float()
        torch.manual_seed(0)
        given = gradients if family == "lora_ga" else None
        model = adapt(base.model, plan, config, base.head, gradients=given).eval()
        before = effective(model, plan)
        (loss_of(model, kind) / 1000).backward()
        torch.optim.SGD(trainable_parameters(model).values(), lr=1e-2).step()
        after = effective(model, plan)
        for group, targets in members.items():
            path = targets[0].path
            step, gradient = after[path] - before[path], gradients[path].double()
            cosine = torch.nn.functional.cosine_similarity(step.ravel(), -gradient.ravel(), dim=0)
            found.append(float(cosine))
            if family == "lora_ga":
                values = torch.linalg.svdvals(gradient).square()
                predicted.append(float((values[: group.r].sum() / values.sum()).sqrt()))
    ours, plain = cosines["lora_ga"], cosines["lora"]
    assert all(one > other + 0.05 for one, other in zip(ours, plain, strict=True))
    np.testing.assert_allclose(ours, predicted, rtol=0.03)


# ---- refusals ---------------------------------------------------------------------------------


def test_rank_that_needs_more_directions_than_there_are_is_refused() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="lora_ga", target_modules=KINDS["llama"].names)
    targets = find_targets(base.model, config.target_modules)
    fits, beyond = (build_plan(targets, PlanConfig(topology="none", r=r)) for r in (8, 9))
    with pytest.raises(ValueError, match=r"2r must not exceed.*k_proj \(16 x 32\) has r=9.*Lower"):
        adapt(base.model, beyond, config, gradients=made_up_gradients(beyond))
    assert weights_fingerprint(base.model) == base.fingerprint
    adapt(base.model, fits, config, gradients=made_up_gradients(fits))


def test_gradients_are_asked_for() -> None:
    base = make_base("llama")
    config = AdapterConfig(family="lora_ga", target_modules=KINDS["llama"].names)
    plan = build_plan(find_targets(base.model, config.target_modules), PlanConfig(r=R))
    with pytest.raises(ValueError, match="starts from gradients, and none were given"):
        adapt(base.model, plan, config)


@pytest.mark.parametrize("scope", ["layer", "type"])
def test_scopes_other_than_the_group_are_refused(scope: str) -> None:
    with pytest.raises(ValueError, match="shared as its groups are"):
        Adapted("llama", "E²", "lora_ga", a_scope=scope)


def test_options_are_those_of_peft() -> None:
    theirs, ours = (typing.get_type_hints(c) for c in (LoraGAConfig, LoraGaOptions))
    for name in ("direction", "scale"):
        assert set(typing.get_args(ours[name])) == set(typing.get_args(theirs[name]))
    defaults = LoraGaOptions().model_dump()
    assert defaults == {name: getattr(LoraGAConfig(), name) for name in defaults}


# ---- trials -----------------------------------------------------------------------------------


def small(topology: str = "blocks", precision: str = "fp32", **training: Any) -> TrialConfig:
    config = small_trial(topology, block_size=2 if topology == "blocks" else None, **training)
    adapter = config.adapter.model_copy(update={"family": "lora_ga"})
    return config.model_copy(update={"adapter": adapter})


def load_small(dtype: torch.dtype = torch.float32) -> tuple[Base, TrialData]:
    config = small()
    task = load_task(config.task)
    base = load_base(config.model, task.auto_class, task.num_labels, dtype)
    train, validation = (task.features(s, base.processor) for s in ("train", "validation"))
    return base, TrialData(task, train, validation)


def plan_of(config: TrialConfig, base: Base, data: TrialData) -> SharingPlan:
    targets = find_targets(base.model, config.adapter.target_modules)
    profile = measure_profile(base, data, config) if config.plan.needs_profile else None
    return build_plan(targets, config.plan, profile)


def cut(config: TrialConfig, size: int) -> TrialConfig:
    calibration = CalibrationConfig(num_samples=32, microbatch_size=size)
    return config.model_copy(
        update={"plan": config.plan.model_copy(update={"calibration": calibration})}
    )


@pytest.mark.slow
def test_trial_starts_from_the_rows_that_its_profile_is_measured_on() -> None:
    """Whose statistics the recorder takes by blocks, in another way."""
    base, data = load_small(torch.bfloat16)
    config = small("none")
    profile = measure_profile(base, data, config)
    for size in (32, 5):
        found = measure_group_gradients(base, data, cut(config, size), plan_of(config, base, data))
        for entry in profile.layers:
            std = found[entry.target.path].double().std(correction=0)
            assert float(std) == pytest.approx(entry.moments.std, rel=1e-5)
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_trial_with_layers_that_share_learns(tmp_path: Path) -> None:
    config = small(max_steps=60, learning_rate=2e-3, eval_every=60, global_batch_size=16)
    base, data = load_small()
    plan = plan_of(config, base, data)
    losses = run_trial(base, data, plan, config, TrialFolder(tmp_path / "00000"), Reports()).losses
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_resumed_trial_measures_nothing_again_and_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    config = small("e2")
    base, data = load_small()
    plan = plan_of(config, base, data)
    places = [TrialFolder(tmp_path / number) for number in ("00000", "00001")]
    whole = run_trial(base, data, plan, config, places[0], Reports())

    def stop(step: int, measured: dict[str, float]) -> None:
        if step == 5:
            raise TrialStopped

    base, data = load_small()
    with pytest.raises(TrialStopped):
        run_trial(base, data, plan, config, places[1], Reports(on_step=stop))
    base, data = load_small()
    with pytest.MonkeyPatch.context() as patch:
        measure = "e2lora.training.outset.measure_group_gradients"
        patch.setattr(measure, lambda *_: pytest.fail("measured again"))
        resumed = run_trial(base, data, plan, config, places[1], Reports())
    assert (resumed.losses, resumed.evaluations) == (whole.losses, whole.evaluations)
    files = [place.adapter / "adapter.safetensors" for place in places]
    assert files[0].read_bytes() == files[1].read_bytes()
    base, _ = load_small()
    loaded = load_adapter(base.model, places[0].adapter).eval()
    batch = data.task.collate(data.validation, base.processor)
    with torch.no_grad():
        loss = float(data.task.loss_sum(loaded, batch)) / len(data.validation)
    assert loss == pytest.approx(whole.evaluations[-1].metrics["loss"], rel=1e-5)


def train_shared(folder: Path, group: Any, world: int) -> dict[str, Any]:
    """What a trial starts from, and its losses. Small steps: Adam's first are those of signs."""
    base, data = load_small()
    config = cut(small(num_workers=world, zero_stage=2, learning_rate=1e-4, max_steps=3), 7)
    plan = plan_of(config, base, data)
    gradients = measure_group_gradients(base, data, config, plan, group)
    place = TrialFolder(folder / f"{world:05d}")
    losses = run_trial(base, data, plan, config, place, Reports(), group).losses
    return {
        "norms": {path: float(gradient.norm()) for path, gradient in gradients.items()},
        "losses": losses,
        "base": weights_fingerprint(base.model, skip=base.head),
    }


def _worker() -> None:
    """``python -m tests.test_lora_ga FOLDER RANK``: one of two workers."""
    import torch.distributed as dist

    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    if rank > 0:  # as where singular vectors come out otherwise
        torch.svd_lowrank = None  # type: ignore[assignment]
    (folder / f"{rank}.json").write_text(json.dumps(train_shared(folder, group, 2)))
    dist.barrier(group)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_two_workers_start_from_what_the_first_one_finds_and_train_as_one_does(
    tmp_path: Path,
) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_lora_ga", str(tmp_path), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0, output
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = train_shared(tmp_path, None, 1)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-4)


if __name__ == "__main__":
    _worker()
