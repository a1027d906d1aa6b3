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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from e2lora.adapters import FAMILIES
from e2lora.adapters.family import DEFAULT_NAME, Ability, Factors, layers_of
from e2lora.adapters.record import AdapterRecord, BaseRecord, export_card
from e2lora.adapters.storage import CARD, INITIAL, load_adapter, read_folder
from e2lora.adapters.tensors import write_tensors
from e2lora.assets import resolve
from e2lora.config import ModelConfig
from e2lora.models import in_float32, load_model, load_tokenizer, wrapped_modules
from e2lora.plan import SharingPlan
from e2lora.records import write_text

Form = Literal["peft", "portable", "merged"]
FORMS: dict[Form, Ability] = {"peft": "peft", "portable": "portable", "merged": "merge"}

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes; 16 is its default
ADAPTER_FILE = "adapter_model.safetensors"

Dtype = Literal["float32", "bfloat16"]
MUCH, NEARLY_ALL = 0.05, 0.9
"""Shares of what the adapter does: from which on it is told that they are lost, or refused."""


@dataclass(frozen=True)
class Change:
    """Between the outputs of two models on one batch."""

    largest: float
    root_mean_square: float

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> Change:
        change = found - expected
        return cls(float(change.abs().max()), float(change.square().mean().sqrt()))


@dataclass(frozen=True)
class Comparison:
    """``effect``: of the adapter on its base, whose head is the trained one; ``difference``:
    between what was written and the adapter.
    """

    effect: Change
    difference: Change

    @property
    def lost(self) -> float:
        """The share of the adapter's effect that isn't in what was written."""
        if not self.difference.root_mean_square:
            return 0.0
        return self.difference.root_mean_square / (self.effect.root_mean_square or float("nan"))


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
    written = dtype or base.dtype
    if model is not None:
        _require_architecture(base)
    load, tokenizer = _loader(base)
    bare = load()
    batch = random_batch(bare) if verify else None
    warnings = [] if batch or not verify else [f"not compared: no inputs for {base.architecture}"]
    _set_head(bare, record.head, stored)
    untouched = _output(bare, batch)
    adapted = load_adapter(bare, folder).eval()
    del bare
    expected = _output(adapted, batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as passing:
        place = Path(passing) / "export"
        if form == "peft":
            config = adapted.peft_config[DEFAULT_NAME]
            config.base_model_name_or_path = base.model.name
            config.revision = base.model.revision
            adapted.save_pretrained(place, save_embedding_layers=False)
        elif form == "portable":
            dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
            narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
            warnings += _write_portable(place, adapted, record, plan, base, narrowest)
        else:
            _merged(adapted, dtype).save_pretrained(place)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
        write_text(place / CARD, export_card(record, base, plan, form, written))
        del adapted
        comparison = None
        if batch is not None:
            output = _output(_reloaded(form, place, load, base, written), batch)
            comparison = Comparison(
                Change.between(expected, untouched), Change.between(output, expected)
            )
            is_started = any(name.startswith(INITIAL) for name in stored)
            started = base.dtype if is_started else "float32"
            rounded = written if form == "merged" else started
            warnings += _judge(comparison, float(expected.abs().max()), rounded, started)
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


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """:func:`e2lora.models.in_float32`, and buffers too: frozen projections are some."""
    narrow = [(b, b.dtype) for b in model.buffers() if b.dtype in (torch.bfloat16, torch.half)]
    with in_float32(model):
        for buffer, _ in narrow:
            buffer.data = buffer.data.float()
        try:
            yield
        finally:
            for buffer, dtype in narrow:
                buffer.data = buffer.data.to(dtype)


# ---- portable ---------------------------------------------------------------------------------


def _write_portable(
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


# ---- the base model, and what is computed -----------------------------------------------------


def _named(base: BaseRecord, model: str | None) -> BaseRecord:
    """The record with the model to take, the given one or its own: where it lies, for a name that
    means the same in every folder and to other programs.
    """
    config = base.model
    if model is not None:
        overrides = config.config_overrides if config else {}
        config = ModelConfig(name=model, config_overrides=overrides)
    if config is None:
        raise ValueError(
            f"the adapter's record doesn't name its base model, a {base.architecture}. Name it "
            "with --model."
        )
    located = config.model_copy(update={"name": resolve(config.name)})
    return base.model_copy(update={"model": located})


def _require_architecture(base: BaseRecord) -> None:
    """Of a model that was named by hand, by its configuration alone.

    Raises:
        ValueError: it is of another architecture.
    """
    from transformers import AutoConfig

    assert base.model is not None
    try:
        config = AutoConfig.from_pretrained(base.model.name)
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
        size = vision.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        inputs["pixel_values"] = torch.randn(4, vision.num_channels, *sides, generator=generator)
    return inputs or None


def _set_head(model: Any, head: tuple[str, ...], stored: Mapping[str, Tensor]) -> None:
    """Give a base the trained head, as far as it is there: loading the adapter says what isn't."""
    parameters = dict(model.named_parameters())
    for module in head:
        for prefix in (f"{module}.modules_to_save.", f"model.{module}."):
            for name, tensor in stored.items():
                own = parameters.get(f"{module}.{name.removeprefix(prefix)}")
                if name.startswith(prefix) and own is not None and own.shape == tensor.shape:
                    own.data.copy_(tensor)


def _output(model: Any, batch: dict[str, Tensor] | None) -> Tensor:
    if batch is None:
        return torch.empty(0)
    with torch.no_grad(), _in_float32(model):
        return model(**batch)[0].double()


def _reloaded(
    form: Form, place: Path, load: Callable[[], Any], base: BaseRecord, dtype: str
) -> Any:
    if form == "merged":
        return _class_of(base).from_pretrained(place, dtype=getattr(torch, dtype)).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(load(), place).eval()


def _judge(comparison: Comparison, size: float, rounded: str, started: str) -> list[str]:
    """Returns warnings.

    Args:
        size: of the largest output.
        rounded: the type that weights of the export were rounded to.
        started: the type that weights were rounded to when the adapter took its start from them.

    Raises:
        ValueError: more differs than rounding explains, or as much as the adapter does.
    """
    difference, lost = comparison.difference, comparison.lost
    explained = _eps(rounded) ** 0.5 * size
    has_effect = comparison.effect.largest > _eps(started) ** (2 / 3) * size
    if not (has_effect and rounded != "float32") and not difference.largest <= explained:
        raise ValueError(
            "an export must compute what the adapter does; on a random batch its outputs differ "
            f"by up to {difference.largest:.2g}, where rounding of {rounded} explains "
            f"{explained:.2g}. Nothing was written. Please report it, with the adapter's "
            "e2lora.json."
        )
    if not has_effect:
        return []
    told = f"rounding to {rounded} loses {lost:.0%} of what the adapter does"
    if rounded != "float32":
        told += ": merge in float32 by --form merged --dtype float32"
    if not lost < NEARLY_ALL:
        raise ValueError(
            "an export must be nearer to the adapter than the base model is; on a random batch "
            f"{told}. Nothing was written."
        )
    return [told] if lost > MUCH else []


def _eps(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def _count(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            total += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
    return total
