"""What one node says of itself when it is asked; runs there, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import e2lora
from e2lora.config import Frozen, TrialConfig, in_one_paragraph
from e2lora.memory import available_bytes

DECIDING = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "ray",
)
"""Distributions whose versions decide a trial's numbers, or whether its workers understand each
other."""

GIB = 2**30


class Gpu(Frozen):
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    memory_gib: float


class NodeFacts(Frozen):
    """What a node is.

    Attributes:
        versions: of Python and of ``DECIDING``, without local parts such as ``+cpu``.
        code: names the text of this project's modules.
        note: the name of an empty file that it left in the storage folder.
        storage_error: why nothing can be written to the storage folder; None: it was written to.
        gpu_error: why torch sees no GPU, where it was asked to look.
    """

    versions: dict[str, str]
    code: str
    note: str
    available_gib: float
    storage_error: str | None
    storage_free_gib: float
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str | None = None


def facts_here(storage: str, look_at_gpus: bool) -> NodeFacts:
    """What this node is; leaves a note in the storage folder, for others to see."""
    note, error, free = uuid.uuid4().hex, None, 0.0
    try:
        (Path(storage) / note).touch()
        free = shutil.disk_usage(storage).free / GIB
    except OSError as failure:
        error = f"{type(failure).__name__}: {failure}"
    gpus, gpu_error = _gpus() if look_at_gpus else ((), None)
    return NodeFacts(
        versions={"Python": f"{sys.version_info[0]}.{sys.version_info[1]}", **_versions()},
        code=code_fingerprint(),
        note=note,
        available_gib=available_bytes() / GIB,
        storage_error=error,
        storage_free_gib=free,
        gpus=gpus,
        gpu_error=gpu_error,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in DECIDING:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def code_fingerprint() -> str:
    """Sixteen hex digits of the names and bytes of this project's modules, as they are here."""
    digest = hashlib.sha256()
    root = Path(e2lora.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # so Ray hides them from what asks for none
        del os.environ["CUDA_VISIBLE_DEVICES"]
    import torch

    if torch.version.cuda is None:
        return (), f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return (), f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable driver"
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(
        Gpu(name=p.name, capability=(p.major, p.minor), memory_gib=p.total_memory / GIB)
        for p in properties
    ), None


def notes_missing(storage: str, notes: Sequence[str], patience: float = 10.0) -> list[str]:
    """Which of the notes that other nodes left can't be seen from here.

    Args:
        patience: seconds that a network file system may take to show them.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            seen = set(os.listdir(storage))  # a look at single files may be answered from a cache
        except OSError:
            seen = set()
        missing = [note for note in notes if note not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def unreadable_here(configs: Sequence[str], stage: bool) -> list[str]:
    """Models and data that can't be used on this node, each with the reason.

    Args:
        configs: trial configurations, as JSON: one of each model and task.
        stage: fetch the weights of models on a hub too, into this node's cache.
    """
    from e2lora.assets import fetch_weights
    from e2lora.models import load_processor, load_structure
    from e2lora.tasks import load_task

    reasons = []
    for config in (TrialConfig.model_validate_json(text) for text in configs):
        try:
            task = load_task(config.task)
            load_structure(config.model, task.auto_class, task.num_labels)
            load_processor(config.model, task.processor)
            if stage:
                fetch_weights(config.model.name, config.model.revision)
        except Exception as error:  # whatever the loaders of models and data raise
            pair = json.dumps([config.model.name, config.task.display_name])
            reasons.append(f"{pair}: {in_one_paragraph(error)}")
    return reasons
