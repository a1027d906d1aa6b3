"""``jobs/plan.py`` as a user runs it: words, files, tables, pictures, and the cost beforehand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from e2lora.assets import resolve
from e2lora.config import CalibrationConfig, SftConfig, TextClassificationConfig
from e2lora.moments import GradientProfile
from e2lora.plan import SharingPlan
from e2lora.planning.entry import Words, calibration_of, plans_of, request_of, task_of
from e2lora.profile_cache import ProfileCache
from tests.conftest import ROOT

SMALL = ["--calibration", "num_samples=16", "num_folds=2"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Any:
    """Run the job with these arguments; returns its exit code, output and errors."""
    monkeypatch.setattr("e2lora.planning.ProfileCache", lambda: ProfileCache(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(ROOT / "jobs"), *sys.path])
    import plan as job

    def run(*arguments: str) -> tuple[int, str, str]:
        code = job.main(["--out", str(tmp_path / "out"), *arguments])
        return code, *capsys.readouterr()

    return run


# ---- words ------------------------------------------------------------------------------------


def test_words_become_plans_by_preset_or_topology() -> None:
    plans = plans_of(
        [
            ["e2"],
            ["e2_published", "r=16"],
            ["blocks", "block_size=2"],
            ["lss_only", "budget=layer"],
        ],
        CalibrationConfig(num_samples=32),
    )
    assert list(plans) == [
        "e2",
        "e2_published r=16",
        "blocks block_size=2",
        "lss_only budget=layer",
    ]
    published = plans["e2_published r=16"]
    assert (published.similarity, published.allocation, published.r) == (
        "rmi_literal",
        "literal",
        16,
    )
    assert plans["blocks block_size=2"].block_size == 2
    assert {options.calibration.num_samples for options in plans.values()} == {32}


def test_explicit_groups_can_be_written_as_json() -> None:
    groups = json.dumps([{"module": "query", "layers": [0, 1]}, {"module": "query", "layers": [2]}])
    (options,) = plans_of([["explicit", f"groups={groups}"]], CalibrationConfig()).values()
    assert [group.layers for group in options.groups or ()] == [(0, 1), (2,)]


def test_what_is_long_may_stand_in_a_file_and_has_a_short_label(tmp_path: Path) -> None:
    groups = [{"module": "query", "layers": [k]} for k in range(12)]
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    plans = plans_of([["explicit", f"groups=@{tmp_path}/groups.json"]], CalibrationConfig())
    ((label, options),) = plans.items()
    assert len(options.groups or ()) == 12
    assert label.startswith("explicit-")
    assert len(label) < 20


def test_pairs_are_measured_for_all_where_one_plan_needs_them() -> None:
    plans = plans_of([["e2"], ["e2", "similarity=cosine"]], CalibrationConfig())
    assert all(options.calibration.pairwise for options in plans.values())
    assert len({options.calibration.fingerprint() for options in plans.values()}) == 1


def test_words_become_tasks() -> None:
    task = task_of(["sft", "data=openai/gsm8k", "subset=main", "prompt_column=question"])
    assert task == SftConfig(data="openai/gsm8k", subset="main", prompt_column="question")
    assert isinstance(task_of(["text_classification", "data=x"]), TextClassificationConfig)
    known = r"kind of task \(text_classification, .*\) or a preset \(.*glue/cola.*\)"
    with pytest.raises(ValueError, match=rf"{known}; got 'stf'"):
        task_of(["stf", "data=x"])
    with pytest.raises(ValueError, match=r"no option 'textcolumn'; known: .*text_column"):
        task_of(["text_classification", "data=x", "textcolumn=y"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([["zigzag"]], "begins with a preset .*e2_published.*zigzag"),
        ([["e2", "similarty=kl"]], "no option 'similarty'; known: .*similarity"),
        ([["e2", "r=eight"]], "eight"),
        ([["e2", "r"]], "KEY=VALUE"),
        ([["e2", "r=4", "r=8"]], "each key once; got 'r=8'"),
        ([["e2"], ["e2"]], "must differ"),
        ([["e2"], ["e2", "r=8"]], "must differ"),
        ([["e2", "topology=none"]], "first word"),
        ([["e2", "calibration=3"]], "use --calibration"),
        ([["explicit", "groups=[{]"]], "must be JSON"),
        ([["blocks"]], "block_size"),
    ],
)
def test_wrong_words_are_refused(wanted: list[list[str]], message: str) -> None:
    with pytest.raises((ValueError, ValidationError), match=message):
        plans_of(wanted, CalibrationConfig())


def test_what_is_not_said_is_as_in_the_spaces_first_point() -> None:
    request = request_of(Words("search_spaces.quickstart"))
    assert request.model.name == "demo:minilm-l6"
    assert request.adapter.target_modules == ("query", "value")
    assert list(request.plans) == ["e2"]
    assert calibration_of(["num_folds=2"], CalibrationConfig()) == CalibrationConfig(num_folds=2)


# ---- the job ----------------------------------------------------------------------------------


def test_one_plan_leaves_profile_plan_table_and_pictures(plan: Any, tmp_path: Path) -> None:
    code, out, _ = plan(*SMALL)
    assert code == 0
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"profile.json", "plan.json", "entropy.png", "similarity.png", "ranks.png"}
    for picture in (tmp_path / "out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    profile = GradientProfile.model_validate_json((tmp_path / "out/profile.json").read_text())
    written = SharingPlan.model_validate_json((tmp_path / "out/plan.json").read_text())
    assert written.profile_fingerprint == profile.fingerprint()
    assert [fold.num_samples for fold in profile.folds] == [8, 8]
    assert f"{written.parameters:,}" in out
    assert "between 2 folds of 8 samples" in " ".join(out.split())
    assert all(
        len(line) <= 120 for line in out.splitlines() if not line.startswith(("json", "png"))
    )
    assert "attention.self.query" in out


def test_several_options_stand_side_by_side_on_one_profile(plan: Any, tmp_path: Path) -> None:
    options = ["--plan", "e2", "--plan", "e2", "similarity=cosine", "--plan", "strided", "stride=2"]
    code, out, _ = plan(*SMALL, *options)
    assert code == 0
    plans = sorted(file.name for file in (tmp_path / "out").glob("plan*.json"))
    assert plans == ["plan-e2-similarity-cosine.json", "plan-e2.json", "plan-strided-stride-2.json"]
    table = out[out.index("Jaccard (chance)") :]
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["e2", "e2", "strided"]


def test_second_run_measures_nothing_and_says_the_same(plan: Any, tmp_path: Path) -> None:
    _, first, told = plan(*SMALL)
    assert "microbatch" in told
    _, again, told = plan(*SMALL)
    assert again == first
    assert "microbatch" not in told


def test_existing_profile_is_planned_from_without_the_model(plan: Any, tmp_path: Path) -> None:
    plan(*SMALL)
    profile = shutil.copy(tmp_path / "out/profile.json", tmp_path / "kept.json")
    code, out, told = plan("--profile", str(profile), "--plan", "hra_only", "r=4")
    assert code == 0
    assert "hra_only r=4: HRA only, r=4" in out
    assert "loading" not in told


def test_options_that_the_profile_does_not_suit_exit_with_2_and_say_why(
    plan: Any, tmp_path: Path
) -> None:
    plan(*SMALL)
    profile = str(shutil.copy(tmp_path / "out/profile.json", tmp_path / "kept.json"))
    code, _, told = plan("--profile", profile, "--plan", "e2", "similarity=l2")
    assert code == 2
    assert "no pairs of layers" in told
    code, _, told = plan("--targets", "qury")
    assert code == 2
    assert "'qury' matches none" in told
    code, _, told = plan("--profile", str(tmp_path / "absent.json"))
    assert code == 2
    assert "absent.json is not: No such file" in told
    code, _, told = plan("--profile", str(tmp_path / "out/plan.json"))
    assert code == 2
    assert "a plan.json can't be planned from" in told
    assert len(told) < 600


def test_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    plan: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, _, told = plan(*SMALL, "--out", str(tmp_path / "file"))
    assert code == 2
    assert "--out must be a folder" in told
    assert "microbatch" not in told


def test_plans_of_an_earlier_run_do_not_stay_beside_new_ones(plan: Any, tmp_path: Path) -> None:
    plan(*SMALL, "--plan", "e2", "--plan", "lora")
    (tmp_path / "out" / "plan-of-mine.json").write_text("{}")
    plan(*SMALL, "--plan", "e2")
    left = {file.name for file in (tmp_path / "out").glob("plan*.json")}
    assert left == {"plan.json", "plan-of-mine.json"}


def test_profiles_of_other_models_have_folders_of_their_own(
    plan: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    plan(*SMALL)
    profile = GradientProfile.model_validate_json((tmp_path / "out/profile.json").read_text())
    monkeypatch.chdir(tmp_path)
    folders = set()
    for update in ({}, {"seed": 1}, {"model": "other/minilm-l6"}, {"task": "x/vader"}):
        provenance = profile.provenance.model_copy(update=update)
        other = profile.model_copy(update={"provenance": provenance})
        (tmp_path / "other.json").write_text(other.model_dump_json())
        assert plan_in_default_folder("--profile", str(tmp_path / "other.json")) == 0
        folders = set((tmp_path / "results/plans").iterdir())
    assert len(folders) == 4
    assert not any(":" in folder.name for folder in folders)


def plan_in_default_folder(*arguments: str) -> int:
    import plan as job

    return job.main(list(arguments))


def test_plan_without_gradients_is_drawn_where_a_layer_has_none(plan: Any, tmp_path: Path) -> None:
    """E² refuses it; LoRA doesn't need it."""
    plan(*SMALL)
    text = (tmp_path / "out/profile.json").read_text()
    profile = GradientProfile.model_validate_json(text)
    first, *others = profile.layers
    dead = first.model_copy(update={"moments": first.moments.model_copy(update={"std": 0.0})})
    changed = profile.model_copy(update={"layers": (dead, *others)})
    (tmp_path / "dead.json").write_text(changed.model_dump_json())
    assert plan("--profile", str(tmp_path / "dead.json"), "--plan", "lora")[0] == 0
    code, _, told = plan("--profile", str(tmp_path / "dead.json"), "--plan", "e2")
    assert code == 2
    assert "1 got none" in told


def test_option_without_effect_is_noted(plan: Any, tmp_path: Path) -> None:
    plan(*SMALL)
    profile = str(shutil.copy(tmp_path / "out/profile.json", tmp_path / "kept.json"))
    options = ["--plan", "lora", "similarity=cosine", "budget=parameter"]
    code, out, _ = plan("--profile", profile, *options)
    assert code == 0
    assert "note: similarity and budget: without effect on this plan" in out


def test_option_that_a_given_profile_leaves_without_effect_is_refused(plan: Any) -> None:
    code, _, told = plan("--profile", "any.json", "--targets", "query", "--seed", "0")
    assert code == 2
    assert "no effect; got --targets, --seed too" in told


# ---- dry run ----------------------------------------------------------------------------------


@pytest.fixture
def without_weights(tmp_path: Path) -> str:
    """The demo's model, with a weights file that can't be read."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("demo:minilm-l6"), folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"no weights")
    return str(folder)


def test_dry_run_counts_without_touching_weights(plan: Any, without_weights: str) -> None:
    options = ["--plan", "e2", "--plan", "lora", "--plan", "hra_only", "--plan", "e2", "r=16"]
    code, out, _ = plan("--model", without_weights, *SMALL, *options, "--dry-run")
    assert code == 0
    assert "12 targets; 16 rows in 2 folds" in out
    assert "lora: 73,728 LoRA parameters" in out
    assert "hra_only: 73,728 LoRA parameters" in out
    assert "e2: between 12,288 and 73,728 LoRA parameters at r=8, depending on the" in out
    code, _, told = plan("--model", without_weights, *SMALL)
    assert code == 2
    assert "weights must be readable" in told


@pytest.mark.slow
def test_dry_run_promises_what_is_then_measured(plan: Any, tmp_path: Path) -> None:
    """Two of 12 targets a pass: each takes two sums of 384 x 384 x 4 bytes, 1.1 MiB, of 3.1."""
    small = [*SMALL, "microbatch_size=3", "max_held_gib=0.003"]
    _, out, _ = plan(*small, "--dry-run")
    assert "6 microbatch(es), 6 pass(es)" in out
    _, out, told = plan(*small)
    assert "microbatch 36/36" in told
    assert "measured in float32 by accumulators, 6 pass(es)" in out


def test_dry_run_refuses_what_could_not_be_planned(plan: Any) -> None:
    code, _, told = plan("--plan", "e2", "r=400", "--dry-run")
    assert code == 2
    assert "r=400" in told
