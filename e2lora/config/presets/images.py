"""The image sets that vision transformers and CLIP are adapted to, each by top-1 accuracy.

The test rows are those of the publications; validation rows are carved from the training rows.
"""

from __future__ import annotations

from e2lora.config.presets.preset import Preset
from e2lora.config.tasks import ImageClassificationConfig


def _preset(data: str, subset: str | None = None, validation_size: int = 1000) -> Preset:
    """Of hub data with columns ``image`` and ``label``, and splits ``train`` and ``test``."""
    task = ImageClassificationConfig(
        data=data, subset=subset, validation_size=validation_size, test_split="test"
    )
    return Preset(task=task, metric="accuracy")


PRESETS: dict[str, Preset] = {
    "stanford_cars": _preset("tanganke/stanford_cars", validation_size=800),
    "dtd": _preset("tanganke/dtd", validation_size=376),
    "eurosat": _preset("tanganke/eurosat"),
    "gtsrb": _preset("tanganke/gtsrb"),
    "resisc45": _preset("tanganke/resisc45"),
    "sun397": _preset("tanganke/sun397"),
    "svhn": _preset("ufldl-stanford/svhn", "cropped_digits"),
    "fashion_mnist": _preset("zalando-datasets/fashion_mnist"),
}
