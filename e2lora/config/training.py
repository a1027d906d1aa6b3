"""Optimisation and parallelism of one trial."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from e2lora.config.deepspeed import merged
from e2lora.config.frozen import Frozen


class EarlyStopping(Frozen):
    """End after ``patience`` evaluations without a better one; the best one's weights are kept."""

    metric: str = Field(default="loss", description="of the task, on its validation rows")
    direction: Literal["minimize", "maximize"] = "minimize"
    patience: int = Field(default=3, gt=0)
    min_delta: float = Field(default=0.0, ge=0, description="what is less is no improvement")

    @model_validator(mode="after")
    def _say_which_way_is_better(self) -> EarlyStopping:
        if self.metric != "loss" and "direction" not in self.model_fields_set:
            raise ValueError(
                "`early_stopping` must say which way a metric other than the loss is better; got "
                f"metric={self.metric!r} alone. Add `direction`: 'minimize' or 'maximize'."
            )
        return self

    def is_better(self, value: float, best: float) -> bool:
        """
        >>> EarlyStopping(min_delta=0.1).is_better(0.85, best=1.0)
        True
        """
        gain = best - value if self.direction == "minimize" else value - best
        return gain > self.min_delta


class TrainConfig(Frozen):
    """Optimisation and parallelism. One step is one optimiser step on one global batch."""

    max_steps: int | None = Field(default=None, gt=0)
    num_epochs: float | None = Field(
        default=None, gt=0, description="in place of max_steps: passes over the training rows"
    )
    global_batch_size: int = Field(default=16, gt=0, description="samples of all workers, per step")
    gradient_accumulation_steps: int | Literal["auto"] = Field(
        default=1, description="'auto': as few as memory allows"
    )
    learning_rate: float = Field(gt=0)
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="of a freshly initialised head; None: as the adapter's"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="in place of warmup_steps: their share of all steps"
    )
    max_grad_norm: float = Field(default=1.0, gt=0)
    eval_every: int | None = Field(default=None, gt=0, description="steps; None: at the end only")
    early_stopping: EarlyStopping | None = None
    checkpoint_every: int | None = Field(
        default=None, gt=0, description="steps; None: at every evaluation"
    )
    save_total_limit: int = Field(
        default=1, gt=0, description="newest checkpoints kept, beside that of the best evaluation"
    )
    eval_batch_size: int = Field(default=64, gt=0)
    packing: bool = Field(
        default=False, description="rows of a microbatch one after another, instead of padding"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = Field(default=False, description="its state in main memory")
    offload_parameters: bool = Field(default=False, description="weights in main memory: stage 3")
    activation_checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none"
    torch_compile: bool = Field(
        default=False,
        description="for long runs: each trial compiles again, at its first step and its first "
        "evaluation (MiniLM on 2 CPU cores: 2 minutes, then 25 s with what torch caches on disk)",
    )
    deepspeed: dict[str, JsonValue] = Field(
        default={}, description="added to the DeepSpeed configuration that is derived from these"
    )
    num_workers: int = Field(default=1, gt=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)

    @property
    def num_steps(self) -> int:
        """``max_steps``, once they are known: see :meth:`for_rows`."""
        if self.max_steps is None:
            raise ValueError("num_epochs become steps when the number of rows is known: for_rows.")
        return self.max_steps

    @property
    def num_warmup_steps(self) -> int:
        if self.warmup_ratio is None:
            return self.warmup_steps
        return math.ceil(_exact(self.warmup_ratio) * self.num_steps)

    @property
    def accumulation(self) -> int:
        """Microbatches of a worker per step, once they are known."""
        if self.gradient_accumulation_steps == "auto":
            raise ValueError("gradient_accumulation_steps='auto' are found before training starts.")
        return self.gradient_accumulation_steps

    @property
    def micro_batch_size(self) -> int:
        """Samples of one microbatch of one worker."""
        return self.global_batch_size // (self.num_workers * self.accumulation)

    def for_rows(self, num_rows: int) -> TrainConfig:
        """With ``max_steps`` in place of epochs.

        >>> TrainConfig(num_epochs=2, learning_rate=1e-3).for_rows(100).max_steps
        13
        """
        if self.num_epochs is None:
            return self
        steps = max(1, math.ceil(_exact(self.num_epochs) * num_rows / self.global_batch_size))
        return TrainConfig.model_validate(
            {**self.model_dump(), "max_steps": steps, "num_epochs": None}
        )

    def on_workers(self, num_workers: int) -> TrainConfig:
        """The same training by so many workers, in microbatches that are no larger than now.

        >>> four = TrainConfig(max_steps=1, learning_rate=1e-3, num_workers=4)
        >>> four.on_workers(2).accumulation, four.on_workers(2).micro_batch_size
        (2, 4)

        Raises:
            ValueError: the global batch can't be shared out evenly.
        """
        if self.global_batch_size % num_workers:
            raise ValueError(
                "`global_batch_size` must be a multiple of every number of workers; got "
                f"{self.global_batch_size} and {num_workers}. Change one of them."
            )
        accumulation = self.gradient_accumulation_steps
        if accumulation != "auto":
            share, most = self.global_batch_size // num_workers, self.micro_batch_size
            fitting = (n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
            accumulation = next(fitting)
        update = {"num_workers": num_workers, "gradient_accumulation_steps": accumulation}
        return TrainConfig.model_validate({**self.model_dump(), **update})

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's dictionary: what follows from these options, and what ``deepspeed`` adds."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        return merged(
            {
                "train_micro_batch_size_per_gpu": self.micro_batch_size,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": self.max_grad_norm,
                "zero_optimization": zero,
                "bf16": {"enabled": self.precision == "bf16"},
                "fp16": {"enabled": self.precision == "fp16"},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 2**31,
            },
            self.deepspeed,
        )

    @model_validator(mode="after")
    def _options_agree(self) -> TrainConfig:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "training's length is given by one of `max_steps` and `num_epochs`; got "
                f"{self.max_steps} and {self.num_epochs}. Give one of them."
            )
        self._require_batches()
        self._require_schedule()
        self._require_memory_options()
        if self.early_stopping and self.eval_every is None:
            raise ValueError(
                "early stopping looks at evaluations on the way; got eval_every=None. Set "
                "`eval_every`, or leave `early_stopping` out."
            )
        known = self.model_copy(update={"gradient_accumulation_steps": 1})
        known.deepspeed_config()  # refuses what `deepspeed` must not hold
        return self

    def _require_batches(self) -> None:
        num_micro = self.gradient_accumulation_steps
        num_micro = 1 if num_micro == "auto" else num_micro
        if num_micro < 1:
            raise ValueError(
                "`gradient_accumulation_steps` must be at least 1, or 'auto'; got "
                f"{num_micro}. Correct it."
            )
        if self.global_batch_size % (self.num_workers * num_micro):
            raise ValueError(
                "`global_batch_size` must be a multiple of num_workers x "
                f"gradient_accumulation_steps; got {self.global_batch_size} and "
                f"{self.num_workers} x {num_micro}. Change one of them."
            )

    def _require_schedule(self) -> None:
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError(
                "warmup is given by one of `warmup_steps` and `warmup_ratio`; got "
                f"{self.warmup_steps} and {self.warmup_ratio}. Leave one out."
            )
        if self.max_steps is not None and self.num_warmup_steps >= self.max_steps:
            raise ValueError(
                f"`warmup_steps` ({self.num_warmup_steps}) must be below `max_steps` "
                f"({self.max_steps})."
            )

    def _require_memory_options(self) -> None:
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"{self.precision} needs float32 master weights, which DeepSpeed keeps where they "
                "can be checkpointed at ZeRO stages 1 to 3 only; got zero_stage=0. Use stage 1, "
                "which costs nothing with one worker."
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "`offload_optimizer` is something that ZeRO does; got zero_stage=0. Use stage 1, 2 "
                "or 3."
            )
        if self.torch_compile and self.zero_stage == 3:
            raise ValueError(
                "`torch_compile` can't see how ZeRO stage 3 gathers weights while a model "
                "computes; got zero_stage=3. Use stage 1 or 2, or set torch_compile=False."
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                "`offload_parameters` needs weights that are partitioned; got "
                f"zero_stage={self.zero_stage}. Use stage 3."
            )


def _exact(written: float) -> Fraction:
    """The decimal number that was meant: 0.07 of 100 steps are 7, and rounded up no 8.

    >>> math.ceil(_exact(0.07) * 100), math.ceil(0.07 * 100)
    (7, 8)
    """
    return Fraction(str(written))


PARALLELISM = frozenset(
    {
        "num_workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "zero_stage",
        "gradient_accumulation_steps",
        "offload_optimizer",
        "offload_parameters",
        "activation_checkpointing",
        "packing",
        "torch_compile",
        "checkpoint_every",
        "save_total_limit",
    }
)
"""Options of training that spread the work and don't decide what is computed."""
