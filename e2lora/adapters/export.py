"""An adapter folder in the forms that other programs read.

* ``peft``: what PEFT alone loads, every layer with its own tensors (``rank_pattern`` and all).
* ``portable``: plain LoRA of one rank and scale 1, for readers that know no more than ``r`` and
  ``lora_alpha`` (vLLM, llama.cpp's converter). Smaller ranks are filled up with zeros, and the
  scale lies in B: the same function.
* ``merged``: a model that transformers alone loads.

Each is loaded again by its reader, and its outputs are compared with the adapter's.
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
from torch.nn import functional as F

from e2lora.adapters import FAMILIES
from e2lora.adapters.family import DEFAULT_NAME, Ability, Factors, layers_of
from e2lora.adapters.record import AdapterRecord, BaseRecord, export_card
from e2lora.adapters.storage import CARD, load_adapter, read_folder
from e2lora.config import ModelConfig
from e2lora.models import load_model, load_tokenizer, wrapped_modules
from e2lora.plan import SharingPlan
from e2lora.records import write_text

Form = Literal["peft", "portable", "merged"]
FORMS: dict[Form, Ability] = {"peft": "peft", "portable": "portable", "merged": "merge"}

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes; 16 is its default
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the adapter.

    ``difference`` is the largest of any output on a random batch; None: not compared.
    """

    form: Form
    folder: Path
    files: dict[str, int]
    "name → bytes"
    parameters: int
    difference: float | None
    warnings: tuple[str, ...]


def export_adapter(
    folder: Path, form: Form, out: Path, model: str | None = None, verify: bool = True
) -> Exported:
    """Write one form of the adapter in ``folder`` into the new folder ``out``.

    Args:
        model: local folder or hub name of the base model, in place of the recorded one.

    Raises:
        ValueError: the family has no such form; ``out`` is there; another base; or what was
            written doesn't compute the same function.
        FileNotFoundError, OSError: no adapter, or no base model.
    """
    record, plan, stored = read_folder(folder)
    family = FAMILIES[record.adapter.family]
    if reason := family.lacks.get(FORMS[form]):
        raise ValueError(f"{family.name} can't be exported as {form!r}: {reason}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"an export is written to a new folder; {out} is there. Name another.")
    base = _named(record.base, model)
    load, tokenizer = _loader(base)
    adapted = load_adapter(load(), folder).eval()
    batch = random_batch(adapted.get_base_model()) if verify else None
    expected = _output(adapted, batch)
    warnings = [] if batch or not verify else [f"not compared: no inputs for {base.architecture}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as passing:
        place = Path(passing) / "export"
        if form == "peft":
            adapted.peft_config[DEFAULT_NAME].base_model_name_or_path = _name(base)
            adapted.save_pretrained(place, save_embedding_layers=False)
        elif form == "portable":
            dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
            dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
            warnings += _write_portable(place, adapted, record, plan, _name(base), dtype)
        else:
            adapted.merge_and_unload().save_pretrained(place)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
        write_text(place / CARD, export_card(record, plan, form))
        del adapted
        difference = None
        if batch is not None:
            difference = _compare(_output(_reloaded(form, place, load), batch), expected, base)
        if out.exists():
            out.rmdir()
        os.replace(place, out)
    return Exported(
        form,
        out,
        {file.name: file.stat().st_size for file in sorted(out.iterdir())},
        _count(out),
        difference,
        tuple(warnings),
    )


# ---- portable ---------------------------------------------------------------------------------


def _write_portable(
    place: Path,
    adapted: Any,
    record: AdapterRecord,
    plan: SharingPlan,
    name: str | None,
    dtype: torch.dtype,
) -> list[str]:
    """Returns warnings."""
    from peft import LoraConfig
    from safetensors.torch import save_file

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
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=shortest_endings(inner, list(factors)),
        modules_to_save=list(record.head) or None,
        fan_in_fan_out=bool(getattr(own, "fan_in_fan_out", False)),
        task_type=own.task_type,
        base_model_name_or_path=name,
        inference_mode=True,
    )
    place.mkdir(parents=True)
    config.save_pretrained(str(place))
    save_file(written, place / ADAPTER_FILE, metadata={"format": "pt"})
    return portable_warnings(r, record.head)


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


# ---- the base model, and what is computed -----------------------------------------------------


def _named(base: BaseRecord, model: str | None) -> BaseRecord:
    """The record with the model to take, the given one or its own."""
    if model is not None:
        overrides = base.model.config_overrides if base.model else {}
        return base.model_copy(
            update={"model": ModelConfig(name=model, config_overrides=overrides)}
        )
    if base.model is None:
        raise ValueError(
            f"the adapter's record doesn't name its base model, a {base.architecture}. Name it "
            "with --model."
        )
    return base


def _name(base: BaseRecord) -> str | None:
    return base.model.name if base.model else None


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
    """A function that loads the base anew, and its tokenizer if it has one."""
    assert base.model is not None
    config, auto_class = base.model, _class_of(base)
    dtype = getattr(torch, base.dtype)

    def load() -> Any:
        model, _ = load_model(config, auto_class, base.num_labels, dtype)
        if getattr(model.config, "pad_token_id", None) is None and tokenizer is not None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model.eval()

    try:
        tokenizer = load_tokenizer(config)
    except (OSError, ValueError, KeyError):  # of images, say
        tokenizer = None
    return load, tokenizer


def random_batch(model: Any) -> dict[str, Tensor] | None:
    """Inputs of text, images or both, the same every time; None where it takes others."""
    generator = torch.Generator().manual_seed(0)
    config, inputs = model.config, {}
    takes = model.main_input_name
    vision = getattr(config, "vision_config", None) or (config if takes == "pixel_values" else None)
    if takes == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        inputs["input_ids"] = torch.randint(vocabulary, (4, 16), generator=generator)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :8]
    if vision is not None and hasattr(vision, "image_size"):
        size, dtype = vision.image_size, next(model.parameters()).dtype
        sides = (size, size) if isinstance(size, int) else tuple(size)
        images = torch.randn(4, vision.num_channels, *sides, generator=generator)
        inputs["pixel_values"] = images.to(dtype)
    return inputs or None


def _output(model: Any, batch: dict[str, Tensor] | None) -> Tensor:
    if batch is None:
        return torch.empty(0)
    with torch.no_grad():
        return model(**batch)[0].double()


def _reloaded(form: Form, place: Path, load: Callable[[], Any]) -> Any:
    if form == "merged":
        base = load()
        return type(base).from_pretrained(place, dtype=next(base.parameters()).dtype).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(load(), place).eval()


def _compare(found: Tensor, expected: Tensor, base: BaseRecord) -> float:
    """The largest difference.

    Raises:
        ValueError: it is more than rounding explains.
    """
    difference = float((found - expected).abs().max())
    allowed = torch.finfo(getattr(torch, base.dtype)).eps ** 0.5 * float(expected.abs().max())
    if not difference <= allowed:
        raise ValueError(
            "an export must compute what the adapter does; on a random batch its outputs differ "
            f"by up to {difference:.2g}, where rounding of {base.dtype} explains {allowed:.2g}. "
            "Nothing was written. Please report it, with the adapter's e2lora.json."
        )
    return difference


def _count(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
    return total
