"""Every preset is a task that names a metric it has; the documentation lists them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2lora.config import TASK_PRESETS, AnyTaskConfig, require_preset, task_preset
from e2lora.tasks import TASKS

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"


def table_row(name: str) -> str:
    preset, task = TASK_PRESETS[name], TASK_PRESETS[name].task
    trained = f"{task.data}/{task.subset}" if task.subset else task.data
    tested = task.test_split or "–"
    if task.test_data:
        place = f"{task.test_data}/{task.test_subset}" if task.test_subset else task.test_data
        tested = f"{place}, {tested}"
    return f"| `{name}` | {task.kind} | {trained} | {tested} | {preset.metric} |"


@pytest.mark.parametrize("name", TASK_PRESETS)
def test_preset_is_a_task_by_hub_name_and_is_documented(name: str) -> None:
    task = TASK_PRESETS[name].task
    assert task.kind in TASKS
    assert type(task).model_validate_json(task.model_dump_json()) == task
    assert task.data.count("/") == 1, "an organisation's data set"
    if task.test_split and not task.test_data:
        assert task.test_split not in (task.train_split, task.validation_split)
    assert table_row(name) in DOCUMENT.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", TASK_PRESETS)
def test_preset_with_changes_is_that_task_with_them(name: str, tmp_path: Path) -> None:
    changed: AnyTaskConfig = task_preset(name, data=str(tmp_path), subset=None)
    task = TASK_PRESETS[name].task
    differing = {
        field
        for field in type(task).model_fields
        if getattr(task, field) != getattr(changed, field)
    }
    assert differing <= {"data", "subset"}
    assert json.loads(changed.model_dump_json())["data"] == str(tmp_path)


def test_unknown_preset_or_option_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"one of .*glue/cola.*; got 'glue/colla'\. Correct"):
        require_preset("glue/colla")
    with pytest.raises(ValueError, match=r"no option 'max_lenght'; known: .*max_length"):
        task_preset("glue/cola", max_lenght=3)
