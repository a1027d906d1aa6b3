"""Pretrained models: loading with clear errors, and structure without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from e2lora.assets import resolve
from e2lora.config import ModelConfig


@dataclass(frozen=True)
class Base:
    """A frozen pretrained model with its tokenizer, as trials share it.

    ``head`` names the modules whose weights the checkpoint did not hold: they are initialised
    anew for every trial, by its seed, and trained in full beside the adapter.
    """

    model: Any
    tokenizer: Any
    head: tuple[str, ...]
    fingerprint: str


def load_base(
    config: ModelConfig, auto_class: Any, num_labels: int | None, dtype: torch.dtype
) -> Base:
    """Load weights and tokenizer, freeze everything, find the freshly initialised head.

    Args:
        num_labels: of the label head; None for a model without one.

    Raises:
        FileNotFoundError, OSError, ValueError: no such model, no weights, or unusable overrides.
    """
    model, head = load_model(config, auto_class, num_labels, dtype)
    tokenizer = load_tokenizer(config, model.config)
    if getattr(model.config, "pad_token_id", None) is None:  # GPT-2 has none, and asks for one
        model.config.pad_token_id = tokenizer.pad_token_id
    return Base(model, tokenizer, head, weights_fingerprint(model, skip=head))


def load_model(
    config: ModelConfig, auto_class: Any, num_labels: int | None, dtype: torch.dtype
) -> tuple[Any, tuple[str, ...]]:
    """The frozen model of :func:`load_base` alone, and its freshly initialised head."""
    location = require_weights(config)
    model_config = _model_config(config, num_labels)
    try:
        model, info = auto_class.from_pretrained(
            location,
            config=model_config,
            revision=config.revision,
            dtype=dtype,
            output_loading_info=True,
        )
    except (ValueError, OSError) as error:
        _require_architecture(error, config, auto_class)
        raise
    except Exception as error:  # each file format raises its own kind
        raise OSError(
            f"a model's weights must be readable; those of {config.name!r} are not: "
            f"{type(error).__name__}: {error}. Take another copy of its files."
        ) from error
    model.requires_grad_(False)
    return model, _head_modules(model, info["missing_keys"])


def load_structure(config: ModelConfig, auto_class: Any, num_labels: int | None) -> nn.Module:
    """The model on the meta device: shapes and names, no weights, whatever its size."""
    require_weights(config)
    model_config = _model_config(config, num_labels)
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


def load_tokenizer(config: ModelConfig, model_config: Any = None) -> Any:
    """The model's tokenizer; one without a token for padding pads with its end of text.

    Args:
        model_config: of the loaded model; None: read from its folder or the hub.

    Raises:
        ValueError: a tokenizer of far fewer tokens than the model has, as transformers makes of a
            folder without a tokenizer's files: every word would be unknown.
    """
    from transformers import AutoTokenizer

    location = resolve(config.name)
    tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision)
    known = (model_config or _model_config(config, None)).get_text_config()
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


def _model_config(config: ModelConfig, num_labels: int | None) -> Any:
    from transformers import AutoConfig

    labels = {} if num_labels is None else {"num_labels": num_labels}
    try:
        loaded = AutoConfig.from_pretrained(
            resolve(config.name), revision=config.revision, **labels
        )
    except OSError as error:
        raise OSError(
            f"the model must be a local folder, demo:NAME or a hub name that can be reached; got "
            f"{config.name!r}: {str(error).splitlines()[0]} Check the name, your access to the "
            "hub (HF_TOKEN), or name a local folder."
        ) from error
    for key, value in config.config_overrides.items():
        if not hasattr(loaded, key):
            raise ValueError(
                f"`config_overrides` may only set what {type(loaded).__name__} has; it has no "
                f"{key!r}. Correct the name or remove it."
            )
        setattr(loaded, key, value)
    return loaded


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
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                module.weight.data.copy_(torch.empty(module.weight.shape).normal_(std=std))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold narrower parameters in float32 for a while; then they are bit for bit as before."""
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.half)]
    for parameter, _ in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)


def own_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and what else a checkpoint holds: quantised weights lie in buffers.

    Of a model with adapters these are the weights below them, by their names in the bare model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrapped, kept = wrapped_modules(inner), inner.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in inner.named_buffers() if name in kept)
    for name, tensor in chain(inner.named_parameters(), buffers):
        bare = []
        for depth, part in enumerate(parts := name.split(".")):
            below = wrapped.get(".".join(parts[:depth]))
            if below is None:
                bare.append(part)
            elif part != below:
                break
        else:
            yield ".".join(bare), tensor


def dtype_of(model: Any) -> str:
    """Of the base weights, e.g. ``bfloat16``."""
    floating = (t.dtype for _, t in own_weights(model) if t.is_floating_point())
    return str(next(floating)).removeprefix("torch.")


def wrapped_modules(model: nn.Module) -> dict[str, str]:
    """Path of each module that PEFT put around one of the model → the name of that one in it."""
    return {
        path: below
        for path, module in model.named_modules()
        for below in ("base_layer", "original_module")
        if below in dict(module.named_children())
    }


FINGERPRINT_CHUNK = 2**20
FINGERPRINT_FACTOR = 0x1E3779B97F4A7C15  # odd, so that no bit of a product is lost


def weights_fingerprint(model: nn.Module, skip: Sequence[str] = ()) -> str:
    """Sixteen hex digits of all weights' names, shapes and bits, those of ``skip`` left out.

    The bits enter by chunks, as a sum of words with a factor of its own for each place, on the
    device where they lie: any changed, swapped or moved weight shows.
    """
    digest = hashlib.sha256()
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    factors: dict[torch.device, torch.Tensor] = {}
    for name, tensor in own_weights(model):
        if any(name == module or name.startswith(f"{module}.") for module in skip):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device not in factors:
            places = torch.arange(FINGERPRINT_CHUNK, device=tensor.device)
            factors[tensor.device] = (2 * places + 1) * FINGERPRINT_FACTOR
        bits = tensor.detach().contiguous().view(words[tensor.element_size()]).flatten()
        for chunk in bits.split(FINGERPRINT_CHUNK):
            total = int((chunk.long() * factors[tensor.device][: len(chunk)]).sum())
            digest.update(f"{total}\n".encode())
    return digest.hexdigest()[:16]
