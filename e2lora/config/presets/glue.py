"""GLUE (Wang et al., 2019): nine tasks, each with its official metric.

The labels of GLUE's own test rows aren't published. As the field does, the public validation rows
are the test rows here; what a search looks at is carved from the training rows, a tenth at most.
Where the official metrics are two, both are measured: accuracy and F1, Pearson and Spearman.
"""

from __future__ import annotations

from typing import Any

from e2lora.config.presets.preset import Preset
from e2lora.config.tasks import RegressionConfig, TextClassificationConfig


def _preset(
    subset: str,
    *columns: str,
    metric: str = "accuracy",
    kind: type[TextClassificationConfig | RegressionConfig] = TextClassificationConfig,
    **options: Any,
) -> Preset:
    """Of one or two columns of texts."""
    text, text2 = (*columns, None)[:2]
    defaults = {"data": "nyu-mll/glue", "test_split": "validation", "validation_size": 1000}
    of_hub = {"subset": subset, "text_column": text, "text2_column": text2}
    return Preset(kind.model_validate({**defaults, **of_hub, "metric": metric, **options}), metric)


_SENTENCES = ("sentence1", "sentence2")
_MNLI = ("mnli", "premise", "hypothesis")

PRESETS: dict[str, Preset] = {
    "glue/cola": _preset("cola", "sentence", metric="mcc", validation_size=850),
    "glue/sst2": _preset("sst2", "sentence"),
    "glue/mrpc": _preset("mrpc", *_SENTENCES, validation_size=360),
    "glue/qqp": _preset("qqp", "question1", "question2", max_length=256),
    "glue/stsb": _preset(
        "stsb", *_SENTENCES, metric="pearson", kind=RegressionConfig, validation_size=570
    ),
    "glue/mnli": _preset(*_MNLI, test_split="validation_matched", max_length=256),
    "glue/mnli_mismatched": _preset(*_MNLI, test_split="validation_mismatched", max_length=256),
    "glue/qnli": _preset("qnli", "question", "sentence", max_length=512),
    "glue/rte": _preset("rte", *_SENTENCES, validation_size=240, max_length=320),
    "glue/wnli": _preset("wnli", *_SENTENCES, validation_size=60),
}
