"""ZeRO stage 3, with weights loaded partitioned, against plain loops and plain models."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from e2lora.adapters import FAMILIES, count_parameters
from e2lora.config import AdapterConfig
from e2lora.models import reset_head
from e2lora.partitioned import is_partitioned
from e2lora.targets import find_targets
from e2lora.training.activations import activation_checkpointed, require_checkpointable
from e2lora.training.engine import Engine
from e2lora.weights import weights_fingerprint
from tests import zero3
from tests.kinds import KINDS
from tests.toy import by_autograd

KINDS_TRIED = tuple(zero3.AUTO)
WORLDS = (1, 2)
long = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With checkpoints of the tiny models."""
    place = tmp_path_factory.mktemp("zero3")
    zero3.write_models(place)
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each worker found, by number of workers; one worker first: two go on from its states."""
    return {world: zero3.run_workers(folder, world) for world in WORLDS}


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Any]:
    """The reference loop's trials by kind and system."""
    trials = {}
    for kind in KINDS_TRIED:
        base = zero3.load(folder, kind, partitioned=False)
        for system, of in zero3.SYSTEMS.items():
            trials[f"{kind} {system}"] = zero3.plain_trial(base, *zero3.plan_for(kind, *of))
    return trials


def require_same(trial: dict[str, Any], expected: dict[str, Any], tolerance: float = 2e-5) -> None:
    """Losses, gradient norms and the weights that they led to."""
    assert trial["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert trial["norm"] == pytest.approx(expected["norm"], rel=10 * tolerance)
    assert trial["final"].keys() == expected["final"].keys()
    for name, value in trial["final"].items():
        torch.testing.assert_close(value, expected["final"][name], rtol=1e-4, atol=tolerance)


# ---- in one process ---------------------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_weights_loaded_partitioned_are_those_of_the_plain_model(folder: Path, kind: str) -> None:
    base, whole = (zero3.load(folder, kind, partitioned=p) for p in (True, False))
    assert is_partitioned(base.model)
    assert not is_partitioned(whole.model)
    assert all(parameter.numel() == 0 for parameter in base.model.parameters())
    assert (base.fingerprint, base.head) == (whole.fingerprint, whole.head)
    for one in (base, whole):
        reset_head(one.model, one.head, seed=3)
    assert weights_fingerprint(base.model) == weights_fingerprint(whole.model)
    buffers = zip(base.model.named_buffers(), whole.model.named_buffers(), strict=True)
    assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in buffers)
    names = KINDS[kind].names
    assert find_targets(base.model, names) == find_targets(whole.model, names)
    assert torch.nn.functional.linear is linear, "of the whole process"


@pytest.mark.usefixtures("one_process")
def test_transformers_loads_plain_models_again_after_a_partitioned_one(folder: Path) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    zero3.load(folder, "llama")
    assert not is_deepspeed_zero3_enabled()
    broken = folder / "broken" / "bert"
    shutil.copytree(folder / "bert", broken)
    (broken / "model.safetensors").write_bytes(b"none")
    with pytest.raises(OSError, match="must be readable"):
        zero3.load(folder / "broken", "bert")
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.usefixtures("one_process")
def test_trial_at_stage_3_equals_a_plain_loop_and_gives_its_base_back(
    folder: Path, plain: dict[str, Any]
) -> None:
    """With a head, a norm of its own in each layer, and a layer that shares."""
    base = zero3.load(folder, "bert")
    system = "E²DoRA"
    plan, config = zero3.plan_for("bert", *zero3.SYSTEMS[system])
    attributes = [set(vars(module)) for module in base.model.modules()]
    trials = [
        zero3.engine_trial(base, plan, config, zero3.training_of(3, 1, accumulation))
        for accumulation in (2, 1, 2)
    ]
    for trial in trials:
        require_same(trial, plain[f"bert {system}"])
    assert trials[0]["loss"] == trials[2]["loss"], "bit for bit"
    assert weights_fingerprint(base.model, base.head) == base.fingerprint
    assert [set(vars(module)) for module in base.model.modules()] == attributes
    assert torch.nn.functional.linear is linear


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stages", [(0, 3), (3, 1), (3, 0), (2, 3)])
def test_state_of_one_stage_is_continued_at_another(
    folder: Path, plain: dict[str, Any], stages: tuple[int, int]
) -> None:
    plan, config = zero3.plan_for("bert", *zero3.SYSTEMS["E²ShareLoRA"])
    losses, state = [], None
    for stage, steps in zip(stages, (range(2), range(2, zero3.STEPS)), strict=True):
        base = zero3.load(folder, "bert", partitioned=stage == 3)
        training = zero3.training_of(stage, 1)
        with zero3.engine_on(base, plan, config, training) as engine:
            if state:
                engine.restore(state)
                again = engine.gather()
                assert again.keys() == state.keys()
                assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
            losses += zero3.train(engine, training, steps)["loss"]
            state = engine.gather()
    assert losses == pytest.approx(plain["bert E²ShareLoRA"]["loss"], rel=2e-5)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hooks_see_and_change_whole_tensors_at_every_stage(folder: Path, stage: int) -> None:
    base = zero3.load(folder, "bert", partitioned=stage == 3)
    plan, config = zero3.plan_for("bert", *zero3.SYSTEMS["E²LoRA"])
    training = zero3.training_of(stage, 1)
    with zero3.engine_on(base, plan, config, training) as engine:
        shapes = {name: engine.value(name).shape for name in engine.parameters}
        values = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
        for name, value in values.items():
            engine.assign(name, value)
        assert all(torch.equal(engine.value(name), value) for name, value in values.items())
        with engine.gathered():
            assert all(torch.equal(p, values[n]) for n, p in engine.parameters.items())
        ids = zero3.batch_of(0)
        engine.backward(zero3.loss_sum(engine.module, ids) / len(ids))
        gradients = {name: engine.gradient(name) for name in engine.parameters}
        engine.micro_step(0)
        assert not engine.skipped
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
        assert engine.gradient_norm() == pytest.approx(norm, rel=1e-5)
        assert norm > 0
        engine.restart_optimizer()
        moments = {n: t for n, t in engine.gather().items() if not n.startswith("parameter/")}
        assert not any(tensor.any() for tensor in moments.values())
        counted = sum(map(len, (value.flatten() for value in values.values())))
        assert sum(count_parameters(engine._model)) == counted


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_and_weights_in_main_memory_change_no_result(
    folder: Path, plain: dict[str, Any], stage: int
) -> None:
    parted = stage == 3
    base = zero3.load(folder, "bert", partitioned=parted, offload=parted)
    plan, config = zero3.plan_for("bert", *zero3.SYSTEMS["E²ShareLoRA"])
    training = zero3.training_of(stage, 1, 2, offload_optimizer=True, offload_parameters=parted)
    with zero3.engine_on(base, plan, config, training) as engine:
        losses = zero3.train(engine, training)["loss"]
        state = engine.gather()
        engine.restore(state)
        assert all(torch.equal(t, state[name]) for name, t in engine.gather().items())
    assert losses == pytest.approx(plain["bert E²ShareLoRA"]["loss"], rel=2e-5)


@pytest.mark.usefixtures("one_process")
def test_nothing_holds_an_engine_or_its_adapter_afterwards(folder: Path) -> None:
    base = zero3.load(folder, "bert")
    plan, config = zero3.plan_for("bert", *zero3.SYSTEMS["E²DoRA"])
    training = zero3.training_of(3, 1)
    with zero3.engine_on(base, plan, config, training) as engine:
        zero3.train(engine, training, range(1))
        held = [engine, engine._model, engine.module, engine.module.optimizer]
        references = [weakref.ref(one) for one in held]
    del engine, held
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("where", ["model.layers.2.self_attn.q_proj", "model.layers.1.mlp"])
def test_trial_that_fails_in_forward_leaves_a_usable_base(
    folder: Path, plain: dict[str, Any], where: str
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    base = zero3.load(folder, "llama")
    plan, config = zero3.plan_for("llama", *zero3.SYSTEMS["E²LoRA"])
    training = zero3.training_of(3, 1, deepspeed={})  # small weights are kept whole, then
    with zero3.engine_on(base, plan, config, training) as engine:
        zero3.train(engine, training, range(2))
        hook = base.model.get_submodule(where).register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            zero3.train(engine, training)
        hook.remove()
    assert all(parameter.numel() == 0 for parameter in base.model.parameters())
    assert weights_fingerprint(base.model) == base.fingerprint
    require_same(zero3.engine_trial(base, plan, config, training), plain["llama E²LoRA"])


@pytest.mark.usefixtures("one_process")
def test_float16_is_refused_where_the_device_lacks_it(folder: Path) -> None:
    base = zero3.load(folder, "llama", partitioned=False, dtype=torch.float16)
    plan, config = zero3.plan_for("llama", *zero3.SYSTEMS["LoRA"])
    adapted = zero3.adapted_from(base, plan, config)
    with pytest.raises(ValueError, match="Use precision='bf16'"):
        Engine(adapted, config, zero3.training_of(1, 1, precision="fp16"))


@pytest.mark.usefixtures("one_process")
def test_partitioned_model_is_refused_at_other_stages(folder: Path) -> None:
    base = zero3.load(folder, "llama")
    plan, config = zero3.plan_for("llama", *zero3.SYSTEMS["LoRA"])
    adapted = zero3.adapted_from(base, plan, config)
    with pytest.raises(ValueError, match="is trained at ZeRO stage 3"):
        Engine(adapted, config, zero3.training_of(2, 1))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_gradients_and_scores_of_a_partitioned_model_are_the_plain_ones(
    folder: Path, kind: str
) -> None:
    base, whole = (zero3.load(folder, kind, partitioned=p) for p in (True, False))
    for one in (base, whole):
        reset_head(one.model, one.head, seed=1)
    found = zero3.measured_gradients(base.model, kind, "even", 0, 1, None)
    require_gradients(found, whole, kind)
    assert weights_fingerprint(base.model, base.head) == base.fingerprint


def require_gradients(
    found: dict[str, Any], whole: Any, kind: str, tolerance: float = 1e-5
) -> None:
    """Against plain autograd on the plain model."""
    targets = find_targets(whole.model, KINDS[kind].names)
    ids = zero3.batch_of(0)
    expected = by_autograd(whole.model, targets, [ids], zero3.loss_sum, zero3.ROWS)
    stds = [gradient.std(correction=0).item() for gradient in expected.values()]
    assert found["std"] == pytest.approx(stds, rel=tolerance)
    for path, gradient in expected.items():
        scale = gradient.abs().mean().item()
        torch.testing.assert_close(
            found["sums"][path].double(), gradient, rtol=10 * tolerance, atol=10 * tolerance * scale
        )


# ---- activation checkpointing -----------------------------------------------------------------


def test_reentrant_checkpointing_of_shared_tensors_is_refused() -> None:
    training = zero3.training_of(1, 1, activation_checkpointing="reentrant")
    for sharing in ("E²", "ShareLoRA-A", "blocks(3)"):
        plan, config = zero3.plan_for("llama", "lora", sharing)
        with pytest.raises(ValueError, match="reduced over the workers several times"):
            require_checkpointable(plan, config, training)
        allowed = training.model_copy(update={"activation_checkpointing": "non_reentrant"})
        require_checkpointable(plan, config, allowed)
    require_checkpointable(*zero3.plan_for("llama", "lora", "own"), training)


def test_checkpointed_layers_run_forward_again_and_then_no_more(folder: Path) -> None:
    base = zero3.load(folder, "llama", partitioned=False)
    plan, config = zero3.plan_for("llama", *zero3.SYSTEMS["E²LoRA"])
    adapted = zero3.adapted_from(base, plan, config).train()
    calls = []
    mlp = base.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    hooks = sum(len(module._forward_hooks) for module in adapted.modules())
    for kind, expected in (("none", 1), ("non_reentrant", 2), ("none", 1)):
        calls.clear()
        adapted.zero_grad()
        with activation_checkpointed(adapted, kind):
            zero3.loss_sum(adapted, zero3.batch_of(0)).backward()
        assert len(calls) == expected
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.requires_grad])
    assert sum(len(module._forward_hooks) for module in adapted.modules()) == hooks
    for one, other in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(one, other)


# ---- in one and two processes -----------------------------------------------------------------


@long
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("kind", "system", "accumulation"),
    [(kind, *trial) for kind in KINDS_TRIED for trial in zero3.TRIALS[kind]],
)
def test_workers_train_what_a_plain_loop_does(
    found: Any, plain: dict[str, Any], kind: str, system: str, accumulation: int, world: int
) -> None:
    for results in found[world]:
        require_same(results[f"{kind} {system} {accumulation}"], plain[f"{kind} {system}"])


@long
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("option", zero3.OPTIONS)
def test_memory_options_change_no_result_of_workers(
    found: Any, plain: dict[str, Any], option: str, world: int
) -> None:
    for results in found[world]:
        require_same(results[f"bert {option}"], plain["bert E²LoRA"])


@long
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_used_base_is_as_it_was_and_gives_the_same_numbers(
    found: Any, folder: Path, kind: str, world: int
) -> None:
    whole = zero3.load(folder, kind, partitioned=False)
    for results in found[world]:
        assert results[f"{kind} fingerprint"] == whole.fingerprint
        assert results[f"{kind} fingerprint after"] == whole.fingerprint
        first, again = results[f"{kind} E²LoRA 1"], results[f"{kind} again"]
        assert (first["loss"], first["norm"]) == (again["loss"], again["norm"])
        assert all(torch.equal(first["final"][n], again["final"][n]) for n in first["final"])


@long
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_states_of_one_worker_are_continued_by_two(
    found: Any, plain: dict[str, Any], kind: str
) -> None:
    expected = plain[f"{kind} E²DoRA"]["loss"][zero3.STEPS // 2 :]
    for results in found[2]:
        for losses in results[f"{kind} handover"].values():
            assert losses[:-1] == pytest.approx(expected, rel=2e-5)
            assert losses[-1] == zero3.STEPS


@long
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_state_of_two_workers_at_stage_3_is_continued_by_one(
    found: Any, folder: Path, plain: dict[str, Any], kind: str, stage: int
) -> None:
    assert found
    plan, config = zero3.plan_for(kind, *zero3.SYSTEMS["E²DoRA"])
    base = zero3.load(folder, kind, partitioned=stage == 3)
    training = zero3.training_of(stage, 1)
    with zero3.engine_on(base, plan, config, training) as engine:
        engine.restore(torch.load(zero3.file_of(folder, f"{kind}-3", 2)))
        losses = zero3.train(engine, training, range(2, zero3.STEPS))["loss"]
    assert losses == pytest.approx(plain[f"{kind} E²DoRA"]["loss"][2:], rel=2e-5)


@long
@pytest.mark.parametrize("case", zero3.SHARES)
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_workers_measure_the_gradients_of_a_partitioned_model(
    found: Any, folder: Path, kind: str, case: str
) -> None:
    """However unequal their shares."""
    whole = zero3.load(folder, kind, partitioned=False)
    reset_head(whole.model, whole.head, seed=1)
    for world in WORLDS:
        for results in found[world]:
            require_gradients(results[f"{kind} gradients {case}"], whole, kind)


@long
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_gradients_of_a_partitioned_bfloat16_model_are_taken_in_float32(
    found: Any, folder: Path, kind: str
) -> None:
    whole = zero3.load(folder, kind, partitioned=False, dtype=torch.bfloat16)
    whole.model.float()
    for results in found[2]:
        result = results[f"{kind} bfloat16"]
        if not whole.head:  # a head is drawn anew for each model
            require_gradients(result, whole, kind)
        assert all(std > 0 for std in result["std"])


@long
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_workers_score_every_row_once_however_few(
    found: Any, folder: Path, kind: str, world: int
) -> None:
    whole = zero3.load(folder, kind, partitioned=False)
    reset_head(whole.model, whole.head, seed=1)
    for results in found[world]:
        for number, scores in results[f"{kind} scores"].items():
            expected = zero3.scores_of(whole.model, number)
            assert scores == pytest.approx(expected, rel=1e-5)


@long
@pytest.mark.parametrize("world", WORLDS)
def test_answers_of_a_partitioned_model_are_those_of_a_whole_one(
    found: Any, folder: Path, world: int
) -> None:
    """Seven prompts in batches of three: two workers have different numbers of them."""
    whole = zero3.load(folder, "llama", partitioned=False)
    expected = zero3.answers_of(whole.model)
    assert all(results["answers"] == expected for results in found[world])


@long
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_every_family_makes_of_a_partitioned_base_what_it_makes_of_a_plain_one(
    found: Any, folder: Path, kind: str, world: int
) -> None:
    expected = zero3.made_by_families(lambda: zero3.load(folder, kind, partitioned=False), kind)
    for results in found[world]:
        made = results[f"{kind} families"]
        assert made.keys() == expected.keys()
        for family, tensors in made.items():
            assert tensors["base"] == expected[family]["base"], family
            for name, tensor in tensors.items():
                if name != "base":
                    assert torch.equal(tensor, expected[family][name]), (family, name)


@long
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", ["dora", "full"])
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_saved_adapter_is_the_same_file_at_stage_3(
    found: Any, folder: Path, kind: str, family: str
) -> None:
    assert found
    base = zero3.load(folder, kind, partitioned=False)
    place = zero3.saved(folder, base, kind, family, 0)
    other = folder / f"saved-{kind}-{family}-3"
    for file in ("adapter.safetensors", "e2lora.json", "plan.json", "README.md"):
        assert (place / file).read_bytes() == (other / file).read_bytes(), file


@long
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_bf16_trains_as_float32_does_but_for_rounding(
    found: Any, plain: dict[str, Any], kind: str, world: int
) -> None:
    for results in found[world]:
        trial = results[f"{kind} trained in bf16"]
        assert trial["loss"] == pytest.approx(plain[f"{kind} E²LoRA"]["loss"], rel=5e-2)


def test_families_declare_at_which_stages_they_are_trained() -> None:
    """Those that stage 3 is declared for are tried on a partitioned base above."""
    tried = {family for family, _ in zero3.families_at_stage_3()}
    assert tried == FAMILIES.keys() - {"adalora", "increlora"}
    assert AdapterConfig(target_modules=("q",)).init_lora_weights == "default"
