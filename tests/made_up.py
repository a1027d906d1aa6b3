"""Targets, gradients and profiles that are made up, for what needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from e2lora.moments import (
    Fold,
    GradientProfile,
    LayerGradient,
    Moments,
    PairStatistics,
    Provenance,
    Target,
    TypeGradients,
)


def make_targets(
    num_layers: int, q: tuple[int, int] = (8, 8), v: tuple[int, int] | None = None
) -> list[Target]:
    """``num_layers`` layers with a weight q, and v if its (in, out) is given."""
    shapes = {"q": q} if v is None else {"q": q, "v": v}
    return [
        Target(
            path=f"h.{layer}.{name}",
            module_type=f"h.*.{name}",
            layer=layer,
            in_features=shape[0],
            out_features=shape[1],
        )
        for layer in range(num_layers)
        for name, shape in shapes.items()
    ]


def moments_of(std: float, count: int = 64) -> Moments:
    return Moments(count=count, mean=0.0, std=std, mean_abs=std)


def make_profile(
    targets: Sequence[Target], stds: Sequence[float], folds: Sequence[Sequence[float]] = ()
) -> GradientProfile:
    """σ of each target, over all rows and, if given, in each fold."""
    provenance = Provenance(
        model="tiny",
        model_fingerprint="0" * 16,
        task="reviews",
        num_samples=8,
        num_supervised=8,
        seed=0,
        dtype="float32",
        mean_loss=0.7,
        method="blocks",
        num_workers=1,
        versions={},
    )

    def moments(values: Sequence[float]) -> list[Moments]:
        sizes = (target.in_features * target.out_features for target in targets)
        return [moments_of(std, size) for std, size in zip(values, sizes, strict=True)]

    layers = zip(targets, moments(stds), strict=True)
    return GradientProfile(
        provenance=provenance,
        layers=tuple(LayerGradient(target=target, moments=own) for target, own in layers),
        folds=tuple(
            Fold(num_samples=8 // len(folds), num_supervised=8, moments=tuple(moments(values)))
            for values in folds
        ),
    )


def gradients_of(vectors: NDArray[np.float64]) -> TypeGradients:
    """Layers (N, entries) with moments and pairs, by numpy's own functions."""
    moments = tuple(
        Moments(count=v.size, mean=v.mean(), std=v.std(), mean_abs=np.abs(v).mean())
        for v in vectors
    )
    apart = vectors[:, None, :] - vectors[None, :, :]
    return TypeGradients(
        moments,
        PairStatistics(
            layers=tuple(range(len(vectors))),
            inner=as_tuples(vectors @ vectors.T),
            l1=as_tuples(np.abs(apart).sum(-1)),
            l2=as_tuples(np.linalg.norm(apart, axis=-1)),
        ),
        tuple(range(len(vectors))),
    )


def as_tuples(matrix: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in matrix)
