"""Images of every form are one task, decoded batch by batch; and vision models are adapted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from e2lora.adapters import adapt, trainable_parameters
from e2lora.config import (
    AdapterConfig,
    CalibrationConfig,
    ImageClassificationConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.config.presets.images import PRESETS
from e2lora.models import Base, load_base, load_processor, load_structure
from e2lora.plan import build_plan
from e2lora.planning.estimate import profile_cost
from e2lora.profile import measure_profile
from e2lora.profile_cache import ProfileCache
from e2lora.records import TrialFolder
from e2lora.targets import find_targets
from e2lora.tasks import TokenRows, TrialData
from e2lora.tasks.columns import picked
from e2lora.tasks.image_classification import ImageClassification
from e2lora.tasks.images import sees_images, tokens_per_image, trunk_config
from e2lora.tokens import TokenCache, tokenised
from e2lora.training import Reports, run_trial
from e2lora.training.meter import FlopsPerToken, Meter
from tests.conftest import data_folder

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {**SMALL, "hidden_size": 48, "image_size": 16, "patch_size": 8, "num_hidden_layers": 3}
MEAN, STD = 0.5, 0.25
SIDE = 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of these tests shall stay in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- models and rows --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT without a head, and its image processor."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of both towers."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**SMALL, "num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(vit: Path) -> Any:
    return load_processor(ModelConfig(name=str(vit)), "image")


def pixels(number: int = 24, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Grey images, 16 x 16: of label 0 dark, of 1 bright."""
    rng = np.random.default_rng(seed)
    return [
        rng.integers(128 * (i % 2), 128 * (i % 2) + 128, (SIDE, SIDE), dtype=np.uint8)
        for i in range(number)
    ]


def png(image: NDArray[Any] | Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(file, kind)
    return file.getvalue()


def write(file: Path, cells: Sequence[Any], labels: Sequence[Any] | None = None) -> Path:
    """Cells as they are, beside labels 0, 1, 0, … and a name."""
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": list(cells),
        "label": labels or [i % 2 for i in range(len(cells))],
        "name": [f"picture {i}" for i in range(len(cells))],
    }
    parquet.write_table(pyarrow.table(table), file)
    return file.parent


def write_as_the_hub(file: Path, images: Sequence[NDArray[Any]]) -> Path:
    import datasets

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "image": [Image.fromarray(image) for image in images],
        "label": [i % 2 for i in range(len(images))],
    }
    names = datasets.ClassLabel(names=["dark", "bright"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return file.parent


def write_with_paths(file: Path, images: Sequence[NDArray[Any]]) -> Path:
    """Files beside the rows, which name them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(file.parent / f"{i}.png")
        cells.append({"bytes": None, "path": str(file.parent / f"{i}.png")})
    return write(file, cells)


FORMS: dict[str, Callable[[Path, Sequence[NDArray[np.uint8]]], Path]] = {
    "hub": write_as_the_hub,
    "encoded": lambda file, images: write(file, [png(image) for image in images]),
    "raw": lambda file, images: write(file, [image.tobytes() for image in images]),
    "paths": write_with_paths,
}


def task_of(data: Path | str, **options: Any) -> ImageClassification:
    chosen = {"validation_size": 4, **options}
    return ImageClassification(ImageClassificationConfig(data=str(data), **chosen))


def by_hand(image: NDArray[np.uint8]) -> torch.Tensor:
    """What the tiny ViT's processor must make of a grey image that has its size."""
    grey = torch.tensor(image.astype(np.float64) / 255)
    return ((grey - MEAN) / STD).float().expand(3, SIDE, SIDE)


# ---- features and batches ---------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_pixels_and_labels_that_were_written(
    tmp_path: Path, processor: Any, form: str
) -> None:
    images = pixels()
    raw_shape = (SIDE, SIDE) if form == "raw" else None
    task = task_of(FORMS[form](tmp_path / "data" / "train.parquet", images), raw_shape=raw_shape)
    assert task.labels == [0, 1]
    assert task.num_labels == 2
    seen = []
    for split, size in (("train", 20), ("validation", 4)):
        rows = task.features(split, processor)
        assert len(rows) == task.num_rows(split) == size
        batch = task.collate(rows, processor)
        for row, made in zip(rows, batch["pixel_values"], strict=True):
            torch.testing.assert_close(made, by_hand(images[row["image"]]))
            assert row["labels"] == row["image"] % 2
        assert batch["labels"].tolist() == [row["labels"] for row in rows]
        seen += [row["image"] for row in rows]
    assert sorted(seen) == list(range(24)), "each image is in one split"


def test_colours_of_raw_pixels_are_kept(tmp_path: Path, processor: Any) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(8)]
    folder = write(tmp_path / "data" / "train.parquet", [image.tobytes() for image in images])
    task = task_of(folder, raw_shape=(SIDE, SIDE, 3), validation_size=2)
    rows = task.features("train", processor)
    for row, made in zip(rows, task.collate(rows, processor)["pixel_values"], strict=True):
        expected = (torch.tensor(images[row["image"]] / 255.0) - MEAN) / STD
        torch.testing.assert_close(made, expected.permute(2, 0, 1).float())


def palette(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image).convert("P")


def black_ink(image: NDArray[np.uint8]) -> Image.Image:
    none, black = Image.new("L", (SIDE, SIDE)), Image.fromarray(255 - image)
    return Image.merge("CMYK", [none, none, none, black])


def turned(image: NDArray[np.uint8]) -> bytes:
    """With a tag that says it lies on its side."""
    file, tags = io.BytesIO(), Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(image).save(file, "png", exif=tags)
    return file.getvalue()


@pytest.mark.parametrize(
    "encode",
    [
        lambda image: png(palette(image)),
        lambda image: png(Image.fromarray(image).convert("RGB")),
        lambda image: png(Image.merge("LA", [Image.fromarray(image)] * 2)),
        lambda image: png(black_ink(image), "tiff"),
        lambda image: png(image.astype(np.uint16) * 257),
        lambda image: png(Image.fromarray(image.astype(np.int32) * 257), "tiff"),
        lambda image: png(image, "bmp"),
        turned,
    ],
    ids=["palette", "rgb", "transparent", "cmyk", "16 bits", "32-bit integers", "bmp", "turned"],
)
def test_images_of_any_kind_come_out_the_same(
    tmp_path: Path, processor: Any, encode: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    images = pixels(8)
    cells = [encode(image) for image in images]
    task = task_of(write(tmp_path / "data" / "train.parquet", cells), validation_size=2)
    rows = task.features("train", processor)
    for row, made in zip(rows, task.collate(rows, processor)["pixel_values"], strict=True):
        torch.testing.assert_close(made, by_hand(images[row["image"]]))


def test_threads_and_company_do_not_change_an_image(
    tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(FORMS["encoded"](tmp_path / "data" / "train.parquet", pixels()))
    rows = task.features("train", processor)
    together = task.collate(rows, processor)["pixel_values"]
    alone = [task.collate([row], processor)["pixel_values"] for row in rows]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    in_threads = task.collate(rows, processor)["pixel_values"]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, in_threads)


def test_rows_are_numbers_that_are_cached_and_read_back(tmp_path: Path, processor: Any) -> None:
    folder = FORMS["encoded"](tmp_path / "data" / "train.parquet", pixels())
    made, again = (
        tokenised(task_of(folder), processor, TokenCache(tmp_path / "rows")) for _ in range(2)
    )
    assert isinstance(again.train, TokenRows)
    assert set(again.train.columns) == {"image", "labels"}
    assert sum(column.values.nbytes for column in again.train.columns.values()) == 2 * 20
    assert again.lengths.tolist() == [1] * 20
    assert again.num_supervised.tolist() == [1] * 20
    plain = task_of(folder).features("train", processor)
    assert [dict(row) for row in again.train] == plain
    expected = made.task.collate(plain[:5], processor)
    for rows in (picked(again.train, range(5)), again.train[:5]):
        batch = again.task.collate(rows, processor)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_content_names_pixels_labels_and_places(tmp_path: Path) -> None:
    images = pixels()
    cells = [png(image) for image in images]
    contents = {}
    changed = [*cells[:7], png(255 - images[7]), *cells[8:]]
    other_labels = [i % 3 for i in range(24)]
    for name, rows, labels in (
        ("same", cells, None),
        ("again", cells, None),
        ("an image", changed, None),
        ("labels", cells, other_labels),
        ("order", cells[::-1], [1 - i % 2 for i in range(24)]),
    ):
        task = task_of(write(tmp_path / name / "train.parquet", rows, labels))
        contents[name] = (task.content("train"), task.content("validation"))
    assert contents.pop("again") == contents["same"]
    assert len({train for train, _ in contents.values()}) == len(contents)
    assert contents["same"][0] != contents["same"][1]


def test_content_tells_where_images_stand_as_features_do(tmp_path: Path, processor: Any) -> None:
    cells = [png(image) for image in pixels()]
    shorter, longer = (
        task_of(write(folder / "dev.parquet", cells[20:]), validation_split="dev")
        for folder, number in ((tmp_path / "shorter", 10), (tmp_path / "longer", 12))
        if write(folder / "train.parquet", cells[:number])
    )
    assert shorter.features("validation", processor) != longer.features("validation", processor)
    assert shorter.content("validation") != longer.content("validation")


def test_images_that_stand_in_two_splits_are_counted(tmp_path: Path) -> None:
    cells = [png(image) for image in pixels()]
    folder = write(tmp_path / "data" / "train.parquet", cells[:12])
    write(folder / "dev.parquet", [*cells[12:20], *cells[2:5]])
    write(folder / "test.parquet", [cells[0], cells[12], cells[22], cells[23]])
    task = task_of(folder, validation_split="dev", validation_size=50, test_split="test")
    assert task.splits == ("train", "validation", "test")
    assert task.duplicates == {"train/validation": 3, "train/test": 1, "validation/test": 1}


def test_test_rows_have_images_and_labels_of_their_own(tmp_path: Path, processor: Any) -> None:
    images, held = pixels(), pixels(6, seed=1)
    folder = FORMS["encoded"](tmp_path / "data" / "train.parquet", images)
    FORMS["encoded"](folder / "test.parquet", held)
    task = task_of(folder, test_split="test")
    batch = task.collate(task.features("test", processor), processor)
    for image, made in zip(held, batch["pixel_values"], strict=True):
        torch.testing.assert_close(made, by_hand(image))
    assert batch["labels"].tolist() == [0, 1, 0, 1, 0, 1]


def test_images_are_left_in_their_file(tmp_path: Path) -> None:
    task = task_of(FORMS["raw"](tmp_path / "data" / "train.parquet", pixels()), raw_shape=(16, 16))
    (column,) = task._images._columns
    assert column._rows.cache_files, "a file that is mapped into memory"
    assert column._rows.data.nbytes < 24 * (SIDE * SIDE + 8) + 64, "and nothing beside it"


# ---- what is refused --------------------------------------------------------------------------


def test_missing_image_column_shows_the_columns(tmp_path: Path) -> None:
    folder = FORMS["encoded"](tmp_path / "data" / "train.parquet", pixels())
    with pytest.raises(ValueError, match=r"has \['image', 'label', 'name'\], not \['picture'\]"):
        task_of(folder, image_column="picture")


def test_column_without_images_shows_what_it_holds(tmp_path: Path) -> None:
    folder = FORMS["encoded"](tmp_path / "data" / "train.parquet", pixels())
    with pytest.raises(ValueError, match=r"'name' of .* holds (large_)?string\. Set the right"):
        task_of(folder, image_column="name")


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("raw", (16, 15), r"train row 0 of .* has 256 bytes, not the 240 of raw_shape=\(16, 15\)"),
        ("hub", (16, 16), r"holds struct<.*> as bytes of pixels.*or leave `raw_shape` out"),
        ("raw", (16,), r"height and width.*got \(16,\)"),
        ("raw", (16, 16, 4), r"height and width.*got \(16, 16, 4\)"),
    ],
)
def test_wrong_raw_shape_is_refused(
    tmp_path: Path, form: str, shape: tuple[int, ...], message: str
) -> None:
    folder = FORMS[form](tmp_path / "data" / "train.parquet", pixels())
    with pytest.raises(ValueError, match=message):
        task_of(folder, raw_shape=shape)


def test_one_row_of_too_few_pixels_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e2lora.tasks.images.AT_ONCE", 8)
    cells = [image.tobytes() for image in pixels()]
    folder = write(tmp_path / "data" / "train.parquet", [*cells[:21], cells[21][:-1], *cells[22:]])
    with pytest.raises(ValueError, match=r"train row 21 .* has 255 bytes.*'name': 'picture 21'"):
        task_of(folder, raw_shape=(16, 16))


def test_row_without_an_image_is_named(tmp_path: Path) -> None:
    cells = [png(image) for image in pixels()]
    folder = write(tmp_path / "data" / "train.parquet", [*cells[:9], None, *cells[10:]])
    with pytest.raises(ValueError, match=r"train row 9 .* isn't there: \{'label': 1, 'name': 'pic"):
        task_of(folder)
    stored: list[Any] = [{"bytes": cell, "path": None} for cell in cells]
    for lacking in ({"bytes": None, "path": None}, None):
        stored[5] = lacking
        folder = write(tmp_path / f"stored {lacking}" / "train.parquet", stored)
        with pytest.raises(ValueError, match=r"train row 5 .* isn't there"):
            task_of(folder)


def test_row_whose_file_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_with_paths(tmp_path / "data" / "train.parquet", pixels())
    (folder / "19.png").unlink()
    with pytest.raises(ValueError, match=r"train row 19 .* can't be read .*19\.png"):
        task_of(folder)


@pytest.mark.parametrize("broken", [b"no picture", b""], ids=["text", "nothing"])
def test_broken_image_among_the_first_is_found_at_once(tmp_path: Path, broken: bytes) -> None:
    cells = [png(image) for image in pixels()]
    folder = write(tmp_path / "data" / "train.parquet", [*cells[:3], broken, *cells[4:]])
    with pytest.raises(ValueError, match=r"train row 3 .* can't be decoded \(Unid.*picture 3'"):
        task_of(folder)


def test_broken_image_among_the_others_is_named_when_met(tmp_path: Path, processor: Any) -> None:
    cells = [png(image) for image in pixels()]
    broken = [*cells[:20], cells[20][:100], *cells[21:]]
    task = task_of(write(tmp_path / "data" / "train.parquet", broken))
    rows = [*task.features("train", processor), *task.features("validation", processor)]
    for row in rows:
        if row["image"] != 20:
            task.collate([row], processor)
    with pytest.raises(ValueError, match=r"train row 20 .* can't be decoded.*'name': 'picture 20'"):
        task.collate(rows, processor)


def test_floating_point_image_is_refused(tmp_path: Path) -> None:
    cells = [png(Image.fromarray(image.astype(np.float32)), "tiff") for image in pixels()]
    with pytest.raises(ValueError, match=r"row 0 .* floating-point"):
        task_of(write(tmp_path / "data" / "train.parquet", cells))


def test_unknown_label_of_a_test_row_is_named(tmp_path: Path) -> None:
    cells = [png(image) for image in pixels()]
    folder = write(tmp_path / "data" / "train.parquet", cells)
    write(folder / "test.parquet", cells[:3], [0, 1, 7])
    with pytest.raises(ValueError, match=r"row 2 has 7: \{'label': 7\}\. Known: \[0, 1\]"):
        task_of(folder, test_split="test")


def test_images_of_several_sizes_are_refused_with_the_processors_remedy(
    tmp_path: Path, clip: Path
) -> None:
    cells = [png(np.zeros((16, 16 + i), np.uint8)) for i in range(12)]
    task = task_of(write(tmp_path / "data" / "train.parquet", cells))
    uncropped = load_processor(ModelConfig(name=str(clip)), "image")
    uncropped.do_center_crop = False
    with pytest.raises(ValueError, match=r"one size.*\(3, 16, 17\).*`do_center_crop`"):
        task.collate(task.features("train", uncropped), uncropped)


def test_model_without_an_image_processor_is_refused(tmp_path: Path, vit: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((vit / name).read_bytes())
    with pytest.raises(OSError, match=rf"{folder}.*no image processor.*preprocessor_config\.json"):
        load_processor(ModelConfig(name=str(folder)), "image")


# ---- models -----------------------------------------------------------------------------------


def base_of(folder: Path, task: ImageClassification, dtype: torch.dtype = torch.float32) -> Base:
    config = ModelConfig(name=str(folder))
    return load_base(config, task.auto_class, task.num_labels, dtype, processor=task.processor)


@pytest.fixture
def task(tmp_path: Path) -> ImageClassification:
    return task_of(FORMS["encoded"](tmp_path / "data" / "train.parquet", pixels()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_scores_are_those_of_the_model_itself(
    vit: Path, task: ImageClassification, dtype: torch.dtype
) -> None:
    base = base_of(vit, task, dtype)
    batch = task.collate(task.features("validation", base.processor), base.processor)
    assert batch["pixel_values"].dtype == torch.float32
    with torch.no_grad():
        logits = base.model(batch["pixel_values"].to(dtype)).logits.float()
        total = task.loss_sum(base.model, batch)
        scores = task.score(base.model, batch)
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, losses.sum())
    assert [score.loss for score in scores] == pytest.approx(losses.tolist())
    assert [score.prediction for score in scores] == logits.argmax(-1).tolist()
    assert [score.expected for score in scores] == batch["labels"].tolist()
    metrics = task.metrics(scores)
    right = (logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert metrics["accuracy"] == metrics["score"] == pytest.approx(right)
    assert set(metrics) == set(task.directions)


def test_a_clip_checkpoint_is_adapted_in_its_vision_tower_alone(
    clip: Path, task: ImageClassification
) -> None:
    base = base_of(clip, task)
    assert base.head == ("classifier",)
    names = {name.split(".")[0] for name, _ in base.model.named_parameters()}
    assert names == {"vision_model", "classifier"}
    whole = CLIPModel.from_pretrained(clip).vision_model.state_dict()
    for name, tensor in base.model.vision_model.state_dict().items():
        assert torch.equal(tensor, whole[name]), "the checkpoint's weights"
    targets = find_targets(base.model, ("q_proj", "fc1"))
    sizes = [(t.layer, t.in_features, t.out_features) for t in targets]
    assert sorted(sizes) == [(i, 48, out) for i in range(3) for out in (48, 64)]
    config = AdapterConfig(target_modules=("q_proj", "fc1"))
    plan = build_plan(targets, PlanConfig(topology="none", r=2))
    adapted = adapt(base.model, plan, config, base.head)
    trained = trainable_parameters(adapted)
    assert {"lora" if "lora" in name else name.rsplit(".", 1)[-1] for name in trained} == {
        "lora",
        "weight",
        "bias",
    }
    batch = task.collate(task.features("train", base.processor)[:4], base.processor)
    with torch.no_grad():
        patches = base.model.vision_model(batch["pixel_values"]).last_hidden_state[:, 1:]
        logits = base.model.classifier(patches.mean(1))
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        torch.testing.assert_close(task.loss_sum(adapted, batch), expected)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_patches_of_an_image_are_counted_as_the_model_makes_them(
    request: pytest.FixtureRequest, task: ImageClassification, name: str
) -> None:
    base = base_of(request.getfixturevalue(name), task)
    batch = task.collate(task.features("train", base.processor)[:1], base.processor)
    tower = base.model.vit if name == "vit" else base.model.vision_model
    seen = tower(batch["pixel_values"]).last_hidden_state.shape[1]
    assert tokens_per_image(base.model.config) == seen == 5
    assert sees_images(base.model)
    assert trunk_config(base.model).hidden_size == 48, "of the tower that is there"


def test_a_model_of_texts_and_images_is_taken_for_one_of_texts(clip: Path) -> None:
    whole = CLIPModel.from_pretrained(clip)
    assert not sees_images(whole)
    assert trunk_config(whole).hidden_size == 32
    assert tokens_per_image(whole.config) == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("one_process")
def test_tiny_vit_is_profiled_planned_and_trained(
    tmp_path: Path, vit: Path, precision: str
) -> None:
    images = FORMS["encoded"](tmp_path / "data" / "train.parquet", pixels(64))
    FORMS["encoded"](images / "test.parquet", pixels(10, seed=1))
    task = task_of(images, validation_size=16, test_split="test")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = base_of(vit, task, dtype)
    data = TrialData.of(task, base.processor)
    config = TrialConfig(
        model=ModelConfig(name=str(vit)),
        task=task.config,
        adapter=AdapterConfig(target_modules=("q_proj", "fc1")),
        plan=PlanConfig(
            topology="e2",
            r=2,
            calibration=CalibrationConfig(num_samples=16, num_folds=2, microbatch_size=16),
        ),
        training=TrainConfig(
            max_steps=12, learning_rate=2e-2, global_batch_size=16, precision=precision
        ),
    )
    profile = measure_profile(base, data, config)
    assert profile.provenance.dtype == "float32"
    assert all(layer.moments.std > 0 for layer in profile.layers)
    plan = build_plan(find_targets(base.model, ("q_proj", "fc1")), config.plan, profile)
    folder = TrialFolder(tmp_path / "trial")
    trained = run_trial(base, data, plan, config, folder, Reports(), score_test=True)
    assert len(trained.losses) == 12
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert trained.test_metrics["accuracy"] == 1.0
    lines = folder.test_predictions_file.read_text().splitlines()
    assert [json.loads(line)["expected"] for line in lines] == [i % 2 for i in range(10)]


def test_profile_is_that_of_plain_autograd(vit: Path, task: ImageClassification) -> None:
    base = base_of(vit, task)
    data = TrialData.of(task, base.processor)
    profile = measure_profile(base, data, small_trial_of(vit, task))
    batch = task.collate(data.train, base.processor)
    weights = [
        base.model.get_submodule(t.path).weight for t in find_targets(base.model, ("v_proj",))
    ]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(task.loss_sum(base.model, batch) / 20, weights)
    stds = [gradient.std(correction=0).item() for gradient in gradients]
    assert [layer.moments.std for layer in profile.layers] == pytest.approx(stds, rel=1e-4)


def small_trial_of(vit: Path, task: ImageClassification) -> TrialConfig:
    return TrialConfig(
        model=ModelConfig(name=str(vit)),
        task=task.config,
        adapter=AdapterConfig(target_modules=("v_proj",)),
        plan=PlanConfig(topology="e2", r=2, calibration=CalibrationConfig(num_samples=20)),
        training=TrainConfig(max_steps=1, learning_rate=1e-3),
    )


def test_profile_is_measured_anew_with_another_image_processor(
    tmp_path: Path, vit: Path, task: ImageClassification
) -> None:
    base = base_of(vit, task)
    data, config = TrialData.of(task, base.processor), small_trial_of(vit, task)
    cache = ProfileCache(tmp_path / "profiles")
    first = measure_profile(base, data, config, cache=cache)
    assert measure_profile(base, data, config, cache=cache) == first
    base.processor.image_mean = [0.1, 0.1, 0.1]
    assert measure_profile(base, data, config, cache=cache) != first


def test_cost_of_a_profile_counts_the_patches_of_images(
    vit: Path, task: ImageClassification
) -> None:
    structure = load_structure(ModelConfig(name=str(vit)), task.auto_class, task.num_labels)
    targets = find_targets(structure, ("q_proj",))
    folds = [[{"image": i, "labels": 0} for i in range(n)] for n in (3, 4)]
    cost = profile_cost(structure, targets, folds, CalibrationConfig(num_samples=7, num_folds=2))
    assert cost.tokens == cost.padded_tokens == 7 * 5


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_meter_counts_patches_in_the_tower_that_computes(
    request: pytest.FixtureRequest, task: ImageClassification, name: str
) -> None:
    base = base_of(request.getfixturevalue(name), task)
    measured = Meter(base.model, torch.device("cpu"), "fp32", 1).read(num_tokens=10, num_rows=10)
    assert measured["tokens_per_second"] * measured["seconds"] == pytest.approx(10 * 5)
    assert FlopsPerToken.of(base.model).attention == 12.0 * 3 * 48


# ---- presets, and real images -----------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_preset_reads_data_of_the_hubs_form(tmp_path: Path, name: str) -> None:
    preset = PRESETS[name]
    folder = write_as_the_hub(tmp_path / "data" / "train.parquet", pixels())
    write_as_the_hub(folder / "test.parquet", pixels(6, seed=1))
    copy = {"data": str(folder), "subset": None, "validation_size": 4}
    task = ImageClassification(preset.task.model_copy(update=copy))
    assert [task.num_rows(split) for split in task.splits] == [20, 4, 6]
    assert preset.metric in task.directions


def test_fashion_mnist_is_read(processor: Any) -> None:
    options = {"image_column": "pixels", "raw_shape": (28, 28), "test_split": "test"}
    task = task_of(data_folder("fashion_mnist"), **options, validation_size=1000)
    assert [task.num_rows(split) for split in task.splits] == [9000, 1000, 5000]
    assert task.labels == list(range(10))
    batch = task.collate(task.features("test", processor)[:3], processor)
    assert batch["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert batch["labels"].tolist() == [9, 2, 1]
