"""Trials at ZeRO stage 3 on tiny models that lie on disk, and the plain loop they are held against.

``python -m tests.zero3 FOLDER RANK WORLD`` is one worker of :func:`run_workers`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.adapters.storage import save_adapter
from e2lora.config import AdapterConfig, GenerationConfig, ModelConfig, TrainConfig
from e2lora.evaluate import judge_answers, score_rows
from e2lora.gathering import gathered_as_needed
from e2lora.gradients import Microbatch, Round, measure_gradients
from e2lora.gradients.whole import sum_gradients
from e2lora.models import Base, in_float32, load_model, reset_head
from e2lora.partitioned import Partitioning
from e2lora.plan import SharingPlan
from e2lora.targets import find_targets
from e2lora.tasks import TrialData
from e2lora.tasks.scores import Judgement, RowScore
from e2lora.training.activations import activation_checkpointed
from e2lora.training.engine import Engine, learning_rate_factor
from e2lora.weights import weights_fingerprint
from tests.kinds import KINDS, SHARINGS, made_up_gradients, make_base, make_plan

ROOT = Path(__file__).resolve().parents[1]
AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
NO_DROPOUT: dict[str, Any] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "llama": {},
}
SYSTEMS = {
    "LoRA": ("lora", "own"),
    "E²LoRA": ("lora", "E²"),
    "E²ShareLoRA": ("lora", "E²ShareLoRA"),
    "E²DoRA": ("dora", "E²"),
}
ACCUMULATION = (1, 4)
STEPS, ROWS = 4, 8
PARTED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""For ``TrainConfig.deepspeed``: however small a tensor is, it is partitioned."""


# ---- bases ------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    """Checkpoints of the tiny models; that of a classifier lacks its head."""
    for kind in AUTO:
        base = make_base(kind)
        tensors = {
            name: tensor
            for name, tensor in base.model.state_dict().items()
            if not name.startswith(base.head or "-")
        }
        base.model.save_pretrained(folder / kind, state_dict=tensors)


def load(
    folder: Path,
    kind: str,
    partitioned: bool = True,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> Base:
    labels = 3 if KINDS[kind].head else None
    model, head = load_model(
        ModelConfig(
            name=str(folder / kind), attn_implementation="eager", config_overrides=NO_DROPOUT[kind]
        ),
        AUTO[kind],
        labels,
        dtype,
        partitioning=Partitioning(dtype, offload) if partitioned else None,
    )
    return Base(model.eval(), None, head, weights_fingerprint(model, skip=head))


def plan_for(
    kind: str, family: str, sharing: str, base: Base | None = None, **options: Any
) -> tuple[SharingPlan, AdapterConfig]:
    config = AdapterConfig(
        family=family,  # type: ignore[arg-type]
        target_modules=() if family == "full" else KINDS[kind].names,
        **SHARINGS[sharing].scopes,  # type: ignore[arg-type]
        **options,
    ).seeded(0)
    return make_plan(base or make_base(kind), config, SHARINGS[sharing].plan), config


def adapted_from(base: Base, plan: SharingPlan, config: AdapterConfig) -> Any:
    """As a trial makes it."""
    needs = FAMILIES[config.family].needs_gradients
    reset_head(base.model, base.head, seed=1)
    torch.manual_seed(1)
    gradients = made_up_gradients(plan) if needs else None
    return adapt(base.model, plan, config, base.head, gradients=gradients, in_loop=True)


def take_back(base: Base, adapted: Any) -> None:
    adapted.unload()
    base.model.requires_grad_(False)
    base.model.eval()


# ---- training ---------------------------------------------------------------------------------


def batch_of(step: int) -> Tensor:
    """Token ids of a global batch."""
    return torch.randint(2, 64, (ROWS, 7), generator=torch.Generator().manual_seed(100 + step))


def loss_sum(model: Any, ids: Tensor) -> Tensor:
    """Of a batch of token ids; the same for both kinds."""
    logits = model(input_ids=ids).logits
    logits = logits[:, -1] if logits.dim() == 3 else logits
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 0] % 3, reduction="sum")


def training_of(stage: int, world: int, accumulation: int = 1, **options: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "global_batch_size": ROWS,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 0.5,
            "weight_decay": 0.1,
            "num_workers": world,
            "zero_stage": stage,
            "deepspeed": PARTED if stage == 3 else {},
            **options,
        }
    )


def train(
    engine: Engine, training: TrainConfig, steps: range = range(STEPS)
) -> dict[str, list[float]]:
    """The loop of a trial, as far as an engine is concerned: mean losses and gradient norms."""
    rank, world = dist.get_rank(), training.num_workers
    measured: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in steps:
        mine = batch_of(step)[rank::world]
        total = torch.zeros((), dtype=torch.float64)
        for ids in mine.chunk(training.accumulation):
            loss = loss_sum(engine.module, ids)
            total += loss.detach().double()
            engine.backward(loss * (world * training.accumulation / ROWS))
            engine.micro_step(step)
        dist.all_reduce(total)
        measured["loss"].append(float(total) / ROWS)
        measured["norm"].append(engine.gradient_norm())
        assert not engine.skipped
    return measured


def plain_trial(base: Base, plan: SharingPlan, config: AdapterConfig) -> dict[str, Any]:
    """The reference: AdamW on the whole global batch at once, in one process, no engine."""
    training = training_of(0, 1)
    model = adapted_from(base, plan, config)
    model.train()
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=training.weight_decay)
    measured: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        loss = loss_sum(model, batch_of(step)) / ROWS
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * learning_rate_factor(training, step)
        optimizer.step()
        optimizer.zero_grad()
        measured["loss"].append(loss.item())
        measured["norm"].append(float(norm))
    measured["final"] = {name: p.detach().clone() for name, p in parameters.items()}
    take_back(base, model)
    return measured


@contextmanager
def engine_on(
    base: Base, plan: SharingPlan, config: AdapterConfig, training: TrainConfig
) -> Iterator[Engine]:
    """An engine around a trial's adapted model; afterwards the base is what it was."""
    adapted = adapted_from(base, plan, config)
    adapted.train()
    try:
        with activation_checkpointed(adapted, training.activation_checkpointing):
            engine = Engine(adapted, config, training)
            try:
                yield engine
            finally:
                engine.close()
    finally:
        take_back(base, adapted)


def engine_trial(
    base: Base, plan: SharingPlan, config: AdapterConfig, training: TrainConfig
) -> dict[str, Any]:
    with engine_on(base, plan, config, training) as engine:
        measured: dict[str, Any] = train(engine, training)
        measured["final"] = {name: engine.value(name) for name in engine.parameters}
    return measured


# ---- everything that several workers do -------------------------------------------------------


class Rows:
    """A task whose score of a row follows from the model's logits."""

    splits = ("train", "validation")

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

    def score(self, model: Any, batch: dict[str, Tensor]) -> list[RowScore]:
        logits = model(**batch).logits.flatten(1)
        return [RowScore({}, value, 1) for value in logits.double().logsumexp(1).tolist()]


def scores_of(model: Any, number: int, group: Any = None) -> list[float]:
    """Of so many rows, by the workers of a group together."""
    rows = [{"input_ids": ids} for ids in torch.cat([batch_of(9)] * 2)[:number].tolist()]
    data = TrialData(Rows(), [], rows)  # type: ignore[arg-type]
    return [score.loss for score in score_rows(model, data, "validation", None, 2, group)]


class Numbers:
    """A tokenizer whose texts are the numbers of their tokens."""

    pad_token_id = chat_template = None
    eos_token_id = 7

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


class Prompts(Rows):
    """Seven prompts of different lengths; an answer's judgement is its text."""

    def __init__(self, generation: GenerationConfig) -> None:
        self._generation = generation

    def generation(self, split: str) -> GenerationConfig:
        return self._generation

    def prompts(self, split: str, tokenizer: Any) -> list[list[int]]:
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(8, 64, (n,), generator=draw).tolist() for n in (3, 9, 5, 2, 12, 7, 4)]

    def judge(self, split: str, numbers: Any, texts: Any) -> list[Judgement]:
        return [Judgement({}, text, None) for text in texts]


WRITING = {
    "greedy": GenerationConfig(max_new_tokens=20, batch_size=3),
    "stopped": GenerationConfig(max_new_tokens=20, batch_size=3, stop=(" 1",)),
    "by chance": GenerationConfig(
        max_new_tokens=20, batch_size=3, temperature=1.5, top_p=0.9, num_samples=2
    ),
}


def answers_of(model: Any, group: Any = None) -> dict[str, list[list[str]]]:
    """What the model writes, by the workers of a group together."""
    found = {}
    for name, generation in WRITING.items():
        data = TrialData(Prompts(generation), [], [])  # type: ignore[arg-type]
        scores = [RowScore({}, 0.0, 1)] * 7
        judged = judge_answers(model, data, "validation", Numbers(), scores, group)
        found[name] = [score.prediction for score in judged]
    return found


SHARES = {"even": (4, 4), "uneven": (6, 2), "nothing on the second": (8, 0)}
"""Rows of each worker, in microbatches of two, where gradients are measured."""


def shares_of(case: str, rank: int, world: int) -> list[Tensor]:
    rows = batch_of(0)
    if world > 1:
        rows = rows.split(list(SHARES[case]))[rank]
    return list(rows.split(2)) if len(rows) else []


def measured_gradients(
    model: Any, kind: str, case: str, rank: int, world: int, group: Any
) -> dict[str, Any]:
    """σ of each target, and the sums that LoRA-GA takes."""
    targets = find_targets(model, KINDS[kind].names)
    batches = shares_of(case, rank, world)
    rounds = [Round((0,), tuple(Microbatch(ids, (len(ids),)) for ids in batches))]
    again = batch_of(0)[:1]
    found = measure_gradients(
        model, targets, rounds, loss_sum, [ROWS], [ROWS], group=group, again=again
    )
    groups = [[target] for target in targets]
    sums = sum_gradients(model, groups, batches, loss_sum, ROWS, group=group, again=again)
    return {
        "std": [entry.moments.std for entry in found.layers],
        "loss": found.mean_loss,
        "sums": sums,
    }


def file_of(folder: Path, what: str, world: int) -> Path:
    return folder / f"{what}-{world}.pt"


def work(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What one worker finds; collective."""
    group = dist.new_group(backend="gloo") if world > 1 else None
    results: dict[str, Any] = {}
    for kind in AUTO:
        base = load(folder, kind)
        results[f"{kind} fingerprint"] = base.fingerprint
        for system, accumulation in TRIALS[kind]:
            plan, config = plan_for(kind, *SYSTEMS[system])
            training = training_of(3, world, accumulation)
            found = engine_trial(base, plan, config, training)
            results[f"{kind} {system} {accumulation}"] = found
        plan, config = plan_for(kind, *SYSTEMS["E²LoRA"])
        for name, options in OPTIONS.items() if kind == "bert" else ():
            training = training_of(3, world, **options)
            own = load(folder, kind, offload=True) if training.offload_parameters else base
            results[f"{kind} {name}"] = engine_trial(own, plan, config, training)
        results[f"{kind} again"] = engine_trial(base, plan, config, training_of(3, world, 1))
        results[f"{kind} fingerprint after"] = weights_fingerprint(base.model, base.head)
        reset_head(base.model, base.head, seed=1)  # unloading leaves the trained one
        for case in SHARES:
            results[f"{kind} gradients {case}"] = measured_gradients(
                base.model, kind, case, rank, world, group
            )
        with gathered_as_needed(base.model):
            results[f"{kind} scores"] = {
                number: scores_of(base.model, number, group) for number in (1, 2, 5, 8)
            }
            if kind == "llama":
                results["answers"] = answers_of(base.model, group)
        results[f"{kind} handover"] = hand_over(folder, kind, base, world)
    return results


TRIALS = {
    "bert": [(system, number) for system in SYSTEMS for number in ACCUMULATION],
    "llama": [("E²LoRA", 1), ("E²ShareLoRA", 4)],
}
"""System and accumulation of the trials that several workers make, by kind of model."""

OPTIONS: dict[str, dict[str, Any]] = {
    "offloaded optimizer": {"offload_optimizer": True},
    "offloaded weights": {"offload_parameters": True, "gradient_accumulation_steps": 2},
    "checkpointed activations": {"activation_checkpointing": "non_reentrant"},
}


def hand_over(folder: Path, kind: str, base: Base, world: int) -> dict[str, Any] | None:
    """One worker leaves the states of stages 0 and 3 after two steps; two go on at stage 3."""
    plan, config = plan_for(kind, *SYSTEMS["E²DoRA"])
    half = STEPS // 2
    if world == 1:
        for stage, own in ((0, load(folder, kind, partitioned=False)), (3, base)):
            training = training_of(stage, 1)
            with engine_on(own, plan, config, training) as engine:
                train(engine, training, range(half))
                torch.save(engine.gather(), file_of(folder, f"{kind}-{stage}", 1))
        return None
    found = {}
    for stage in (0, 3):
        training = training_of(3, world)
        with engine_on(base, plan, config, training) as engine:
            engine.restore(torch.load(file_of(folder, f"{kind}-{stage}", 1)))
            found[stage] = train(engine, training, range(half, STEPS))["loss"]
            found[stage] += [engine.gather()["adam_steps"].item()]
    training = training_of(3, world)
    with engine_on(base, plan, config, training) as engine:
        train(engine, training, range(half))
        state = engine.gather()
    if dist.get_rank() == 0:
        torch.save(state, file_of(folder, f"{kind}-3", world))
    return found


def made_by_families(fresh: Callable[[], Base], kind: str) -> dict[str, dict[str, Any]]:
    """What each family that can be trained at stage 3 makes of a base: tensors by name."""
    made, base = {}, fresh()
    for family, options in families_at_stage_3():
        sharing = "own" if options or family == "full" else "LSS only"
        plan, config = plan_for(kind, family, sharing, **options)
        adapted = adapted_from(base, plan, config)
        found = {f"trained/{name}": p for name, p in trainable_parameters(adapted).items()}
        found |= FAMILIES[family].frozen(adapted, DEFAULT_NAME)
        found |= FAMILIES[family].initial(adapted, DEFAULT_NAME)
        made[" ".join([family, *options.values()])] = {
            "base": weights_fingerprint(adapted, base.head),
            **({} if family == "full" else {k: t.detach().clone() for k, t in found.items()}),
        }
        take_back(base, adapted)
        if FAMILIES[family].touches_base(config):
            base = fresh()
    return made


def families_at_stage_3() -> list[tuple[str, dict[str, str]]]:
    """With what chooses a start by the base's weights."""
    keys = [(key, {}) for key, family in FAMILIES.items() if 3 in family.zero_stages]
    starts = ("pissa", "olora", "orthogonal", "gaussian")
    return [*keys, *(("lora", {"init_lora_weights": start}) for start in starts)]


def saved(folder: Path, base: Base, kind: str, family: str, stage: int) -> Path:
    """The folder of an adapter after a trial; at stage 0 with the values that stage 3 came to."""
    place = folder / f"saved-{kind}-{family}-{stage}"
    plan, config = plan_for(kind, family, "own")
    training = training_of(stage, dist.get_world_size())
    with engine_on(base, plan, config, training) as engine:
        state = folder / f"values-{kind}-{family}.pt"
        if stage == 3:
            train(engine, training)
            values = {name: engine.value(name) for name in engine.parameters}
            if dist.get_rank() == 0:
                torch.save(values, state)
        else:
            for name, value in torch.load(state).items():
                engine.assign(name, value)
        adapted = engine._model
        with engine.gathered():
            if dist.get_rank() == 0:
                save_adapter(place, adapted, base, plan, config)
    return place


def late_work(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What needs further bases: some families change them."""
    results: dict[str, Any] = {}
    for kind in AUTO:
        results[f"{kind} families"] = made_by_families(partial(load, folder, kind), kind)
        for family in ("dora", "full"):
            saved(folder, load(folder, kind), kind, family, 3)
        half = load(folder, kind, dtype=torch.bfloat16)
        before = weights_fingerprint(half.model)
        with in_float32(half.model):
            results[f"{kind} bfloat16"] = measured_gradients(
                half.model, kind, "uneven", rank, world, dist.group.WORLD
            )
        assert weights_fingerprint(half.model) == before
        plan, config = plan_for(kind, *SYSTEMS["E²LoRA"])
        training = training_of(3, world, precision="bf16")
        results[f"{kind} trained in bf16"] = engine_trial(half, plan, config, training)
    return results


# ---- processes --------------------------------------------------------------------------------


def run_workers(folder: Path, world: int) -> list[dict[str, Any]]:
    """What :func:`work` and :func:`late_work` find in each of so many processes."""
    workers, logs = [], [folder / f"log-{world}-{rank}" for rank in range(world)]
    for rank, log in enumerate(logs):  # files: who fills a pipe that isn't read would wait
        command = [sys.executable, "-m", "tests.zero3", str(folder), str(rank), str(world)]
        with log.open("w") as out:
            workers.append(subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out))
    for worker, log in zip(workers, logs, strict=True):
        assert worker.wait(timeout=600) == 0, log.read_text()[-6000:]
    return [torch.load(folder / f"found-{world}-{rank}.pt") for rank in range(world)]


def _worker() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    found = work(folder, rank, world) | late_work(folder, rank, world)
    torch.save(found, folder / f"found-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker()
