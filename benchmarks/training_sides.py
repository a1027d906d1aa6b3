"""The sides that are compared: each trains in a process of its own, when it is its turn."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

LEARNING_RATE = 1e-3
R, LORA_ALPHA = 8, 16
OURS, TRAINER, BARE = "e2lora", "Trainer", "bare loop"


class Setup(NamedTuple):
    """What all sides train, as plain values for their processes."""

    model: str
    task: dict[str, Any]
    targets: list[str]
    batch_size: int
    num_steps: int
    device: str
    precision: str
    threads: int
    folder: str


class Count(NamedTuple):
    """Of one batch."""

    rows: int
    tokens: int  # without padding
    places: int  # with it


class Round(NamedTuple):
    """What a side needed for a round; ``cpu_seconds`` are of all of its threads."""

    seconds: float
    cpu_seconds: float
    counts: list[Count]
    memory: int  # peak since the process began, in bytes

    @property
    def tokens(self) -> int:
        return sum(count.tokens for count in self.counts)


class Told(NamedTuple):
    """What a side says at the end; ``mfu`` is that of one token per second, where it is known."""

    losses: list[float]
    mfu: float = 0.0


class Turns:
    """A side's line to the parent, which says how many steps it may do next."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self._pipe, self._device = pipe, device
        self._done, self._from = 0, 0
        self._until: int | None = 0
        self.count: Callable[[int], Count]  # of the batch of a step; asked outside of the time
        self.prepare: Callable[[range], None] = lambda steps: None

    def wait(self) -> bool:
        """For the next turn; False: there is none."""
        num_steps = self._pipe.recv()
        if num_steps == 0:
            return False
        self._from, self._until = self._done, self._done + num_steps
        self.prepare(range(self._from, self._until))
        self._began = time.perf_counter(), time.process_time()
        return True

    def after_step(self) -> bool:
        """Whether to go on; returns after the parent gave the next turn."""
        self._done += 1
        if self._done != self._until:
            return True
        _synchronize(self._device)
        now = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = now[0] - self._began[0], now[1] - self._began[1]
        counts = [self.count(step) for step in range(self._from, self._until)]
        self._pipe.send(Round(seconds, cpu_seconds, counts, _peak_memory(self._device)))
        return self.wait()


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_memory(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Material(NamedTuple):
    """What a side trains, as it lies in memory."""

    config: Any
    base: Any
    data: Any
    plan: Any


def load(setup: Setup) -> Material:
    import torch

    from e2lora.config import GroupSpec, TrialConfig
    from e2lora.plan import build_plan
    from e2lora.resident import Resident
    from e2lora.targets import find_targets

    tree = {
        "model": {"name": setup.model},
        "task": setup.task,
        "adapter": {"target_modules": setup.targets},
        "plan": {"topology": "none", "r": R, "lora_alpha": LORA_ALPHA},
        "training": {
            "max_steps": setup.num_steps,
            "learning_rate": LEARNING_RATE,
            "global_batch_size": setup.batch_size,
            "precision": setup.precision,
            "gpus_per_worker": 1 if setup.device == "cuda" else 0,
        },
    }
    config = TrialConfig.model_validate_json(json.dumps(tree))
    spec = GroupSpec.of(config.training)
    base, data = Resident(spec, torch.device(setup.device)).load(config)
    targets = find_targets(base.model, config.adapter.target_modules)
    return Material(config, base, data, build_plan(targets, config.plan, None))


# ---- sides ------------------------------------------------------------------------------------


def ours(setup: Setup, turns: Turns) -> Told:
    from e2lora.records import TrialFolder
    from e2lora.training import Reports, TrialStopped, run_trial

    config, base, data, plan = material = load(setup)
    losses: list[float] = []
    mfu: list[float] = []

    def counted(step: int) -> Count:
        batch = our_batch(material, step)
        return count(batch.microbatches[0], batch.num_tokens)

    def on_step(step: int, measured: dict[str, float]) -> bool:
        losses.append(measured["loss"])
        mfu.append(measured.get("mfu", 0.0) / measured["tokens_per_second"])
        if not turns.after_step():
            raise TrialStopped("the benchmark is over")
        return False

    turns.count = counted
    with one_worker(setup):
        turns.wait()
        try:
            place = TrialFolder(Path(setup.folder) / "00000")
            run_trial(base, data, plan, config, place, Reports(on_step=on_step))
        except TrialStopped:
            return Told(losses, statistics.median(mfu))
    raise RuntimeError("the trial must have stopped when the benchmark was over")


def bare(setup: Setup, turns: Turns) -> Told:
    return _bare_loop(setup, turns, our_batch)


def bare_random_order(setup: Setup, turns: Turns) -> Told:
    return _bare_loop(setup, turns, batch_in_random_order)


def _bare_loop(setup: Setup, turns: Turns, batch_of: Callable[[Material, int], Any]) -> Told:
    import torch

    from e2lora.adapters import adapt, trainable_parameters
    from e2lora.models import reset_head
    from e2lora.training import _seed_of

    material = load(setup)
    config, base, data, plan = material
    reset_head(base.model, base.head, config.seed)
    torch.manual_seed(config.seed)
    model = adapt(base.model, plan, config.adapter, base.head)
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    batches: dict[int, Any] = {}

    def prepare(steps: range) -> None:
        batches.clear()
        batches.update({step: batch_of(material, step) for step in steps})

    turns.prepare = prepare
    turns.count = lambda step: count(batches[step].microbatches[0], batches[step].num_tokens)
    losses, narrow = [], setup.precision == "bf16"
    going = turns.wait()
    model.train()
    step = 0
    while going:
        batch = batches[step]
        torch.manual_seed(_seed_of(config.seed, step, 0))
        inputs = {k: v.to(setup.device) for k, v in batch.microbatches[0].items()}
        with torch.autocast(setup.device, torch.bfloat16, enabled=narrow):
            loss = data.task.loss_sum(model, inputs) / batch.num_supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / setup.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        step += 1
        going = turns.after_step()
    return Told([float(loss) for loss in losses])


def trainer(setup: Setup, turns: Turns) -> Told:
    return _trainer(setup, turns, {})


def trainer_grouped(setup: Setup, turns: Turns) -> Told:
    return _trainer(setup, turns, {"train_sampling_strategy": "group_by_length"})


def trainer_deepspeed(setup: Setup, turns: Turns) -> Told:
    from e2lora.partitioned import import_deepspeed

    import_deepspeed()
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    dictionary = {
        **dict.fromkeys((*keys, "gradient_clipping"), "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    with one_worker(setup):
        return _trainer(setup, turns, {"deepspeed": dictionary})


def _trainer(setup: Setup, turns: Turns, options: dict[str, Any]) -> Told:
    """As a user of PEFT and the Trainer would write it, with their defaults."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from e2lora.assets import resolve

    _, base, data, _ = load(setup)
    causal = data.task.num_labels is None
    arguments = TrainingArguments(
        output_dir=f"{setup.folder}/trainer",
        max_steps=setup.num_steps,
        per_device_train_batch_size=setup.batch_size,
        learning_rate=LEARNING_RATE,
        bf16=setup.precision == "bf16",
        use_cpu=setup.device == "cpu",
        logging_steps=10,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    labels = {} if causal else {"num_labels": data.task.num_labels}
    model = data.task.auto_class.from_pretrained(
        resolve(setup.model), dtype=base.model.dtype, **labels
    )
    lora = LoraConfig(
        r=R,
        lora_alpha=LORA_ALPHA,
        target_modules=setup.targets,
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
    )
    model = get_peft_model(model, lora)
    tokenizer, rows = base.processor, [data.train[i] for i in range(len(data.train))]
    del base, data
    padding = DataCollatorForSeq2Seq(tokenizer) if causal else DataCollatorWithPadding(tokenizer)
    counts: list[Count] = []

    def collate(features: list[dict[str, Any]]) -> Any:
        tokens = sum(len(row["input_ids"]) for row in features)
        batch = padding(features)
        counts.append(count(batch, tokens))
        return batch

    class TakesTurns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if not turns.after_step():
                control.should_training_stop = True

    turns.count = lambda step: counts[step]
    user = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[TakesTurns()],
    )
    turns.wait()
    user.train()
    return Told([])


SIDES: dict[str, Callable[[Setup, Turns], Told]] = {
    OURS: ours,
    TRAINER: trainer,
    "Trainer, grouped": trainer_grouped,
    "Trainer, ZeRO-1": trainer_deepspeed,
    BARE: bare,
    "bare, random order": bare_random_order,
}


def count(batch: Any, tokens: int) -> Count:
    rows, length = batch["input_ids"].shape
    return Count(rows, tokens, rows * length)


def our_batch(material: Material, step: int) -> Any:
    from e2lora.data import Batches

    config, base, data, _ = material
    return Batches(data, base.processor, config.training, config.seed).at(step)


def batch_in_random_order(material: Material, step: int) -> Any:
    import numpy as np

    from e2lora.data import StepBatch

    config, base, data, _ = material
    order = np.random.default_rng(0).permutation(len(data.train))
    size = config.training.global_batch_size
    first = step * size % (len(order) - size + 1)
    rows = [data.train[int(i)] for i in order[first : first + size]]
    tensors = data.task.collate(rows, base.processor)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return StepBatch([tensors], data.task.num_supervised(rows), tokens)


@contextmanager
def one_worker(setup: Setup) -> Iterator[None]:
    """A process group of this process alone, as our loop's workers and DeepSpeed want one."""
    import torch

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group(
        "nccl" if setup.device == "cuda" else "gloo",
        init_method=f"file://{tempfile.mkdtemp(dir=setup.folder)}/rendezvous",
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


def run_side(side: str, setup: Setup, pipe: Connection) -> None:
    """The whole life of a side's process: its results go through ``pipe``, its losses last."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
    ):  # the Trainer would take them for a launcher's
        os.environ.pop(name, None)
    os.dup2(2, 1)  # what libraries print is not the benchmark's result
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    torch.set_num_threads(setup.threads)
    pipe.send(SIDES[side](setup, Turns(pipe, setup.device)))
