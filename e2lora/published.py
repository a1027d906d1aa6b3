"""Scores that were published of E² sharing and of what it is compared with, as data.

Of the publication only what its tables say is known here: model, task, system, parameters, score,
and targets and base rank where a count follows from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from e2lora.config import TASK_PRESETS, TaskConfig
from e2lora.scored import REFERENCE

SOURCE = "E²LoRA, ICLR 2026, openreview.net/forum?id=IQttyo0460"


@dataclass(frozen=True)
class Row:
    """One published score, in per cent; ``parameters`` as printed, None where that is not told.

    Attributes:
        system: as this project names it.
        remark: what is known to be wrong with it.
    """

    system: str
    printed: str
    parameters: float | None
    value: float
    remark: str = ""


class Source(NamedTuple):
    """Where a task's rows lie: hub name and subset; and the metric that is published."""

    data: str
    subset: str | None
    metric: str


def _presets(*names: str) -> dict[str, Source]:
    """
    >>> _presets("gsm8k")
    {'gsm8k': Source(data='openai/gsm8k', subset='main', metric='exact_match')}
    """
    found = {name: TASK_PRESETS[name] for name in names}
    return {name: Source(p.task.data, p.task.subset, p.metric) for name, p in found.items()}


@dataclass(frozen=True)
class Benchmark:
    """A model on a task, or on several whose scores are averaged.

    Attributes:
        models: the last parts of names that it goes by.
        sources: task → where its rows lie, and the metric that is published of it.
        targets: that the published counts follow from; empty where every linear layer is one.
    """

    title: str
    models: tuple[str, ...]
    sources: Mapping[str, Source]
    targets: tuple[str, ...]
    rows: tuple[Row, ...]


_NOT_TO_AIM_AT = (
    "not to be aimed at: 0.08M contradicts the definition of the system, which needs 0.09–0.10M"
)
BASE_RANK = 8  # that the published counts follow from, where a row says no other


BENCHMARKS = (
    Benchmark(
        "RoBERTa-base on GLUE, average of five tasks",
        ("roberta-base",),
        _presets("glue/cola", "glue/sst2", "glue/mrpc", "glue/rte", "glue/stsb"),
        ("query", "value"),
        (
            Row("FFT", "FFT", None, 86.14),
            Row("LoRA", "LoRA", 0.30e6, 85.87),
            Row("ShareLoRA-A", "ShareLoRA", 0.16e6, 84.99),
            Row(REFERENCE, "E²LoRA", 0.16e6, 85.57),
            Row("E²ShareLoRA", "E²ShareLoRA", 0.08e6, 85.40, _NOT_TO_AIM_AT),
        ),
    ),
    Benchmark(
        "Llama-3.1-8B on GSM8K",
        ("llama-3.1-8b", "meta-llama-3.1-8b"),
        _presets("gsm8k"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        (
            Row("LoRA", "LoRA", 6.82e6, 70.21),
            Row("LoRA", "LoRA, r = 4", 3.41e6, 67.58),
            Row("ShareLoRA-A", "ShareLoRA", 2.75e6, 70.51),
            Row(REFERENCE, "E²LoRA", 3.61e6, 70.51),
            Row(REFERENCE, "E²LoRA, r = 16", 7.22e6, 71.19),
            Row("E²ShareLoRA", "E²ShareLoRA", 1.59e6, 70.26),
            Row("LSS only", "LSS only", 3.51e6, 69.45),
            Row("HRA only", "HRA only", 6.82e6, 71.19),
            Row(f"{REFERENCE} (cosine)", "E²LoRA, cosine", None, 66.67),
            Row(f"{REFERENCE} (kl)", "E²LoRA, KL", None, 67.57),
        ),
    ),
    Benchmark(
        "Llama-3.1-8B on HumanEval, pass@1",
        ("llama-3.1-8b", "meta-llama-3.1-8b"),
        {"humaneval": Source("openai/openai_humaneval", None, "pass_at_1")},
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        (
            Row("LoRA", "LoRA", None, 42.68),
            Row("ShareLoRA-A", "ShareLoRA", None, 43.69),
            Row(REFERENCE, "E²LoRA", None, 44.31),
            Row("E²ShareLoRA", "E²ShareLoRA", None, 44.71),
        ),
    ),
    Benchmark(
        "CLIP ViT-B/16, average of seven image sets",
        ("clip-vit-base-patch16", "vit-b-16", "clip-vit-b-16"),
        _presets("stanford_cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn"),
        (),
        (
            Row("LoRA", "LoRA", 1.33e6, 89.08),
            Row("ShareLoRA-A", "ShareLoRA", 0.72e6, 88.75),
            Row(REFERENCE, "E²LoRA", None, 89.81),
            Row("E²ShareLoRA", "E²ShareLoRA", None, 89.73),
        ),
    ),
)


def is_model(name: str, known: Sequence[str]) -> bool:
    """By the last part of its name: of a hub, or of a folder.

    >>> [is_model(name, ["roberta-base"]) for name in ("FacebookAI/roberta-base", "roberta-large")]
    [True, False]
    """
    return name.rstrip("/").rpartition("/")[2].casefold() in known


def is_task(config: TaskConfig, name: str, source: Source) -> bool:
    """Whether a task's scored rows are those of a source: of the hub, or a folder named like it."""
    of_test = config.test_data is not None
    data, subset = (
        (config.test_data, config.test_subset) if of_test else (config.data, config.subset)
    )
    assert data is not None
    folder = data.rstrip("/").rpartition("/")[2]
    if (data, subset) == (source.data, source.subset):
        return True
    local = {_plain(folder), _plain(f"{folder}_{subset}")}
    return subset in (None, source.subset) and _plain(name) in local


def _plain(name: str) -> str:
    """
    >>> _plain("glue/CoLA") == _plain("glue_cola")
    True
    """
    return re.sub(r"[^a-z0-9]+", "_", name.casefold())
