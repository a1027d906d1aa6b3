"""What families do inside the training loop, against plain loops: under ZeRO, in two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from e2lora.adapters import FAMILIES, adapt, is_head, trainable_parameters
from e2lora.adapters.family import Handle, Hooks
from e2lora.adapters.lora import Lora
from e2lora.adapters.lori import Lori
from e2lora.adapters.tensors import MaskedLinear
from e2lora.config import AdapterConfig, TrainConfig, TrialConfig
from e2lora.data import step_rows
from e2lora.models import Base, reset_head
from e2lora.records import TrialFolder
from e2lora.tasks import TrialData
from e2lora.training import Reports, run_trial
from e2lora.training.engine import Engine, learning_rate_factor
from e2lora.weights import weights_fingerprint
from tests.kinds import Adapted, loss_of, make_base
from tests.small import small_trial
from tests.test_train import load_small, plan_of, train_until, with_training

STAGES = (0, 1, 2)
STAGES_ALONE = (2,)
KEEP, MASK_AFTER, FASTER = 0.25, 3, 2.0
TINIT, TFINAL, INIT_R = 1, 3, 6  # at r = 4


def trial_of(family: str, options: Mapping[str, Any], **training: Any) -> TrialConfig:
    """Eight steps that nothing clips, with weight decay; in two microbatches where asked."""
    topology = training.pop("topology", "none")
    options_of_all = {
        "max_steps": 8,
        "max_grad_norm": 1e9,
        "weight_decay": 0.1,
        "eval_every": None,
        "checkpoint_every": 2,
    }
    config = small_trial(topology, **{**options_of_all, **training})
    adapter = AdapterConfig(family=family, target_modules=("query", "value"), **options)
    return config.model_copy(update={"adapter": adapter})


ADALORA = {"adalora": {"tinit": TINIT, "tfinal": TFINAL}}
LORI = {"lori": {"mask_after": MASK_AFTER, "keep": KEEP, "masked_lr_ratio": FASTER}}
TRIALS = {
    "probe": trial_of("lora", {}, gradient_accumulation_steps=2, head_learning_rate=1e-2),
    "AdaLoRA": trial_of("adalora", ADALORA, gradient_accumulation_steps=2),
    "AdaLoRA, shared": trial_of("adalora", ADALORA, topology="all", head_learning_rate=1e-2),
    "LoRI-S": trial_of(
        "lori", LORI, topology="all", max_grad_norm=0.5, gradient_accumulation_steps=2
    ),
}


# ---- a family that uses all that hooks can do -------------------------------------------------


class ProbingHooks(Hooks):
    """Penalises, notes every gradient and value, sets a tensor at step 3 and restarts at step 4."""

    def __init__(self, adapted: Any, handle: Handle) -> None:
        self.handle = handle
        self.parameters = trainable_parameters(adapted)
        self.seen = torch.zeros(0, 2, dtype=torch.float64)  # per step: gradients, values

    def penalty(self) -> Tensor:
        return probed_penalty(self.parameters)

    def after_backward(self, step: int) -> None:
        self.gradients = [self.handle.gradient(name) for name in self.parameters]

    def after_step(self, step: int) -> None:
        if step == 3:
            name = probed_name(self.parameters)
            self.handle.assign(name, 0.5 * self.handle.value(name))
        if step == 4:
            self.handle.restart_optimizer()
        row = [checksum(self.gradients), checksum(map(self.handle.value, self.parameters))]
        self.seen = torch.cat([self.seen, torch.tensor([row], dtype=torch.float64)])
        if step == TRIALS["probe"].training.max_steps:
            SEEN.append(self.seen.tolist())

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"]


class Probing(Lora):
    def hooks(
        self, adapted: Any, config: AdapterConfig, training: TrainConfig, handle: Handle
    ) -> Hooks:
        return ProbingHooks(adapted, handle)


class Watched(Lori):
    """Asserts of a trained B that it is zero where it is masked, and nowhere else."""

    def pack(self, tensors: dict[str, Tensor], adapted: Any, name: str) -> dict[str, Tensor]:
        for module in adapted.modules():
            if isinstance(module, MaskedLinear):
                assert torch.equal(module.weight.detach() != 0, module.mask)
        return super().pack(tensors, adapted, name)


SEEN: list[Any] = []


def probed_name(parameters: Mapping[str, Any]) -> str:
    return [name for name in parameters if ".lora_A." in name][1]


def probed_penalty(parameters: Mapping[str, Any]) -> Tensor:
    return sum(p.square().sum() for n, p in parameters.items() if ".lora_" in n) * 0.3


def checksum(tensors: Any) -> float:
    """A number that depends on each entry and its place."""
    total = 0.0
    for number, tensor in enumerate(tensors):
        places = torch.arange(tensor.numel(), dtype=torch.float64).add(number + 1).sin()
        total += float(tensor.detach().double().flatten() @ places)
    return total


# ---- plain loops ------------------------------------------------------------------------------


class Plain:
    """One process, the whole batch at once, no engine: as a script would train."""

    def __init__(self, config: TrialConfig, base: Base, data: TrialData) -> None:
        self.config, self.base, self.data = config, base, data
        reset_head(base.model, base.head, config.seed)
        torch.manual_seed(config.seed)

    def adapted(self) -> Any:
        plan = plan_of(self.config, self.base, self.data)
        adapter = self.config.adapter.seeded(self.config.seed)
        return adapt(self.base.model, plan, adapter, self.base.head, in_loop=True)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        training = self.config.training
        groups = [
            {"params": [p], "lr": training.learning_rate, "peak": training.learning_rate}
            for p in trainable_parameters(model).values()
        ]
        for group, name in zip(groups, trainable_parameters(model), strict=True):
            if is_head(name) and training.head_learning_rate:
                group["peak"] = training.head_learning_rate
        return torch.optim.AdamW(groups, weight_decay=training.weight_decay)

    def batch(self, step: int) -> dict[str, Tensor]:
        size = self.config.training.global_batch_size
        rows = step_rows(self.data.lengths, step, size, self.config.seed)
        tokenizer = self.base.processor
        return self.data.task.collate([self.data.train[i] for i in rows], tokenizer)

    def loss(self, model: Any, step: int) -> Tensor:
        batch = self.batch(step)
        return self.data.task.loss_sum(model, batch) / len(batch["labels"])

    def step(self, optimizer: torch.optim.Optimizer, model: Any, step: int) -> None:
        training = self.config.training
        torch.nn.utils.clip_grad_norm_(
            list(trainable_parameters(model).values()), training.max_grad_norm
        )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(training, step)
        optimizer.step()


def probed_by_a_plain_loop(plain: Plain) -> tuple[list[float], Any]:
    model, losses, seen = plain.adapted(), [], []
    parameters = trainable_parameters(model)
    optimizer = plain.optimizer(model)
    for step in range(plain.config.training.max_steps):
        loss = plain.loss(model, step)
        losses.append(loss.item())
        (loss + probed_penalty(parameters)).backward()
        gradients = [p.grad.clone() for p in parameters.values()]
        plain.step(optimizer, model, step)
        optimizer.zero_grad()
        if step + 1 == 3:
            parameters[probed_name(parameters)].data *= 0.5
        if step + 1 == 4:
            optimizer = plain.optimizer(model)
        seen.append([checksum(gradients), checksum(parameters.values())])
    model.unload()
    return losses, seen


def adalora_by_peft_alone(plain: Plain) -> tuple[list[float], Any]:
    """PEFT's documented loop: the model itself adds the regularisation to its loss."""
    training = plain.config.training
    model: Any = get_peft_model(
        plain.base.model,
        AdaLoraConfig(
            task_type="SEQ_CLS",
            target_modules=["query", "value"],
            modules_to_save=list(plain.base.head),
            init_r=INIT_R,
            target_r=4,
            lora_alpha=12,  # for α/r = 8/4 at the initial rank
            tinit=TINIT,
            tfinal=TFINAL,
            total_step=training.max_steps,
        ),
    )
    if plain.config.plan.topology == "all":
        first: dict[str, Any] = {}
        for path, module in model.named_modules():
            if isinstance(module, AdaLoraLayer):
                owner = first.setdefault(path.rpartition(".")[2], module)
                for slot in ("lora_A", "lora_E", "lora_B"):
                    getattr(module, slot)["default"] = getattr(owner, slot)["default"]
        tuner = model.base_model
        tuner.rankallocator = RankAllocator(tuner.model, model.peft_config["default"], "default")
    optimizer, losses = plain.optimizer(model), []
    for step in range(training.max_steps):
        batch = plain.batch(step)
        outputs = model(**batch)
        outputs.loss.backward()
        plain.step(optimizer, model, step)
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(cross_entropy(outputs.logits, batch["labels"]).item())
    pattern = model.peft_config["default"].rank_pattern
    kept = {name.removesuffix(".lora_E.default"): ranks for name, ranks in pattern.items()}
    model.unload()
    return losses, kept


def lori_in_two_trainings(plain: Plain) -> tuple[list[float], Any]:
    """As the authors do it: the second begins as the first did, and knows nothing but the mask."""
    model, losses = plain.adapted(), []
    masks: dict[str, Tensor] = {}
    optimizer = plain.optimizer(model)
    for step in range(plain.config.training.max_steps):
        parameters = trainable_parameters(model)
        if step == MASK_AFTER:
            b = {n: p.detach().numpy().copy() for n, p in parameters.items() if ".lora_B." in n}
            everything = np.sort(np.abs(np.concatenate([t.ravel() for t in b.values()])))
            threshold = everything[-round(KEEP * everything.size)]
            masks = {n: torch.from_numpy(np.abs(t) >= threshold) for n, t in b.items()}
            model.unload()
            again = Plain(plain.config, plain.base, plain.data)
            model = again.adapted()
            parameters, optimizer = trainable_parameters(model), again.optimizer(model)
            for name, group in zip(parameters, optimizer.param_groups, strict=True):
                group["peak"] *= 1.0 if is_head(name) else FASTER
        loss = plain.loss(model, step)
        losses.append(loss.item())
        loss.backward()
        for name, mask in masks.items():
            parameters[name].grad *= mask
        plain.step(optimizer, model, step)
        optimizer.zero_grad()
    model.unload()
    return losses, {name: int(mask.sum()) for name, mask in masks.items()}


REFERENCES: dict[str, Callable[[Plain], tuple[list[float], Any]]] = {
    "probe": probed_by_a_plain_loop,
    "AdaLoRA": adalora_by_peft_alone,
    "AdaLoRA, shared": adalora_by_peft_alone,
    "LoRI-S": lori_in_two_trainings,
}


# ---- trials -----------------------------------------------------------------------------------


def left_by(name: str, place: TrialFolder) -> Any:
    """What a trial left, in the form of its reference's second part."""
    if name == "probe":
        return SEEN[-1]
    stored = load_file(place.adapter / "adapter.safetensors")
    if name == "LoRI-S":
        return {key: t.numel() for key, t in stored.items() if key.endswith(".lora_B.weight")}
    return {
        key.removesuffix(".kept"): np.unpackbits(bits.numpy(), count=INIT_R).astype(bool).tolist()
        for key, bits in stored.items()
        if key.endswith(".kept")
    }


def train_all(folder: Path, world: int, stages: Sequence[int] = STAGES) -> dict[str, Any]:
    """Every trial at each stage, each stopped once and resumed: its losses, and what it left."""
    own = dict(FAMILIES)
    FAMILIES.update(lora=Probing(), lori=Watched())
    group = torch.distributed.new_group(backend="gloo") if world > 1 else None
    base, data = load_small()
    results: dict[str, Any] = {}
    try:
        for name, config in TRIALS.items():
            plan = plan_of(config, base, data)
            for stage in stages:
                trial = with_training(config, zero_stage=stage, num_workers=world)
                place = TrialFolder(folder / f"{world}{len(results):04d}")
                train_until(5, base, data, plan, trial, place, group)
                trained = run_trial(base, data, plan, trial, place, Reports(), group)
                if group:
                    torch.distributed.barrier(group)  # until the first has saved the adapter
                results[f"{name} at stage {stage}"] = trained.losses, left_by(name, place)
    finally:
        FAMILIES.update(own)
    return results


def _worker() -> None:
    """``python -m tests.test_hooks FOLDER RANK WORLD``: one worker of :func:`train_all`."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    results = train_all(folder, world)
    if rank == 0:
        (folder / f"results-{world}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def resident() -> tuple[Base, TrialData]:
    return load_small()


@pytest.fixture(scope="module")
def plain(resident: tuple[Base, TrialData]) -> dict[str, tuple[list[float], Any]]:
    base, data = resident
    results = {n: reference(Plain(TRIALS[n], base, data)) for n, reference in REFERENCES.items()}
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint
    return results


@pytest.fixture(scope="module")
def alone(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_all(tmp_path_factory.mktemp("alone"), 1, STAGES_ALONE)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("in_two")
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_hooks", str(folder), str(rank), "2"],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=500)
        assert worker.returncode == 0, output
    results: dict[str, Any] = json.loads((folder / "results-2.json").read_text())
    return results


every_trial = pytest.mark.parametrize("name", TRIALS)


def require_equal(found: Any, expected: tuple[list[float], Any], name: str) -> None:
    losses, left = found
    assert losses == pytest.approx(expected[0], abs=2e-5)
    if name == "probe":
        np.testing.assert_allclose(left, expected[1], rtol=0, atol=3e-4)
    elif name == "LoRI-S":
        assert sorted(left.values()) == sorted(expected[1].values())
    else:
        assert left == expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES_ALONE)
@every_trial
def test_stopped_and_resumed_trial_equals_a_plain_loop(
    alone: dict[str, Any], plain: dict[str, Any], name: str, stage: int
) -> None:
    require_equal(alone[f"{name} at stage {stage}"], plain[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@every_trial
def test_trial_of_two_workers_equals_a_plain_loop(
    in_two: dict[str, Any], plain: dict[str, Any], name: str, stage: int
) -> None:
    require_equal(in_two[f"{name} at stage {stage}"], plain[name], name)


@pytest.mark.slow
def test_plain_loops_prune_and_mask_as_much_as_they_shall(plain: dict[str, Any]) -> None:
    """Else equal results would prove little."""
    pattern = plain["AdaLoRA"][1]
    assert len(pattern) == 12
    assert sum(map(sum, pattern.values())) == 12 * 4 < 12 * INIT_R
    assert len({sum(ranks) for ranks in pattern.values()}) > 1, "some groups keep more than others"
    assert sum(map(sum, plain["AdaLoRA, shared"][1].values())) == 2 * 4
    assert sum(plain["LoRI-S"][1].values()) == KEEP * 2 * 4 * 384


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["AdaLoRA", pytest.param("LoRI-S", marks=pytest.mark.slow)])
def test_trial_resumed_in_any_phase_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: str, precision: str
) -> None:
    base, data = load_small(torch.bfloat16 if precision == "bf16" else torch.float32)
    config = with_training(TRIALS[name], precision=precision)
    plan = plan_of(config, base, data)
    left = {}
    for stop in (None, 3, 7):  # so from 2 and 6: amid and after pruning; before and after the mask
        place = TrialFolder(tmp_path / f"{stop or 0:05d}")
        if stop:
            train_until(stop, base, data, plan, config, place)
        trained = run_trial(base, data, plan, config, place, Reports())
        weights = (place.adapter / "adapter.safetensors").read_bytes()
        left[stop] = trained.losses, trained.evaluations, weights
    assert left[3] == left[7] == left[None]
    assert weights_fingerprint(base.model, skip=base.head) == base.fingerprint


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", ["lora_fa", "lori", "vera", "randlora"])
def test_engine_in_bf16_trains_beside_frozen_projections_as_a_plain_loop_does(family: str) -> None:
    training = small_trial(precision="bf16", warmup_steps=0, schedule="constant").training
    sharing, base = "all" if family == "randlora" else "E²", make_base("llama")
    base.model.to(torch.bfloat16)  # PEFT makes adapters in float32 there, DeepSpeed casts weights
    adapted, plain = Adapted("llama", sharing, family, base), Adapted("llama", sharing, family)
    engine = Engine(adapted.model, adapted.config, training)
    parameters = trainable_parameters(plain.model)
    optimizer = torch.optim.AdamW(parameters.values(), training.learning_rate, weight_decay=0.0)
    losses, expected = [], []
    for step in range(4):
        loss = loss_of(engine.module, "llama")
        engine.backward(loss)
        engine.micro_step(step)
        plain_loss = loss_of(plain.model, "llama")
        plain_loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        expected.append(plain_loss.item())
    engine.close()
    assert max(expected) - min(expected) > 2, "it trains"
    assert losses == pytest.approx(expected, rel=1e-2)


if __name__ == "__main__":
    _worker()
