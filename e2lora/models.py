"""Pretrained models: loading with clear errors, and structure without weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from e2lora.assets import fetch_configuration, fetch_weights, resolve
from e2lora.attention import attention_for_float32, choose_attention, class_to_build
from e2lora.config import ModelConfig
from e2lora.partitioned import (
    Partitioning,
    gathered,
    partition,
    partitioning_weights,
    recast,
)
from e2lora.quantized import nf4, require_bitsandbytes, settle
from e2lora.weights import weights_fingerprint

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Base:
    """A frozen pretrained model with its tokenizer or image processor, as trials share it.

    ``head`` names the modules whose weights the checkpoint did not hold: they are initialised
    anew for every trial, by its seed, and trained in full beside the adapter.
    """

    model: Any
    processor: Any
    head: tuple[str, ...]
    fingerprint: str


def load_base(
    config: ModelConfig,
    auto_class: Any,
    num_labels: int | None,
    dtype: torch.dtype,
    device: torch.device = CPU,
    partitioning: Partitioning | None = None,
    processor: Literal["text", "image"] = "text",
) -> Base:
    """Load weights and processor, freeze everything, find the freshly initialised head.

    Args:
        num_labels: of the label head; None for a model without one.
        device: where it will compute: attention is chosen for it, and quantised weights are made
            there; others are left in main memory.
        partitioning: spread the weights over all workers as they are read. Collective.
        processor: what makes features of rows: the tokenizer, or the image processor.

    Raises:
        FileNotFoundError, OSError, ValueError: no such model, no weights, unusable overrides, or
            an attention or quantisation that isn't to be had.
    """
    model, head = load_model(config, auto_class, num_labels, dtype, device, partitioning)
    loaded = load_processor(config, processor, model.config)
    if processor == "text" and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = loaded.pad_token_id  # GPT-2 has none, and asks for one
    return Base(model, loaded, head, weights_fingerprint(model, skip=head))


def load_model(
    config: ModelConfig,
    auto_class: Any,
    num_labels: int | None,
    dtype: torch.dtype,
    device: torch.device = CPU,
    partitioning: Partitioning | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The frozen model of :func:`load_base` alone, and its freshly initialised head."""
    require_weights(config)
    location = fetch_weights(config.name, config.revision)
    model_config = _model_config(config, auto_class, num_labels)
    options = _how_to_compute(config, auto_class, model_config, dtype, device)
    try:
        # bitsandbytes makes its weights of whole ones
        with partitioning_weights(None if config.quantization else partitioning):
            model, info = auto_class.from_pretrained(
                location,
                config=model_config,
                revision=config.revision,
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
    except (ValueError, OSError) as error:
        _require_architecture(error, config, auto_class)
        raise
    except Exception as error:  # each file format raises its own kind
        raise OSError(
            f"a model's weights must be readable; those of {config.name!r} are not: "
            f"{type(error).__name__}: {error}. Take another copy of its files."
        ) from error
    head = _head_modules(model, info["missing_keys"])
    if location != resolve(config.name):  # a hub's: known by its name and commit, not its place
        model.name_or_path = model.config.name_or_path = config.name
        model.config._commit_hash = Path(location).name
    if config.quantization:
        settle(model, head, dtype, device)
        if partitioning:
            partition(model, partitioning)
    model.requires_grad_(False)
    return model, head


def _how_to_compute(
    config: ModelConfig,
    auto_class: Any,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` that decide how, and not what, is computed."""
    options: dict[str, Any] = {}
    model_class = class_to_build(auto_class, model_config)
    if model_class is not None:  # otherwise loading says that there is none
        options["attn_implementation"] = choose_attention(
            config.attn_implementation, model_class, device, dtype
        )
    if config.quantization:
        require_bitsandbytes()
        options |= {"quantization_config": nf4(dtype), "device_map": {"": device}}
    return options


def load_structure(config: ModelConfig, auto_class: Any, num_labels: int | None) -> nn.Module:
    """The model on the meta device: shapes and names, no weights, whatever its size."""
    require_weights(config)
    model_config = _model_config(config, auto_class, num_labels)
    try:
        with torch.device("meta"):
            return auto_class.from_config(model_config)
    except ValueError as error:
        _require_architecture(error, config, auto_class)
        raise


def _require_architecture(error: Exception, config: ModelConfig, auto_class: Any) -> None:
    """Say shortly what transformers says with a list of all the classes it knows."""
    if "Unrecognized configuration class" in str(error):
        raise ValueError(
            f"a task needs a model of its kind; {config.name!r} is none that {auto_class.__name__} "
            "can build. Name another model, or another kind of task."
        ) from error


def load_processor(
    config: ModelConfig, kind: Literal["text", "image"], model_config: Any = None
) -> Any:
    """The model's tokenizer or image processor.

    Args:
        model_config: of the loaded model; None: read from its folder or the hub.

    Raises:
        ValueError, OSError: it has none that can be used.
    """
    if kind == "text":
        return load_tokenizer(config, model_config)
    from transformers import AutoImageProcessor

    location = fetch_configuration(config.name, config.revision)
    try:
        # by Pillow: torchvision, where it happens to be installed, would give other pixels
        return AutoImageProcessor.from_pretrained(location, revision=config.revision, backend="pil")
    except (OSError, ValueError) as error:
        raise OSError(
            f"a model for images must say how it takes them; {config.name!r} has no image "
            f"processor that can be used: {str(error).splitlines()[0]} Put its "
            "preprocessor_config.json beside the weights."
        ) from error


def load_tokenizer(config: ModelConfig, model_config: Any = None) -> Any:
    """The model's tokenizer; one without a token for padding pads with its end of text.

    Args:
        model_config: of the loaded model; None: read from its folder or the hub.

    Raises:
        ValueError: a tokenizer of far fewer tokens than the model has, as transformers makes of a
            folder without a tokenizer's files: every word would be unknown.
    """
    from transformers import AutoTokenizer

    location = fetch_configuration(config.name, config.revision)
    tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision)
    known = (model_config or _model_config(config)).get_text_config()
    vocabulary = getattr(known, "vocab_size", None) or 0
    if 10 * len(tokenizer) < vocabulary:
        raise ValueError(
            f"a model's tokenizer must know its tokens; that of {config.name!r} has "
            f"{len(tokenizer)}, the model {vocabulary}. Put the tokenizer's files (tokenizer.json, "
            "vocab.txt, …) beside the weights."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_weights(config: ModelConfig) -> str:
    """Where the model lies, after checking that a local folder holds what it must.

    Raises:
        FileNotFoundError: a folder without a configuration or without weights.
    """
    location = resolve(config.name)
    folder = Path(location)
    if not folder.is_dir():
        return location
    weights = ("*.safetensors", "pytorch_model*.bin")
    lacking = [] if (folder / "config.json").exists() else ["config.json"]
    if not any(next(folder.glob(pattern), None) for pattern in weights):
        lacking.append("weights (*.safetensors or pytorch_model*.bin)")
    if lacking:
        raise FileNotFoundError(
            f"a model folder must hold config.json and weights; {folder} lacks "
            f"{' and '.join(lacking)}. Name a folder written by `save_pretrained`, or a hub name."
        )
    return location


def _model_config(
    config: ModelConfig, auto_class: Any = None, num_labels: int | None = None
) -> Any:
    from transformers import AutoConfig

    location = fetch_configuration(config.name, config.revision)
    try:
        loaded = AutoConfig.from_pretrained(location, revision=config.revision)
    except OSError as error:
        raise OSError(
            f"the model must be a local folder, demo:NAME or a hub name that can be reached; got "
            f"{config.name!r}: {str(error).splitlines()[0]} Check the name, your access to the "
            "hub (HF_TOKEN), or name a local folder."
        ) from error
    if num_labels is not None:
        _require_same_labels(config, loaded, auto_class, num_labels)
        loaded.num_labels = num_labels
    for key, value in config.config_overrides.items():
        if not hasattr(loaded, key):
            raise ValueError(
                f"`config_overrides` may only set what {type(loaded).__name__} has; it has no "
                f"{key!r}. Correct the name or remove it."
            )
        setattr(loaded, key, value)
    return loaded


def _require_same_labels(
    config: ModelConfig, loaded: Any, auto_class: Any, num_labels: int
) -> None:
    """A checkpoint with a label head must have the task's number of labels."""
    model_class = class_to_build(auto_class, loaded)
    has_head = model_class is not None and model_class.__name__ in (loaded.architectures or ())
    if has_head and loaded.num_labels != num_labels:
        raise ValueError(
            f"a model that has learnt labels must have as many as its task; {config.name!r} is a "
            f"{model_class.__name__} of {loaded.num_labels} label(s), and the task has "
            f"{num_labels}. Name the model that it was made from, or leave its head out: "
            f"AutoModel.from_pretrained({config.name!r}).save_pretrained(FOLDER), and name FOLDER."
        )


def _head_modules(model: Any, missing_keys: Sequence[str]) -> tuple[str, ...]:
    """Modules that hold missing weights: a whole head, or single modules inside the trunk."""
    modules = set()
    for key in missing_keys:
        first, *_ = key.split(".")
        in_trunk = first == model.base_model_prefix
        modules.add(key.rpartition(".")[0] if in_trunk else first)
    return tuple(sorted(modules))


def reset_head(model: Any, head: Sequence[str], seed: int) -> None:
    """Initialise the head anew as transformers does a linear layer: N(0, initializer_range²).

    The numbers are drawn on the CPU in float32: they are the same on every device.
    """
    text_config = model.config.get_text_config()
    std = getattr(text_config, "initializer_range", None) or 0.02
    torch.manual_seed(seed)
    for name in head:
        part = model.get_submodule(name)
        with gathered(part.parameters(), write=True):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data.copy_(torch.empty(module.weight.shape).normal_(std=std))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif hasattr(module, "reset_parameters"):
                    module.reset_parameters()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold narrower parameters in float32 for a while; then they are bit for bit as before.

    Quantised weights stay as they are, and compute as they do.
    """
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.half)]
    for parameter, _ in narrow:
        recast(parameter, torch.float32)
    try:
        with attention_for_float32(model):
            yield
    finally:
        for parameter, dtype in narrow:
            recast(parameter, dtype)
