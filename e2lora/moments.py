"""Moments of a gradient, the proxy entropy, and the gradient profile of a model on a task.

Of each target's gradient G = ∂(mean loss)/∂W four numbers are kept: count, mean, population
standard deviation and mean absolute value. They merge exactly, so the joint statistics of two
layers (those of their concatenated gradients) never need the gradients again. On request a profile
also holds inner products and distances of all pairs of layers of a module type, and each number
again for disjoint folds of the calibration rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from e2lora.config import Frozen

HALF_LOG_2PI_E = 0.5 * math.log(2 * math.pi) + 0.5


class Moments(Frozen):
    """Moments of the entries of one gradient; ``std`` is the population's (ddof 0)."""

    count: int = Field(gt=0)
    mean: float
    std: float = Field(ge=0)
    mean_abs: float = Field(ge=0)

    @classmethod
    def from_sums(cls, count: int, total: float, squares: float, absolutes: float) -> Moments:
        """From Σ1, Σg, Σg² and Σ|g|.

        >>> Moments.from_sums(2, 4.0, 10.0, 4.0).std
        1.0
        """
        mean = total / count
        variance = max(squares / count - mean * mean, 0.0)
        return cls(count=count, mean=mean, std=math.sqrt(variance), mean_abs=absolutes / count)

    @property
    def entropy(self) -> float:
        """Proxy entropy H = log σ + ½ log 2π + ½, in nats: a Gaussian's of this width."""
        return math.log(self.std) + HALF_LOG_2PI_E


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of the concatenation: σ² = Σ n(σ_i² + (μ_i − μ)²) / Σ n.

    >>> a = Moments(count=2, mean=0.0, std=1.0, mean_abs=1.0)
    >>> b = Moments(count=2, mean=2.0, std=1.0, mean_abs=2.0)
    >>> merge([a, b]).mean, round(merge([a, b]).std ** 2, 12)
    (1.0, 2.0)
    """
    parts = list(parts)
    count = sum(part.count for part in parts)
    mean = math.fsum(part.count * part.mean for part in parts) / count
    variance = (
        math.fsum(part.count * (part.std**2 + (part.mean - mean) ** 2) for part in parts) / count
    )
    mean_abs = math.fsum(part.count * part.mean_abs for part in parts) / count
    return Moments(count=count, mean=mean, std=math.sqrt(variance), mean_abs=mean_abs)


class Target(Frozen):
    """A linear weight (out x in) that can be adapted: module ``path`` in layer ``layer``.

    ``module_type`` is the path with the layer's number replaced by ``*``: targets of one type
    are the same projection in different layers of one stack.
    """

    path: str
    module_type: str
    layer: int
    in_features: int
    out_features: int


class LayerGradient(Frozen):
    """What the profile keeps of one target's gradient.

    ``parts`` are those of a fused projection: the rows that make q, k and v. They are recorded to
    be looked at; plans treat a fused projection as the one module that it is.
    """

    target: Target
    moments: Moments
    parts: dict[str, Moments] = Field(default={})


class PairStatistics(Frozen):
    """All pairs of layers of one module type: (N, N) matrices over its layers in order.

    ``inner`` are inner products of the flattened gradients, ``l1`` and ``l2`` their distances.
    """

    layers: tuple[int, ...]
    inner: tuple[tuple[float, ...], ...]
    l1: tuple[tuple[float, ...], ...]
    l2: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TypeGradients:
    """What is known of the gradients of some layers of one module type, in order of depth.

    ``rows`` are the layers' places in the matrices of ``pairs``.
    """

    moments: tuple[Moments, ...]
    pairs: PairStatistics | None = None
    rows: tuple[int, ...] = ()

    @property
    def entropies(self) -> list[float]:
        return [moments.entropy for moments in self.moments]


class Provenance(Frozen):
    """What a profile was measured on; enough to measure it again."""

    model: str
    model_fingerprint: str
    task: str
    num_samples: int
    num_supervised: int = Field(description="samples in classification, tokens in language models")
    seed: int = Field(description="of the calibration sample and of a freshly initialised head")
    dtype: str = Field(description="of forward and backward; what is kept is summed in float64")
    mean_loss: float
    method: Literal["blocks", "accumulators"] = Field(
        description="`blocks`: no gradient was held; `accumulators`: a float32 sum per target"
    )
    num_passes: int = Field(
        default=1, description="over the same rows, so that held gradients kept their limit"
    )
    num_workers: int
    versions: dict[str, str]


class Fold(Frozen):
    """The numbers of one disjoint part of the calibration rows, layer by layer as the profile's."""

    num_samples: int
    num_supervised: int
    moments: tuple[Moments, ...]
    pairs: dict[str, PairStatistics] = Field(default={})


class GradientProfile(Frozen):
    """The expensive artefact, measured once per model, task and seed: ``profile.json``."""

    version: Literal[2] = 2
    provenance: Provenance
    layers: tuple[LayerGradient, ...]
    pairs: dict[str, PairStatistics] = Field(default={}, description="by module type")
    folds: tuple[Fold, ...] = ()
    layers_without: dict[str, tuple[int, ...]] = Field(
        default={}, description="module type → layers of its stack that don't have it"
    )

    @property
    def places(self) -> dict[Target, int]:
        return {entry.target: place for place, entry in enumerate(self.layers)}

    def require_covers(self, targets: Iterable[Target]) -> None:
        """Refuse targets that this profile doesn't know, or knows with another shape.

        Raises:
            ValueError: naming them.
        """
        known = self.places
        missing = [target.path for target in targets if target not in known]
        if missing:
            raise ValueError(
                "the profile must cover every target with the same shape; it lacks "
                f"{len(missing)}: {', '.join(missing[:5])}. Measure the profile again for this "
                "model and these `target_modules`."
            )

    def gradients_of(self, targets: Sequence[Target], fold: int | None = None) -> TypeGradients:
        """The gradients of targets of one module type, over all rows or those of one fold."""
        pairs = (self if fold is None else self.folds[fold]).pairs.get(targets[0].module_type)
        rows = tuple(pairs.layers.index(target.layer) for target in targets) if pairs else ()
        return TypeGradients(self.moments_of(targets, fold), pairs, rows)

    def moments_of(self, targets: Sequence[Target], fold: int | None = None) -> tuple[Moments, ...]:
        """Moments of any targets, over all rows or those of one fold."""
        places = self.places
        if fold is None:
            return tuple(self.layers[places[target]].moments for target in targets)
        return tuple(self.folds[fold].moments[places[target]] for target in targets)

    def by_module_type(self) -> dict[str, list[LayerGradient]]:
        """Layers of each module type, in order of depth."""
        types: dict[str, list[LayerGradient]] = {}
        for entry in sorted(self.layers, key=lambda e: e.target.layer):
            types.setdefault(entry.target.module_type, []).append(entry)
        return types


def require_usable(gradients: Iterable[tuple[Target, Moments]]) -> None:
    """Refuse a gradient that says nothing: σ = 0 (or NaN, which ``Moments`` cannot hold).

    Raises:
        ValueError: naming the targets, and what to do.
    """
    dead = [target.path for target, moments in gradients if moments.std == 0.0]
    if dead:
        raise ValueError(
            "every target needs a gradient with a standard deviation above 0, to have an "
            f"entropy; {len(dead)} got none: {', '.join(dead[:5])}. They are not reached by the "
            "loss on this task: take them out of `target_modules`, or calibrate on more samples."
        )
