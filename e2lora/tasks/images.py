"""Images of a task's rows: they stay in their files, and are decoded when a batch needs them.

An image is told by its number among all rows of the files, in the order of splits. Orientation
tags (EXIF) are left alone: an image is what its pixels say.
"""

from __future__ import annotations

import hashlib
import io
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e2lora.config import ImageClassificationConfig
from e2lora.tasks.rows import shown, source_name

CHECKED_ROWS = 8  # of each split are decoded at once; broken ones among the others when met
AT_ONCE = 256  # rows looked at in one go
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's modes of one wide channel
KINDS = (
    "images as the hub stores them (bytes and path), bytes of a png, jpeg, … each, or bytes of "
    "pixels with `raw_shape`"
)


class Images:
    """Those of all splits.

    Args:
        splits: as they were read, not yet carved: messages number rows as the files do.

    Attributes:
        numbers: those of each split, in row order.

    Raises:
        ValueError: a column that holds no images, a row without one or with too few or too many
            pixels, or one among the first that can't be decoded.
    """

    def __init__(self, splits: Mapping[str, Any], config: ImageClassificationConfig) -> None:
        if config.raw_shape is not None:
            _require_image_shape(config.raw_shape)
        self._columns = [_Column(rows, split, config) for split, rows in splits.items()]
        self._firsts = [0, *accumulate(len(column) for column in self._columns)]
        self.numbers = {
            split: range(*ends) for split, ends in zip(splits, pairwise(self._firsts), strict=True)
        }

    def digests(self) -> list[str]:
        """What names the bytes of each image. All are read."""
        return [digest for column in self._columns for digest in column.digests()]

    def pixels(self, numbers: Sequence[int], processor: Any) -> Tensor:
        """float32 [images, channels, height, width], as the model's image processor makes it.

        Each image is worked on by itself, some in each of the threads that torch has here.

        Raises:
            ValueError: an image that can't be decoded, or images of several sizes.
        """

        def made(some: Sequence[int]) -> list[Any]:
            return list(processor(images=list(map(self.decoded, some)))["pixel_values"])

        size = math.ceil(len(numbers) / torch.get_num_threads())
        parts = [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
        with ThreadPoolExecutor(len(parts)) as pool:
            arrays = [array for part in pool.map(made, parts) for array in part]
        if len(shapes := {array.shape for array in arrays}) > 1:
            raise ValueError(
                "images of a batch must be of one size; the model's image processor makes "
                f"{sorted(shapes)} (channels, height, width) of them. Set `size`, or "
                "`do_center_crop` and `crop_size`, in its preprocessor_config.json."
            )
        return torch.from_numpy(np.stack(arrays))

    def decoded(self, number: int) -> Any:
        """A PIL image in RGB.

        Raises:
            ValueError: it can't be decoded.
        """
        place = bisect_right(self._firsts, number) - 1
        return self._columns[place].decoded(number - self._firsts[place])


class _Column:
    """The images of one split, in the rows of its file."""

    def __init__(self, rows: Any, split: str, config: ImageClassificationConfig) -> None:
        self._name, self._shape = config.image_column, config.raw_shape
        self._split, self._data = split, source_name(config, split)
        self._rows = rows.select_columns([self._name]).with_format("arrow")  # left in the file
        self._beside = rows.remove_columns([self._name])
        self._require_images(rows)
        for row in range(min(CHECKED_ROWS, len(self))):
            self.decoded(row)

    def __len__(self) -> int:
        return len(self._rows)

    def digests(self) -> Iterator[str]:
        cells = (cell for table in self._tables() for cell in table[self._name])
        for row, cell in enumerate(cells):
            yield hashlib.sha256(self._bytes(row, cell.as_py())).hexdigest()[:32]

    def decoded(self, row: int) -> Any:
        (cell,) = self._rows[[row]][self._name].to_pylist()
        content = self._bytes(row, cell)
        try:
            return _from_pixels(content, self._shape) if self._shape else _from_file(content)
        except Exception as error:  # each file format raises its own kind
            why = f"{type(error).__name__}: {error}"
            raise self._refused(row, f"can't be decoded ({why})") from error

    def _bytes(self, row: int, cell: Any) -> bytes:
        if not isinstance(cell, dict):
            return cell
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise self._refused(row, f"can't be read ({error})") from error

    def _tables(self) -> Iterator[Any]:
        for begin in range(0, len(self), AT_ONCE):
            yield self._rows[begin : begin + AT_ONCE]

    def _require_images(self, rows: Any) -> None:
        """Of every row, without decoding one."""
        import pyarrow
        from pyarrow import compute

        kind = self._rows[:1][self._name].type
        stored = pyarrow.types.is_struct(kind) and {f.name for f in kind} >= {"bytes", "path"}
        binary = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        if not (binary or (stored and self._shape is None)):
            with_shape = " as bytes of pixels, by `raw_shape`" if self._shape and stored else ""
            raise ValueError(
                f"an image column holds {KINDS}; {self._name!r} of {self._data!r} holds {kind}"
                f"{with_shape}. Set the right `image_column`, or leave `raw_shape` out for images "
                f"that are encoded. Columns: {rows.column_names}."
            )
        first = 0
        for table in self._tables():
            cells = table[self._name]
            parts = (
                [compute.struct_field(cells, n) for n in ("bytes", "path")] if stored else [cells]
            )
            lacking = reduce(compute.and_, map(compute.is_null, parts))
            if (row := compute.index(lacking, True).as_py()) >= 0:
                raise self._refused(first + row, "isn't there")
            if self._shape:
                sizes, expected = compute.binary_length(cells), math.prod(self._shape)
                row = compute.index(compute.equal(sizes, expected), False).as_py()
                if row >= 0:
                    why = f"has {sizes[row]} bytes, not the {expected} of raw_shape={self._shape}"
                    raise self._refused(first + row, why)
            first += len(cells)

    def _refused(self, row: int, why: str) -> ValueError:
        return ValueError(
            f"every row needs an image in {self._name!r}; that of {self._split} row {row} of "
            f"{self._data!r} {why}: {shown(self._beside[row])}. Correct or drop the row, or "
            "set the right `image_column` or `raw_shape`."
        )


def _require_image_shape(shape: tuple[int, ...]) -> None:
    colours = shape[2:]
    if len(shape) < 2 or min(shape) < 1 or colours not in ((), (3,)):
        raise ValueError(
            "`raw_shape` is height and width, and 3 where an image has colours; got "
            f"{shape}. Correct it."
        )


def _from_pixels(content: bytes, shape: tuple[int, ...]) -> Any:
    """Rows of pixels, one or three bytes each."""
    from PIL import Image

    return Image.fromarray(np.frombuffer(content, np.uint8).reshape(shape)).convert("RGB")


def _from_file(content: bytes) -> Any:
    """A png, jpeg, … of any colours in RGB; transparency is dropped.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.fromarray(np.array([[0, 257 * 200]], dtype=np.uint16)).save(file, "png")
    >>> [_from_file(file.getvalue()).getpixel((x, 0)) for x in (0, 1)]
    [(0, 0, 0), (200, 200, 200)]
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers, which have no known range")
        if image.mode not in SIXTEEN_BITS:
            return image.convert("RGB")
        wide = np.asarray(image)  # Pillow would cut it off at 255
    if wide.min() < 0 or wide.max() >= 2**16:
        raise ValueError(f"values from {wide.min()} to {wide.max()} are of more than 16 bits")
    return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")


def sees_images(model: Any) -> bool:
    """Whether it takes pixels, as a classifier does of the vision tower of two."""
    return model.main_input_name == "pixel_values"


def trunk_config(model: Any) -> Any:
    """Of what computes: width, layers and the like; of two towers the one that is in the model."""
    config = model.config
    if sees_images(model):
        return getattr(config, "vision_config", config)
    return config.get_text_config()


def tokens_per_image(config: Any) -> int:
    """What a vision transformer makes of an image: its patches and a token for the class.

    1 of a model that isn't told to cut patches of one size.

    Args:
        config: of the model, or of a model with a vision tower.

    >>> from transformers import ViTConfig
    >>> tokens_per_image(ViTConfig(image_size=224, patch_size=16))
    197
    """
    vision = getattr(config, "vision_config", config)
    image, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if not (isinstance(image, int) and isinstance(patch, int)):
        return 1
    return (image // patch) ** 2 + 1
