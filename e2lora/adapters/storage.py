"""An adapter on disk in its compact form: each trained tensor once, the plan beside it.

    adapter/
      adapter.safetensors   trained tensors, shared ones once; and what a family started from
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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from e2lora.adapters import (
    FAMILIES,
    adapt,
    bits_of,
    is_head,
    origin_of,
    trainable_parameters,
)
from e2lora.adapters.family import DEFAULT_NAME
from e2lora.adapters.full import FullyTrained
from e2lora.adapters.record import VERSION, AdapterRecord, BaseRecord, Count, adapter_card
from e2lora.adapters.tensors import write_tensors
from e2lora.config import AdapterConfig, ModelConfig, TrialConfig, in_one_paragraph
from e2lora.models import Base
from e2lora.partitioned import gathered, shape_of
from e2lora.plan import SharingPlan
from e2lora.quantized import keep_as_stored, quantisation_of
from e2lora.records import Evaluation, write_json, write_text
from e2lora.weights import dtype_of

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
    base = _base_record(model, *(origin.touched_base or bits_of(model, origin.head)))
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
    dtype = dtype_of(base.model)
    record = _base_record(adapted, base.fingerprint, dtype, trial.model if trial else None)
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
    family = FAMILIES[config.family]
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in stored_names(adapted, adapter_name).items()
    }
    packed = family.pack(trained, adapted, adapter_name)
    initial = {
        f"{INITIAL}{name}": tensor.detach().cpu().contiguous()
        for name, tensor in family.initial(adapted, adapter_name).items()
    }
    write_tensors(folder / WEIGHTS, {**packed, **initial})
    write_json(folder / PLAN, plan)
    record = AdapterRecord(
        base=base,
        adapter=config,
        head=head,
        frozen_fingerprint=_fingerprint(family.frozen(adapted, adapter_name)),
    )
    write_json(folder / RECORD, record)
    count = _count(trained, packed, adapted)
    write_text(folder / CARD, adapter_card(record, plan, count, family.lacks, trial, evaluation))


def _count(trained: Mapping[str, Tensor], packed: Mapping[str, Tensor], adapted: Any) -> Count:
    own = [name for name in trained if not is_head(name, adapted)]
    entries = {
        stage: {name: tensors[name].numel() for name in own if name in tensors}
        for stage, tensors in (("start", trained), ("end", packed))
    }
    adapter, kept = (sum(sizes.values()) for sizes in entries.values())
    head = sum(tensor.numel() for tensor in trained.values()) - adapter
    singular = {  # of AdaLoRA and IncreLoRA: one value for each rank
        stage: sum(size for name, size in sizes.items() if name.endswith(".lora_E"))
        for stage, sizes in entries.items()
    }
    ranks = (singular["end"], singular["start"]) if singular["start"] else None
    return Count(adapter, head, kept, ranks)


def _base_record(
    adapted: Any, fingerprint: str, dtype: str, model: ModelConfig | None = None
) -> BaseRecord:
    """What a model says of itself, where no trial's configuration says it."""
    inner = adapted.get_base_model()
    architecture, config = type(inner).__name__, inner.config
    name = getattr(inner, "name_or_path", "")
    if model is None and name:
        revision = None if Path(name).exists() else getattr(config, "_commit_hash", None)
        model = ModelConfig(name=name, revision=revision, quantization=quantisation_of(inner))
    return BaseRecord(
        weights_fingerprint=fingerprint,
        model=model,
        architecture=architecture,
        num_labels=config.num_labels if "Classification" in architecture else None,
        dtype=dtype,
    )


def read_folder(folder: Path | str) -> tuple[AdapterRecord, SharingPlan, dict[str, Tensor]]:
    """Record, plan and stored tensors of an adapter folder.

    Raises:
        FileNotFoundError: no adapter there, or a part of it is missing.
        ValueError: a part that can't be read, or was written by another version.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    lacking = [name for name in (RECORD, PLAN, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"an adapter is a folder with {RECORD}, {PLAN} and {WEIGHTS}; {folder} lacks "
            f"{', '.join(lacking)}. Name the `adapter` folder of a trial, or one that `save` wrote."
        )
    version = _read(folder / RECORD, lambda file: json.loads(file.read_text()).get("version"))
    if version != VERSION:
        raise ValueError(
            f"an adapter's files must be of this program's version; {folder / RECORD} is of "
            f"version {version!r}, this program reads {VERSION}. Load it with the version of "
            "e2lora that wrote it."
        )
    record = _read(folder / RECORD, partial(_parsed, AdapterRecord))
    plan = _read(folder / PLAN, partial(_parsed, SharingPlan))
    return record, plan, _read(folder / WEIGHTS, load_file)


def _parsed(kind: type[BaseModel], file: Path) -> Any:
    json.loads(text := file.read_text())  # that it is cut off is said shorter here
    return kind.model_validate_json(text)


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return read(file)
    except ValidationError as error:
        fault = f"something else stands in it: {in_one_paragraph(error)}"
    except (SafetensorError, ValueError, AttributeError) as error:
        fault = f"it is truncated or damaged: {error}"
    raise ValueError(
        f"the files of an adapter must be whole and as they were written; {file} is not: "
        f"{fault.rstrip('.')}. Unless you edited it, take another copy."
    )


def load_adapter(model: Any, folder: Path | str, adapter_name: str = DEFAULT_NAME) -> Any:
    """Adapt ``model`` by the folder's plan and load the weights; shared tensors are shared again.

    Args:
        model: a transformers model, or a PEFT model that gets one more adapter.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: another base model, or weights that don't fit the plan.
    """
    record, plan, stored = read_folder(folder)
    keep_as_stored(model)
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
        if bool(frozen) != bool(record.frozen_fingerprint):
            raise ValueError(
                f"an adapter's record must be of one family; that of {folder} names {family.name} "
                f"and {'no' if frozen else 'a'} fingerprint of random projections. The folder is "
                "damaged: take another copy."
            )
        if frozen != record.frozen_fingerprint:
            raise ValueError(
                "an adapter's random projections must be those it was trained with; this version "
                f"of torch makes others from seed {record.adapter.projection_seed}. Load {folder} "
                "with the version it was trained with, and export it."
            )
        parameters = stored_names(adapted, adapter_name)
        shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
        _fill(
            parameters, family.unpack(trained, shapes, adapted, adapter_name), folder, family.name
        )
    except ValueError as error:  # leave the model as it was
        if isinstance(active, str):
            adapted.set_adapter(active)
            adapted.delete_adapter(adapter_name)
        else:
            adapted.unload()
        if family.touches_base(record.adapter):
            raise ValueError(
                f"{error} The base in memory was changed on the way: load it anew, too."
            ) from error
        raise
    return adapted


def _require_base(model: Any, record: AdapterRecord, folder: Path | str) -> None:
    base = record.base
    fingerprint, dtype = bits_of(model, record.head)
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
    parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path | str, family: str
) -> None:
    missing = sorted(parameters.keys() - stored.keys())
    extra = sorted(stored.keys() - parameters.keys())
    wrong = sorted(
        f"{name} {tuple(stored[name].shape)} for {shape_of(parameters[name])}"
        for name in parameters.keys() & stored.keys()
        if shape_of(parameters[name]) != tuple(stored[name].shape)
    )
    if missing or extra or wrong:
        raise ValueError(
            f"adapter weights must fit the plan exactly, as weights of {family}, the family of the "
            f"folder's record; {folder} lacks {missing[:3]}, has {extra[:3]} too many and "
            f"{wrong[:3]} in other shapes. The folder is damaged: take another copy."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            with gathered([parameter], write=True):
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
