"""What a user may add to the DeepSpeed configuration that is derived from a ``TrainConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS: Mapping[str, str] = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "global_batch_size, num_workers, gradient_accumulation_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "learning_rate, weight_decay",
    "scheduler": "schedule, warmup_steps",
    "activation_checkpointing": "activation_checkpointing",
    "amp": "precision",
    "torch_autocast": "precision",
    "compile": "torch_compile",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload_optimizer",
    "zero_optimization.offload_param.device": "offload_parameters",
    "zero_optimization.cpu_offload": "offload_optimizer",  # older names that are still heard
    "zero_optimization.cpu_offload_param": "offload_parameters",
    "fp16.enabled": "precision",
    "fp16.fp16_master_weights_and_grads": "precision",
    "bf16.enabled": "precision",
    "bf16.bf16_master_weights_and_grads": "precision",
}
"""What only an option of ours decides, and which."""

OPEN = frozenset(
    {
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "csv_monitor",
        "data_types",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "sparse_gradients",
        "steps_per_print",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "zero_optimization",
    }
)
"""Keys of DeepSpeed's that a user may set; DeepSpeed itself passes over keys that it doesn't know,
and knows others that would train something else here."""


def merged(derived: Mapping[str, Any], extra: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """``derived`` with what a user adds to it.

    >>> merged({"zero_optimization": {"stage": 2}}, {"zero_optimization": {"overlap_comm": False}})
    {'zero_optimization': {'stage': 2, 'overlap_comm': False}}

    Raises:
        ValueError: a key that isn't open to users, or one that contradicts our options.
    """
    result = dict(derived)
    for key, value in extra.items():
        place = f"{path}{key}"
        if place in OURS and derived.get(key) != value:
            raise ValueError(
                f"`deepspeed` may add to what is derived, not contradict it; {place} is decided by "
                f"`{OURS[place]}` (here: {derived.get(key)!r}), got {value!r}. Set that option and "
                "take the key out."
            )
        if not path and key not in OPEN and key not in OURS:
            raise ValueError(
                f"`deepspeed` takes some of DeepSpeed's top-level keys; {key!r} is none of them: "
                f"{', '.join(sorted(OPEN))}. Correct or remove it."
            )
        inner = derived.get(key)
        if isinstance(inner, Mapping) != isinstance(value, Mapping) and key in derived:
            raise ValueError(
                f"`deepspeed` must hold what DeepSpeed expects; {place} is "
                f"{'a dictionary' if isinstance(inner, Mapping) else 'no dictionary'}, got "
                f"{value!r}. Correct it."
            )
        if isinstance(value, Mapping):
            result[key] = merged(inner or {}, value, f"{place}.")
        else:
            result[key] = value
    return result
