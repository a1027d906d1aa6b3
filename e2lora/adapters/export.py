"""An adapter folder in the forms that other programs read.

* ``peft``: what PEFT alone loads, every layer with its own tensors (``rank_pattern`` and all).
* ``portable``: plain LoRA of one rank and scale 1, for readers that know no more than ``r`` and
  ``lora_alpha`` (vLLM, llama.cpp's converter). Smaller ranks are filled up with zeros, and the
  scale lies in B: the same function.
* ``merged``: a model that transformers alone loads.

Each is loaded again by its reader, and its outputs are compared with the adapter's: on a random
batch, computed in float32, so that what differs is what was written. How much may differ depends on
how much the adapter does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from e2lora.adapters import FAMILIES
from e2lora.adapters.comparison import Change, Comparison, judge, output_of, random_batch
from e2lora.adapters.family import DEFAULT_NAME, Ability
from e2lora.adapters.portable import write_portable
from e2lora.adapters.record import BaseRecord, export_card
from e2lora.adapters.storage import CARD, INITIAL, load_adapter, read_folder
from e2lora.assets import fetch_configuration, resolve
from e2lora.config import ModelConfig
from e2lora.models import load_model, load_processor
from e2lora.records import write_text

Form = Literal["peft", "portable", "merged"]
FORMS: dict[Form, Ability] = {"peft": "peft", "portable": "portable", "merged": "merge"}


Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the adapter; None: not compared."""

    form: Form
    folder: Path
    files: dict[str, int]
    "name → bytes"
    parameters: int
    comparison: Comparison | None
    warnings: tuple[str, ...]


def export_adapter(
    folder: Path,
    form: Form,
    out: Path,
    model: str | None = None,
    verify: bool = True,
    dtype: Dtype | None = None,
) -> Exported:
    """Write one form of the adapter in ``folder`` into the new folder ``out``.

    Args:
        model: local folder or hub name of the base model, in place of the recorded one.
        verify: compare the outputs, which takes memory for the model in float32.
        dtype: of a merged model; None: that of the base.

    Raises:
        ValueError: the family has no such form; ``out`` is there, or inside ``folder``; another
            base; or what was written doesn't compute the same function.
        FileNotFoundError, OSError: no adapter, no base model, or no place for ``out``.
    """
    record, plan, stored = read_folder(folder)
    family = FAMILIES[record.adapter.family]
    if reason := family.lacks.get(FORMS[form]):
        raise ValueError(f"{family.name} can't be exported as {form!r}: {reason}.")
    if dtype and form != "merged":
        raise ValueError(
            f"a dtype can be chosen for merged weights only; got {dtype} for the form {form!r}, "
            "which holds the adapter's numbers as they are. Leave it out."
        )
    _require_place(out, folder)
    base = _named(record.base, model)
    assert base.model is not None
    _require_floats_to_merge(base.model, form)
    written = dtype or base.dtype
    if model is not None:
        _require_architecture(base)
    load, processor = _loader(base)
    bare = load()
    batch = random_batch(bare) if verify else None
    warnings = [] if batch or not verify else [f"not compared: no inputs for {base.architecture}"]
    _set_head(bare, record.head, stored)
    untouched = output_of(bare, batch)
    adapted = load_adapter(bare, folder).eval()
    del bare
    expected = output_of(adapted, batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as passing:
        place = Path(passing) / "export"
        if form == "peft":
            config = adapted.peft_config[DEFAULT_NAME]
            config.base_model_name_or_path = base.model.name
            config.revision = base.model.revision
            state = adapted.state_dict()
            read = {k: t for k, t in state.items() if not k.endswith(family.unread_by_peft)}
            adapted.save_pretrained(place, save_embedding_layers=False, state_dict=read)
        elif form == "portable":
            dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
            narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
            warnings += write_portable(place, adapted, record, plan, base, narrowest)
        else:
            _merged(adapted, dtype).save_pretrained(place)
            if processor is not None:
                processor.save_pretrained(place)
        write_text(place / CARD, export_card(record, base, plan, form, written))
        del adapted
        comparison = None
        if batch is not None:
            output = output_of(_reloaded(form, place, load, base, written), batch)
            comparison = Comparison(
                Change.between(expected, untouched), Change.between(output, expected)
            )
            is_started = family.touches_base(record.adapter) and any(
                name.startswith(INITIAL) for name in stored
            )
            started = base.dtype if is_started else "float32"
            rounded = written if form == "merged" else started
            warnings += judge(comparison, float(expected.abs().max()), rounded, started)
        _let_others_read(place)
        if out.exists():
            out.rmdir()
        os.replace(place, out)
    return Exported(
        form,
        out,
        {file.name: file.stat().st_size for file in sorted(out.iterdir())},
        _count(out),
        comparison,
        tuple(warnings),
    )


def _require_place(out: Path, folder: Path) -> None:
    """Before anything is loaded: a new folder that can be made, outside of the adapter's."""
    out, folder = out.absolute(), folder.absolute()
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"an export is written to a new folder; {out} is there. Name another.")
    if folder in (out, *out.parents):
        raise ValueError(
            f"an export is written beside the adapter, not into it; {out} is inside of {folder}. "
            "Name another --out."
        )
    above = next(parent for parent in out.parents if os.path.exists(parent))
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".export-"):
            pass
    except OSError as error:
        raise OSError(
            f"an export must lie where a folder can be made; for {out} one would be made in "
            f"{above}, which doesn't allow it: {error.strerror}. Name another --out."
        ) from error


def _let_others_read(folder: Path) -> None:
    """As the umask has it: safetensors makes files that only their owner reads."""
    os.umask(umask := os.umask(0))
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


# ---- merged -----------------------------------------------------------------------------------


def _merged(adapted: Any, dtype: Dtype | None) -> Any:
    """The model with merged weights, rounded once: PEFT adds in the wider type of the two."""
    if dtype is not None:
        adapted.float()
    model = adapted.merge_and_unload()
    return model if dtype is None else model.to(getattr(torch, dtype))


# ---- the base model, and what is computed -----------------------------------------------------


def _named(base: BaseRecord, model: str | None) -> BaseRecord:
    """The record with the model to take, the given one or its own: where it lies, for a name that
    means the same in every folder and to other programs.
    """
    config = base.model
    if model is not None:
        kept = {"config_overrides", "quantization"}
        config = ModelConfig(name=model, **(config.model_dump(include=kept) if config else {}))
    if config is None:
        raise ValueError(
            f"the adapter's record doesn't name its base model, a {base.architecture}. Name it "
            "with --model."
        )
    located = config.model_copy(update={"name": resolve(config.name)})
    return base.model_copy(update={"model": located})


def _require_floats_to_merge(model: ModelConfig, form: Form) -> None:
    if model.quantization and form == "merged":
        raise ValueError(
            "merged weights would be rounded to the base's four bits again; got form='merged' for "
            f"a base with quantization={model.quantization!r}. Export it as 'peft' or 'portable'."
        )


def _require_architecture(base: BaseRecord) -> None:
    """Of a model that was named by hand, by its configuration alone.

    Raises:
        ValueError: it is of another architecture.
    """
    from transformers import AutoConfig

    assert base.model is not None
    try:
        place = fetch_configuration(base.model.name, base.model.revision)
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError):
        return  # loading it says what is wrong
    wanted = _class_of(base).config_class.model_type
    if wanted not in (config.model_type, config.get_text_config().model_type):
        named = ", ".join(config.architectures or ()) or "no class"
        raise ValueError(
            f"the base must be of the architecture that the adapter was trained on, "
            f"{base.architecture} ({wanted}); {base.model.name} is another, {named} "
            f"({config.model_type}). Name the adapter's base model by --model."
        )


def _class_of(base: BaseRecord) -> Any:
    import transformers

    found = getattr(transformers, base.architecture, None)
    if found is None:
        raise ValueError(
            f"the base model's class must be one of transformers'; {base.architecture!r} is none. "
            "Load base and adapter in Python (e2lora.load), and use PEFT's own methods."
        )
    return found


def _loader(base: BaseRecord) -> tuple[Callable[[], Any], Any]:
    """A function that loads the base anew, and its tokenizer or image processor if it has one."""
    assert base.model is not None
    config, auto_class = base.model, _class_of(base)
    dtype = getattr(torch, base.dtype)

    def load() -> Any:
        model, _ = load_model(config, auto_class, base.num_labels, dtype)
        pad = getattr(processor, "pad_token_id", None)
        if getattr(model.config, "pad_token_id", None) is None and pad is not None:
            model.config.pad_token_id = pad
        return model.eval()

    try:
        images = auto_class.main_input_name == "pixel_values"
        processor = load_processor(config, "image" if images else "text")
    except (OSError, ValueError, KeyError):
        processor = None
    return load, processor


def _set_head(model: Any, head: tuple[str, ...], stored: Mapping[str, Tensor]) -> None:
    """Give a base the trained head, as far as it is there: loading the adapter says what isn't."""
    parameters = dict(model.named_parameters())
    for module in head:
        for prefix in (f"{module}.modules_to_save.", f"model.{module}."):
            for name, tensor in stored.items():
                own = parameters.get(f"{module}.{name.removeprefix(prefix)}")
                if name.startswith(prefix) and own is not None and own.shape == tensor.shape:
                    own.data.copy_(tensor)


def _reloaded(
    form: Form, place: Path, load: Callable[[], Any], base: BaseRecord, dtype: str
) -> Any:
    if form == "merged":
        return _class_of(base).from_pretrained(place, dtype=getattr(torch, dtype)).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(load(), place).eval()


def _count(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
    return total
