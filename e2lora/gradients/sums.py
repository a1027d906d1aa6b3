"""What is kept of gradients as they are made, block by block: sums for moments, files for pairs.

Moments need four sums per row. Inner products and distances of all pairs of layers need whole
gradients, and those of one module type don't fit into memory together: each is written to a file
(float32), and all pairs are taken by blocks of entries that do fit, summed in float64. The only
error is float32's rounding of the gradients themselves; nothing is sketched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2lora.moments import LayerGradient, Moments, PairStatistics, Target

CHUNK = 2**15  # entries widened to float64 at once: a processor's cache holds them
BLOCK_BYTES = 64 * 2**20
"""What the blocks of all layers of a module type may take in memory together, in float64."""


class SpilledGradients:
    """Files of float32 gradients, one per target, in a folder that must exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def write(self, target: Target, first_row: int, rows: NDArray[np.float32]) -> None:
        """Rows ``first_row`` … of a gradient (out x in); each row is written once."""
        file = self._files.get(target.path)
        if file is None:
            file = self._files[target.path] = self._folder / f"{len(self._files)}.f32"
            file.touch()
        with file.open("r+b") as out:
            out.seek(4 * first_row * target.in_features)
            out.write(np.ascontiguousarray(rows, dtype=np.float32).data)

    def statistics(
        self, members: Sequence[Target], scale: float, alive: Callable[[], None]
    ) -> PairStatistics:
        """All pairs of the targets of one module type, in their order; the files are removed.

        Args:
            scale: what the gradients are to be multiplied by.
            alive: called often, to show that the worker lives.
        """
        num, size = len(members), members[0].in_features * members[0].out_features
        inner, l1, squares = (np.zeros((num, num)) for _ in range(3))
        files = [np.memmap(self._files[t.path], np.float32, "r", shape=(size,)) for t in members]
        width = max(1, BLOCK_BYTES // (8 * num))
        for begin in range(0, size, width):
            block = np.stack([file[begin : begin + width] for file in files]).astype(np.float64)
            inner += block @ block.T
            alive()
            for i in range(num - 1):
                apart = block[i + 1 :] - block[i]
                squares[i, i + 1 :] += np.einsum("ij,ij->i", apart, apart)
                l1[i, i + 1 :] += np.abs(apart, out=apart).sum(axis=1)
        del files
        for target in members:
            self._files.pop(target.path).unlink()
        return PairStatistics(
            layers=tuple(target.layer for target in members),
            inner=_as_tuples(scale**2 * inner),
            l1=_as_tuples(scale * (l1 + l1.T)),
            l2=_as_tuples(scale * np.sqrt(squares + squares.T)),
        )


def _as_tuples(matrix: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


class GradientSums:
    """Of every gradient of one set of rows: count, Σg, Σg², Σ|g| by rows, in float64.

    Each row of each gradient is added once, whole. ``scale`` makes the gradient of the mean loss
    over all rows that of this set's own mean loss.
    """

    def __init__(self, folder: Path | None, scale: float) -> None:
        self._scale = scale
        self._sums: dict[str, Tensor] = {}
        self._spill = SpilledGradients(folder) if folder else None

    def __contains__(self, path: str) -> bool:
        return path in self._sums

    def add(self, target: Target, first_row: int, block: Tensor) -> None:
        sums = self._sums.get(target.path)
        if sums is None:
            sums = torch.zeros(target.out_features, 3, dtype=torch.float64)
            self._sums[target.path] = sums
        chunk = CHUNK if block.device.type == "cpu" else block.numel()
        height = max(1, chunk // target.in_features)
        for begin in range(0, len(block), height):
            wide = block[begin : begin + height].double()
            three = torch.stack([wide.sum(1), wide.square().sum(1), wide.abs().sum(1)], dim=1)
            sums[first_row + begin : first_row + begin + len(wide)] = three.cpu()
        if self._spill:
            self._spill.write(target, first_row, block.cpu().numpy())

    def require_finite(self, targets: Sequence[Target]) -> None:
        broken = [t.path for t in targets if not self._sums[t.path].isfinite().all()]
        if broken:
            shown = ", ".join(broken[:5]) + (", …" if len(broken) > 5 else "")
            raise ValueError(
                f"every target needs a finite gradient; {len(broken)} got none: {shown}. Are the "
                "model's weights finite? Otherwise calibrate on other samples."
            )

    def moments(self, target: Target, rows: Sequence[int] | None = None) -> Moments:
        sums = self._sums[target.path]
        chosen = sums if rows is None else sums[list(rows)]
        total, squares, absolutes = chosen.sum(0).tolist()
        scale = self._scale
        count = len(chosen) * target.in_features
        return Moments.from_sums(count, scale * total, scale**2 * squares, scale * absolutes)

    def layer(self, target: Target, parts: Mapping[str, Sequence[int]]) -> LayerGradient:
        return LayerGradient(
            target=target,
            moments=self.moments(target),
            parts={name: self.moments(target, rows) for name, rows in parts.items()},
        )

    def pairs(
        self, targets: Sequence[Target], alive: Callable[[], None]
    ) -> dict[str, PairStatistics]:
        """By module type; empty where nothing was spilled."""
        if self._spill is None:
            return {}
        types: dict[str, list[Target]] = {}
        for target in sorted(targets, key=lambda t: t.layer):
            types.setdefault(target.module_type, []).append(target)
        return {n: self._spill.statistics(t, self._scale, alive) for n, t in types.items()}


@contextmanager
def spill_folders(wanted: bool, num: int) -> Iterator[list[Path | None]]:
    """So many folders for a while, or as many Nones where none are wanted."""
    if not wanted:
        yield [None] * num
        return
    with tempfile.TemporaryDirectory(prefix="e2lora-gradients-") as root:
        folders = [Path(root) / str(k) for k in range(num)]
        for folder in folders:
            folder.mkdir()
        yield list(folders)
