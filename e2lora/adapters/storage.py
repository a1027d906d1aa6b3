"""An adapter on disk in its compact form: each trained tensor once, the plan beside it.

    adapter/
      adapter.safetensors   trained tensors, shared ones once; and what a family took from the base
      plan.json             who shares, at what rank
      e2lora.json           the base model, the adapter's configuration, the head

Frozen random projections are not stored: they follow from ``projection_seed``, and their
fingerprint is checked. Nothing is unpickled. ``e2lora.adapters.export`` makes the forms that other
programs read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from e2lora.adapters import FAMILIES, adapt, trainable_parameters
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.config import AdapterConfig, Frozen
from e2lora.models import Base, weights_fingerprint
from e2lora.plan import SharingPlan
from e2lora.records import write_json

WEIGHTS, RECORD, PLAN = "adapter.safetensors", "e2lora.json", "plan.json"
INITIAL = "initial/"


class AdapterRecord(Frozen):
    """``e2lora.json``: what the weights belong to."""

    version: Literal[2] = 2
    base_fingerprint: str
    adapter: AdapterConfig
    head: tuple[str, ...]
    frozen_fingerprint: str = ""


def save_adapter(
    folder: Path, adapted: Any, base: Base, plan: SharingPlan, config: AdapterConfig
) -> None:
    """Write the folder; an existing one is replaced file by file."""
    from safetensors.torch import save_file

    family = FAMILIES[config.family]
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in stored_names(adapted, DEFAULT_NAME).items()
    }
    tensors = family.pack(trained, config)
    for name, tensor in family.initial(adapted, DEFAULT_NAME).items():
        tensors[f"{INITIAL}{name}"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / PLAN, plan)
    record = AdapterRecord(
        base_fingerprint=base.fingerprint,
        adapter=config,
        head=base.head,
        frozen_fingerprint=_fingerprint(family.frozen(adapted, DEFAULT_NAME)),
    )
    write_json(folder / RECORD, record)


def load_adapter(model: Any, folder: Path | str, adapter_name: str = DEFAULT_NAME) -> Any:
    """Adapt ``model`` by the folder's plan and load the weights; shared tensors are shared again.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another base model, or weights that don't fit the plan.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise FileNotFoundError(
            f"an adapter is a folder with {RECORD}, {PLAN} and {WEIGHTS}; {folder} has no "
            f"{RECORD}. Name the `adapter` folder of a trial."
        )
    record = AdapterRecord.model_validate_json((folder / RECORD).read_text())
    plan = SharingPlan.model_validate_json((folder / PLAN).read_text())
    fingerprint = weights_fingerprint(model, skip=record.head)
    if record.base_fingerprint != fingerprint:
        raise ValueError(
            f"an adapter belongs to the base weights it was trained on; {folder} was trained on "
            f"{record.base_fingerprint}, this base is {fingerprint}. Load that base model."
        )
    stored = load_file(folder / WEIGHTS)
    initial = {n.removeprefix(INITIAL): t for n, t in stored.items() if n.startswith(INITIAL)}
    family = FAMILIES[record.adapter.family]
    adapted = adapt(
        model, plan, record.adapter, record.head, adapter_name=adapter_name, initial=initial
    )
    frozen = _fingerprint(family.frozen(adapted, adapter_name))
    if frozen != record.frozen_fingerprint:
        raise ValueError(
            "an adapter's random projections must be those it was trained with; this version of "
            f"torch makes others from seed {record.adapter.projection_seed}. Load {folder} with "
            "the version it was trained with, and export it."
        )
    parameters = stored_names(adapted, adapter_name)
    trained = {name: t for name, t in stored.items() if not name.startswith(INITIAL)}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    _fill(parameters, family.unpack(trained, shapes), folder)
    return adapted


def stored_names(adapted: Any, adapter_name: str) -> dict[str, Tensor]:
    """The trainable tensors by the names they are stored under: without the adapter's own."""
    return {
        ".".join(part for part in name.split(".") if part != adapter_name): parameter
        for name, parameter in trainable_parameters(adapted).items()
    }


def _fill(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    missing = sorted(parameters.keys() - stored.keys())
    extra = sorted(stored.keys() - parameters.keys())
    wrong = sorted(
        f"{name} {tuple(stored[name].shape)} for {tuple(parameters[name].shape)}"
        for name in parameters.keys() & stored.keys()
        if parameters[name].shape != stored[name].shape
    )
    if missing or extra or wrong:
        raise ValueError(
            f"adapter weights must fit the plan exactly; {folder} lacks {missing[:3]}, has "
            f"{extra[:3]} too many and {wrong[:3]} in other shapes. The folder is damaged: take "
            "another copy."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits of the tensors' values in float32; "" of none."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
