"""An adapter on disk: weights, plan and configuration in one folder, the sharing kept.

The folder is an ordinary PEFT adapter (each layer's tensors written out, ``rank_pattern`` and
``alpha_pattern`` set), so PEFT alone loads it with identical outputs. ``e2lora.json`` and
``plan.json`` beside it let :func:`load_adapter` tie the shared tensors again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from e2lora.adapters import adapt
from e2lora.config import AdapterConfig, Frozen
from e2lora.models import Base
from e2lora.plan import SharingPlan
from e2lora.records import write_json


class AdapterRecord(Frozen):
    """``e2lora.json``: what the weights belong to."""

    version: Literal[1] = 1
    base_fingerprint: str
    adapter: AdapterConfig
    head: tuple[str, ...]


def save_adapter(
    folder: Path, adapted: Any, base: Base, plan: SharingPlan, config: AdapterConfig
) -> None:
    """Write the folder; an existing one is replaced file by file."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / "plan.json", plan)
    record = AdapterRecord(base_fingerprint=base.fingerprint, adapter=config, head=base.head)
    write_json(folder / "e2lora.json", record)


def load_adapter(base: Base, folder: Path) -> Any:
    """Adapt ``base.model`` by the folder's plan and load the weights; shared tensors are tied.

    Raises:
        ValueError: another base model, or weights that don't fit the plan.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    record = AdapterRecord.model_validate_json((folder / "e2lora.json").read_text())
    if record.base_fingerprint != base.fingerprint:
        raise ValueError(
            f"an adapter belongs to the base weights it was trained on; {folder} was trained on "
            f"{record.base_fingerprint}, this base is {base.fingerprint}. Load that base model."
        )
    plan = SharingPlan.model_validate_json((folder / "plan.json").read_text())
    adapted = adapt(base.model, plan, record.adapter, record.head)
    result: Any = set_peft_model_state_dict(
        adapted, load_file(folder / "adapter_model.safetensors")
    )
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    missing = sorted(trainable & set(result.missing_keys))
    if missing or result.unexpected_keys:
        raise ValueError(
            f"adapter weights must fit the plan exactly; {folder} lacks {missing[:3]} and has "
            f"{result.unexpected_keys[:3]} too many. The folder is damaged: take another copy."
        )
    return adapted
