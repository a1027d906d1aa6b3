"""Any adapter that adds A and B, as plain LoRA of one rank and scale 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from e2lora.adapters import FAMILIES
from e2lora.adapters.family import DEFAULT_NAME, Factors, layers_of
from e2lora.adapters.record import AdapterRecord, BaseRecord
from e2lora.adapters.tensors import write_tensors
from e2lora.plan import SharingPlan
from e2lora.weights import wrapped_modules

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes; 16 is its default
ADAPTER_FILE = "adapter_model.safetensors"


def write_portable(
    place: Path,
    adapted: Any,
    record: AdapterRecord,
    plan: SharingPlan,
    base: BaseRecord,
    dtype: torch.dtype,
) -> list[str]:
    """Returns warnings."""
    from peft import LoraConfig

    family = FAMILIES[record.adapter.family]
    factors = {
        path: family.factors(layer, DEFAULT_NAME)
        for path, layer in layers_of(adapted, plan).items()
    }
    r = max(pair.a.shape[0] for pair in factors.values())
    tensors = {}
    for path, pair in factors.items():
        for slot, tensor in zip("AB", _padded(pair, r), strict=True):
            tensors[f"base_model.model.{path}.lora_{slot}.weight"] = tensor
    tensors = _narrowed(tensors, dtype)
    inner = adapted.get_base_model()
    for module in record.head:
        trained = inner.get_submodule(module).modules_to_save[DEFAULT_NAME]
        for key, tensor in trained.state_dict().items():
            tensors[f"base_model.model.{module}.{key}"] = tensor
    written = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    own = adapted.peft_config[DEFAULT_NAME]
    assert base.model is not None
    task_type = own.task_type or task_type_of(inner)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=shortest_endings(inner, list(factors)),
        modules_to_save=list(record.head) or None,
        fan_in_fan_out=bool(getattr(own, "fan_in_fan_out", False)),
        task_type=task_type,
        base_model_name_or_path=base.model.name,
        revision=base.model.revision,
        inference_mode=True,
    )
    architecture = {
        "base_model_class": type(inner).__name__,
        "parent_library": type(inner).__module__,
    }
    place.mkdir(parents=True)
    config.save_pretrained(str(place), auto_mapping_dict=None if task_type else architecture)
    write_tensors(place / ADAPTER_FILE, written, {"format": "pt"})  # some readers ask for it
    return portable_warnings(r, record.head)


def task_type_of(model: Any) -> str | None:
    """PEFT's word for a language model, by which its Auto classes find the base's class.

    None: of other models PEFT notes the class itself.
    """
    from transformers.models.auto import modeling_auto

    classes = {
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    name, kind = type(model).__name__, model.config.model_type
    return next((task for task, names in classes.items() if names.get(kind) == name), None)


def portable_warnings(r: int, head: tuple[str, ...]) -> list[str]:
    """What readers of plain LoRA do not take as it is."""
    warnings = []
    if r > VLLM_RANKS[0]:
        allowed = next((rank for rank in VLLM_RANKS if rank >= r), None)
        remedy = f"start it with --max-lora-rank {allowed}" if allowed else "use the merged form"
        warnings.append(f"r={r} is above vLLM's default limit of {VLLM_RANKS[0]}: {remedy}")
    if head:
        warnings.append(
            f"vLLM and llama.cpp refuse adapters that bring a head ({', '.join(head)}): use the "
            "merged form there"
        )
    return warnings


def _padded(pair: Factors, r: int) -> tuple[Tensor, Tensor]:
    """A (r × in) and B (out × r) of scale 1, in float64, where no product of B is rounded."""
    lacking = r - pair.a.shape[0]
    a = F.pad(pair.a.detach().double(), (0, 0, 0, lacking))
    b = F.pad(pair.b.detach().double() * pair.scale, (0, lacking))
    return a, b


def _narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In the adapter's own type if it holds every number exactly, as at a scale that is a power of
    two; else in float32, so that a bfloat16 adapter isn't rounded once more.
    """
    own = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if all(torch.equal(own[name].double(), tensor) for name, tensor in tensors.items()):
        return own
    return {name: tensor.float() for name, tensor in tensors.items()}


def shortest_endings(model: Any, paths: list[str]) -> list[str]:
    """As few words as tell these modules from all others: ``q_proj`` rather than every path.

    PEFT and its kin adapt each module whose path is one of the words, or ends in a dot and one.
    """
    inside = wrapped_modules(model)
    others = [
        path
        for path, _ in model.named_modules()
        if path not in paths and not any(path.startswith(f"{outer}.") for outer in inside)
    ]
    endings = set()
    for path in paths:
        parts = path.split(".")
        candidates = (".".join(parts[-depth:]) for depth in range(1, len(parts)))
        endings.add(next((e for e in candidates if not any(_ends(o, e) for o in others)), path))
    return sorted(endings)


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")
