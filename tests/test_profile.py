"""Profiles of a real model on real rows: shared out, cached, and never trusted when damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import e2lora
from e2lora.config import CalibrationConfig, TrialConfig
from e2lora.models import Base, load_base
from e2lora.moments import GradientProfile
from e2lora.profile import calibration_rounds, maths_version, measure_profile
from e2lora.profile_cache import ProfileCache
from e2lora.tasks import TrialData, load_task
from e2lora.weights import weights_fingerprint
from tests.small import small_trial


def trial(**calibration: Any) -> TrialConfig:
    config = small_trial("e2")
    chosen = CalibrationConfig(**{"num_samples": 22, "num_folds": 3, **calibration})
    return config.model_copy(
        update={"plan": config.plan.model_copy(update={"calibration": chosen})}
    )


@pytest.fixture(scope="module")
def loaded() -> tuple[Base, TrialData]:
    config = trial()
    task = load_task(config.task)
    base = load_base(config.model, task.auto_class, task.num_labels, torch.float32)
    rows = (task.features(split, base.processor) for split in ("train", "validation"))
    return base, TrialData(task, *rows)


Measure = Callable[..., GradientProfile]


@pytest.fixture
def measure(loaded: tuple[Base, TrialData]) -> Measure:
    return lambda config, **options: measure_profile(*loaded, config, **options)


def stds(profile: GradientProfile) -> list[float]:
    return [entry.moments.std for entry in profile.layers]


# ---- rows -------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(1, 40),
    world=st.integers(1, 4),
)
@settings(deadline=None)
def test_every_row_is_in_one_microbatch_of_one_worker_in_its_fold(
    sizes: list[int], size: int, world: int
) -> None:
    folds = [[{"fold": f, "row": i} for i in range(n)] for f, n in enumerate(sizes)]
    options = CalibrationConfig(num_samples=99, microbatch_size=size)
    of_workers = [calibration_rounds(folds, options, rank, world) for rank in range(world)]
    numbers = [[folds_of for folds_of, _ in rounds] for rounds in of_workers]
    assert all(others == numbers[0] for others in numbers), "the same rounds on every worker"
    assert [f for folds_of in numbers[0] for f in folds_of] == list(range(len(folds)))
    seen = []
    for rounds in of_workers:
        for folds_of, microbatches in rounds:
            for rows, counts in microbatches:
                assert 0 < len(rows) <= size
                expected = [f for f, n in zip(folds_of, counts, strict=True) for _ in range(n)]
                assert [row["fold"] for row in rows] == expected
                seen += [(row["fold"], row["row"]) for row in rows]
    assert sorted(seen) == [(f, i) for f, n in enumerate(sizes) for i in range(n)]


@pytest.mark.parametrize("microbatch_size", [5, 8])
def test_profile_does_not_depend_on_the_microbatches(
    measure: Measure, microbatch_size: int
) -> None:
    at_once, cut = (measure(trial(microbatch_size=size)) for size in (24, microbatch_size))
    assert (at_once.provenance.method, cut.provenance.method) == ("blocks", "accumulators")
    assert stds(cut) == pytest.approx(stds(at_once), rel=1e-4)
    for one, other in zip(cut.folds, at_once.folds, strict=True):
        expected = [moments.std for moments in other.moments]
        assert [moments.std for moments in one.moments] == pytest.approx(expected, rel=1e-4)


def test_folds_say_how_many_rows_each_has(measure: Measure) -> None:
    profile = measure(trial(num_samples=25, num_folds=3))
    assert [fold.num_samples for fold in profile.folds] == [9, 8, 8]
    assert profile.provenance.num_samples == 25
    assert measure(trial(num_folds=1)).folds == ()


def test_profile_is_the_same_with_and_without_checkpointing(measure: Measure) -> None:
    plain, again = (measure(trial(checkpointing=c, microbatch_size=24)) for c in (False, True))
    assert again.provenance.method == "blocks"
    assert stds(again) == pytest.approx(stds(plain), rel=1e-6)


def test_profile_survives_json(measure: Measure) -> None:
    profile = measure(trial(pairwise=True))
    assert GradientProfile.model_validate_json(profile.model_dump_json(indent=1)) == profile
    assert set(profile.pairs) == set(profile.folds[0].pairs) == set(profile.by_module_type())


# ---- the cache --------------------------------------------------------------------------------


@pytest.fixture
def forwards(loaded: tuple[Base, TrialData]) -> Any:
    seen: list[int] = []
    handle = loaded[0].model.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


def test_cached_profile_is_not_measured_again(
    measure: Measure, forwards: list[int], tmp_path: Path
) -> None:
    first = measure(trial(), cache=ProfileCache(tmp_path))
    measured = len(forwards)
    assert measured > 0
    assert measure(trial(), cache=ProfileCache(tmp_path)) == first
    assert len(forwards) == measured


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[: len(text) // 2], id="cut short"),
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: text.replace('"mean_loss": 0', '"mean_loss": 1'), id="edited"),
        pytest.param(lambda text: text.replace('"seed": 0', '"seed": 1'), id="provenance edited"),
        pytest.param(lambda text: "\x00" * len(text), id="zeros"),
    ],
)
def test_damaged_entry_is_measured_again_and_replaced(
    measure: Measure,
    forwards: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[str], str],
) -> None:
    cache = ProfileCache(tmp_path)
    first = measure(trial(), cache=cache)
    (file,) = tmp_path.glob("*.json")
    intact = file.read_text()
    assert damage(intact) != intact
    file.write_text(damage(intact))
    before = len(forwards)
    assert measure(trial(), cache=cache) == first
    assert len(forwards) > before
    assert "is damaged and is measured again" in capsys.readouterr().err
    assert file.read_text() == intact


def test_cache_that_cannot_be_written_is_a_warning(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    profile = measure(trial(), cache=ProfileCache(tmp_path / "file" / "profiles"))
    assert len(profile.layers) == 12
    assert "can't be cached" in capsys.readouterr().err


def test_entry_under_another_name_is_not_taken(measure: Measure, tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    measure(trial(), cache=cache)
    (file,) = tmp_path.glob("*.json")
    file.rename(tmp_path / "0123456789abcdef.json")
    assert cache.load("0123456789abcdef") is None


def test_whatever_decides_the_numbers_has_an_entry_of_its_own(
    measure: Measure, loaded: tuple[Base, TrialData], tmp_path: Path, monkeypatch: Any
) -> None:
    cache, config = ProfileCache(tmp_path), trial()

    def num_entries_with(config: TrialConfig) -> int:
        measure(config, cache=cache)
        return len(list(tmp_path.glob("*.json")))

    assert num_entries_with(config) == 1
    assert num_entries_with(config) == 1
    assert num_entries_with(config.model_copy(update={"seed": 1})) == 2
    assert num_entries_with(trial(num_samples=25)) == 3
    query = config.adapter.model_copy(update={"target_modules": ("query",)})
    assert num_entries_with(config.model_copy(update={"adapter": query})) == 4
    weight = loaded[0].model.get_submodule("bert.encoder.layer.0.attention.self.query").weight
    base, data = loaded
    with torch.no_grad():
        weight[0, 0] += 1.0
        changed = replace(base, fingerprint=weights_fingerprint(base.model, skip=base.head))
        measure_profile(changed, data, config, cache=cache)
        weight[0, 0] -= 1.0
    assert len(list(tmp_path.glob("*.json"))) == 5
    monkeypatch.setattr("e2lora.profile.maths_version", lambda: "another")
    assert num_entries_with(config) == 6


def test_options_of_the_plan_share_one_profile(measure: Measure, tmp_path: Path) -> None:
    cache, config = ProfileCache(tmp_path), trial()
    for r in (2, 8):
        plan = config.plan.model_copy(update={"r": r, "allocation": "softmax"})
        measure(config.model_copy(update={"plan": plan}), cache=cache)
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_maths_version_follows_the_code(tmp_path: Path, monkeypatch: Any) -> None:
    (folder,) = e2lora.__path__
    shutil.copytree(folder, tmp_path / "e2lora")
    before = maths_version()
    monkeypatch.setattr(e2lora, "__path__", [str(tmp_path / "e2lora")])
    assert maths_version() == before
    for file in ("gradients/probe", "gradients/recorder", "models", "tasks/sft", "tasks/rows"):
        with (tmp_path / "e2lora" / f"{file}.py").open("a") as source:
            source.write("# changed\n")
        assert maths_version() != before, file
        before = maths_version()


def test_bf16_weights_are_measured_in_float32(measure: Measure, loaded: Any) -> None:
    _, data = loaded
    wide = measure(trial())
    config = trial()
    task = data.task
    narrow = load_base(config.model, task.auto_class, task.num_labels, torch.bfloat16)
    profile = measure_profile(narrow, data, config)
    assert profile.provenance.dtype == "float32"
    assert narrow.model.dtype == torch.bfloat16
    assert stds(profile) == pytest.approx(stds(wide), rel=0.1)
