"""An adapter on disk in its compact form: each trained tensor once, the plan beside it.

    adapter/
      adapter.safetensors   trained tensors, shared ones once; and what a family took from the base
      plan.json             who shares, at what rank
      e2lora.json           the base model, the adapter's configuration, the head
      README.md             the same for people, with the lines that load it

Frozen random projections are not stored: they follow from ``projection_seed``, and their
fingerprint is checked. Nothing is unpickled. ``e2lora.adapters.export`` makes the forms that other
programs read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from e2lora.adapters import FAMILIES, adapt, is_head, origin_of, trainable_parameters
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.adapters.full import FullyTrained
from e2lora.adapters.record import VERSION, AdapterRecord, BaseRecord, adapter_card
from e2lora.config import AdapterConfig, ModelConfig, TrialConfig, in_one_paragraph
from e2lora.models import Base, own_weights, weights_fingerprint
from e2lora.plan import SharingPlan
from e2lora.records import Evaluation, write_json, write_text

WEIGHTS, RECORD, PLAN, CARD = "adapter.safetensors", "e2lora.json", "plan.json", "README.md"
INITIAL = "initial/"


def save(model: Any, folder: Path | str, adapter_name: str = DEFAULT_NAME) -> None:
    """Write an adapter that :func:`e2lora.adapters.adapt` put into a model.

    Raises:
        ValueError: no adapter of that name, made by ``adapt`` or ``load``; or one that is merged.
    """
    origin = origin_of(model, adapter_name)
    merged = [m for m in model.modules() if getattr(m, "merged_adapters", None)]
    if merged:
        raise ValueError(
            f"an adapter is saved beside the base it belongs to; {merged[0].merged_adapters} are "
            "merged into its weights at the moment. Call `unmerge_adapter` first."
        )
    fingerprint = origin.base_fingerprint or weights_fingerprint(model, skip=origin.head)
    base = _base_record(model, fingerprint)
    _write(Path(folder), model, adapter_name, base, origin.plan, origin.config, origin.head)


def save_adapter(
    folder: Path,
    adapted: Any,
    base: Base,
    plan: SharingPlan,
    config: AdapterConfig,
    trial: TrialConfig | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Write the adapter of a trial, with what is known of it for its card."""
    record = _base_record(adapted, base.fingerprint, trial.model if trial else None)
    _write(folder, adapted, DEFAULT_NAME, record, plan, config, base.head, trial, evaluation)


def _write(
    folder: Path,
    adapted: Any,
    adapter_name: str,
    base: BaseRecord,
    plan: SharingPlan,
    config: AdapterConfig,
    head: tuple[str, ...],
    trial: TrialConfig | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """An existing folder is replaced file by file."""
    from safetensors.torch import save_file

    family = FAMILIES[config.family]
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in stored_names(adapted, adapter_name).items()
    }
    tensors = family.pack(trained, adapted, adapter_name)
    for name, tensor in family.initial(adapted, adapter_name).items():
        tensors[f"{INITIAL}{name}"] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / PLAN, plan)
    record = AdapterRecord(
        base=base,
        adapter=config,
        head=head,
        frozen_fingerprint=_fingerprint(family.frozen(adapted, adapter_name)),
    )
    write_json(folder / RECORD, record)
    of_head = sum(t.numel() for name, t in trained.items() if is_head(name, adapted))
    others = sum(t.numel() for t in trained.values()) - of_head
    write_text(folder / CARD, adapter_card(record, plan, others, of_head, trial, evaluation))


def _base_record(adapted: Any, fingerprint: str, model: ModelConfig | None = None) -> BaseRecord:
    """What a model says of itself, where no trial's configuration says it."""
    inner = adapted.get_base_model()
    architecture, config = type(inner).__name__, inner.config
    name = getattr(inner, "name_or_path", "")
    if model is None and name:
        revision = None if Path(name).exists() else getattr(config, "_commit_hash", None)
        model = ModelConfig(name=name, revision=revision)
    return BaseRecord(
        weights_fingerprint=fingerprint,
        model=model,
        architecture=architecture,
        num_labels=config.num_labels if "Classification" in architecture else None,
        dtype=dtype_of(adapted),
    )


def dtype_of(model: Any) -> str:
    """Of the base weights, e.g. ``bfloat16``."""
    floating = (t.dtype for _, t in own_weights(model) if t.is_floating_point())
    return str(next(floating)).removeprefix("torch.")


def read_folder(folder: Path | str) -> tuple[AdapterRecord, SharingPlan, dict[str, Tensor]]:
    """Record, plan and stored tensors of an adapter folder.

    Raises:
        FileNotFoundError: no adapter there, or a part of it is missing.
        ValueError: a part that can't be read, or was written by another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    lacking = [name for name in (RECORD, PLAN, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"an adapter is a folder with {RECORD}, {PLAN} and {WEIGHTS}; {folder} lacks "
            f"{', '.join(lacking)}. Name the `adapter` folder of a trial, or one that `save` wrote."
        )
    try:
        version = json.loads((folder / RECORD).read_text()).get("version")
        if version != VERSION:
            raise ValueError(
                f"it is of version {version!r}, this program reads {VERSION}. Load it with the "
                "version of e2lora that wrote it"
            )
        record = AdapterRecord.model_validate_json((folder / RECORD).read_text())
        plan = SharingPlan.model_validate_json((folder / PLAN).read_text())
        stored = load_file(folder / WEIGHTS)
    except (SafetensorError, ValidationError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the files of an adapter must be whole and of this version; those of {folder} are "
            f"not: {in_one_paragraph(error)}. Otherwise take another copy."
        ) from error
    return record, plan, stored


def load_adapter(model: Any, folder: Path | str, adapter_name: str = DEFAULT_NAME) -> Any:
    """Adapt ``model`` by the folder's plan and load the weights; shared tensors are shared again.

    Args:
        model: a transformers model, or a PEFT model that gets one more adapter.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another base model, or weights that don't fit the plan.
    """
    record, plan, stored = read_folder(folder)
    _require_base(model, record, folder)
    initial = {n.removeprefix(INITIAL): t for n, t in stored.items() if n.startswith(INITIAL)}
    trained = {name: t for name, t in stored.items() if not name.startswith(INITIAL)}
    family, active = FAMILIES[record.adapter.family], getattr(model, "active_adapter", None)
    adapted = adapt(
        model,
        plan,
        record.adapter,
        record.head,
        adapter_name=adapter_name,
        initial=initial,
        in_loop=True,
    )
    try:
        frozen = _fingerprint(family.frozen(adapted, adapter_name))
        if frozen != record.frozen_fingerprint:
            raise ValueError(
                "an adapter's random projections must be those it was trained with; this version "
                f"of torch makes others from seed {record.adapter.projection_seed}. Load {folder} "
                "with the version it was trained with, and export it."
            )
        parameters = stored_names(adapted, adapter_name)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        _fill(parameters, family.unpack(trained, shapes, adapted, adapter_name), folder)
    except ValueError:  # leave the model as it was
        if isinstance(active, str):
            adapted.set_adapter(active)
            adapted.delete_adapter(adapter_name)
        else:
            adapted.unload()
        raise
    return adapted


def _require_base(model: Any, record: AdapterRecord, folder: Path | str) -> None:
    base = record.base
    fingerprint, dtype = weights_fingerprint(model, skip=record.head), dtype_of(model)
    if base.weights_fingerprint == fingerprint:
        return
    named = f"{base.model.name if base.model else base.architecture} ({base.weights_fingerprint})"
    remedy = "Load that base model."
    if base.dtype != dtype:
        remedy = (
            f"That was {base.dtype}, this is {dtype}, and the fingerprint is one of bits: load the "
            f"base with dtype=torch.{base.dtype}."
        )
    raise ValueError(
        f"an adapter belongs to the base weights it was trained on; {folder} was trained on "
        f"{named}, this base is {fingerprint}. {remedy}"
    )


def stored_names(adapted: Any, adapter_name: str) -> dict[str, Tensor]:
    """The trained tensors of an adapter by the names they are stored under: without its own.

    Whether it is the active one or not; each shared tensor once, under the first of its names.
    """
    if isinstance(adapted, FullyTrained):
        return trainable_parameters(adapted)
    slots = {slot for m in adapted.modules() for slot in getattr(m, "adapter_layer_names", ())}
    found = {}
    for name, parameter in adapted.get_base_model().named_parameters():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            if parts[depth - 1] in slots and parts[depth] == adapter_name:
                found[".".join([*parts[:depth], *parts[depth + 1 :]])] = parameter
                break
    return found


def _fill(
    parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path | str
) -> None:
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
