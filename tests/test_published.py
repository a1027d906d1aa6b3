"""Published scores beside those of studies that are made up here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from e2lora.config import (
    AdapterConfig,
    AnyTaskConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    TrainConfig,
    TrialConfig,
    task_preset,
)
from e2lora.published import BENCHMARKS, is_task
from e2lora.reproduction import published_tables
from e2lora.scored import Scored, Section
from e2lora.tables import Table

GLUE = ("cola", "sst2", "mrpc", "rte", "stsb")
SCORE = Objective(name="score", direction="maximize")
LLAMA = "meta-llama/Llama-3.1-8B"
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_section(
    task: AnyTaskConfig,
    values: Mapping[tuple[str, int], float],
    model: str = "FacebookAI/roberta-base",
    targets: tuple[str, ...] = ("query", "value"),
    metric: Objective = SCORE,
    runs: Mapping[int, Mapping[int, float]] | None = None,
    **plan: Any,
) -> Section:
    """Trials by topology and number of parameters; ``runs``: of a trial, its score by seed."""
    trials: list[Scored] = []
    over_seeds: list[Scored] = []
    for number, ((topology, parameters), value) in enumerate(values.items()):
        config = TrialConfig(
            model=ModelConfig(name=model),
            task=task,
            adapter=AdapterConfig(target_modules=targets),
            plan=PlanConfig.model_validate({"topology": topology, **plan}),
            training=TrainConfig(max_steps=500, learning_rate=1e-3),
        )
        trials.append(Scored(number, config, value, parameters, 1.0))
        for seed, score in (runs or {}).get(number, {}).items():
            own = config.model_copy(update={"seed": seed})
            run = Scored(
                len(over_seeds), own, score, parameters, 1.0, origin="seeds", chosen=number
            )
            over_seeds.append(run)
    return Section(model, task.display_name, metric, tuple(trials), runs=tuple(over_seeds))


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_published_rows_are_those_of_the_tables() -> None:
    """Written out again, from the method's section on figures to reproduce."""
    told = {
        (b.title.split(" on ")[-1].split(",")[0], row.printed): (row.parameters, row.value)
        for b in BENCHMARKS
        for row in b.rows
    }
    assert told["GLUE", "LoRA"] == (0.30e6, 85.87)
    assert told["GLUE", "E²LoRA"] == (0.16e6, 85.57)
    assert told["GLUE", "ShareLoRA"] == (0.16e6, 84.99)
    assert told["GLUE", "FFT"] == (None, 86.14)
    assert [value for (name, _), (_, value) in told.items() if name == "GSM8K"] == [
        *(70.21, 67.58, 70.51, 70.51, 71.19, 70.26, 69.45, 71.19, 66.67, 67.57)
    ]
    assert [value for (name, _), (_, value) in told.items() if name == "HumanEval"] == [
        *(42.68, 43.69, 44.31, 44.71)
    ]
    assert [round(row.value, 2) for row in BENCHMARKS[3].rows] == [89.08, 88.75, 89.81, 89.73]


def test_average_is_over_all_tasks_of_the_benchmark() -> None:
    scores = {"cola": 0.62, "sst2": 0.94, "mrpc": 0.88, "rte": 0.76, "stsb": 0.90}
    sections = [
        make_section(task_preset(f"glue/{name}"), {("none", 294_912): scores[name]})
        for name in GLUE
    ]
    (table,) = published_tables(sections, [{}] * 5)
    row = rows_of(table)["LoRA"]
    assert (row["published"], row["measured"], row["size"]) == ("85.87", "82.00 (1)", "0.29M")
    assert row["difference"] == "-3.87"
    assert rows_of(table)["E²LoRA"]["remarks"] == "not in this study"
    assert any("validation rows" in note for note in table.notes)
    assert any("one seed" in note for note in table.notes)
    assert any("500 steps of 16" in note and "fp32" in note for note in table.notes)


def test_average_without_all_tasks_is_not_given_and_the_missing_are_named() -> None:
    sections = [
        make_section(task_preset(f"glue/{name}"), {("none", 294_912): 0.8}) for name in GLUE[:3]
    ]
    (table,) = published_tables(sections, [{}] * 3)
    row = rows_of(table)["LoRA"]
    assert (row["published"], row["measured"]) == ("85.87", "")
    assert any("no average: glue/rte, glue/stsb" in note for note in table.notes)


def test_e2_sharelora_on_roberta_is_shown_as_no_target() -> None:
    section = make_section(task_preset("glue/cola"), {("none", 294_912): 0.6})
    (table,) = published_tables([section], [{}])
    assert "not to be aimed at: 0.08M contradicts" in rows_of(table)["E²ShareLoRA"]["remarks"]


def test_row_takes_the_trial_of_its_size_and_no_other() -> None:
    values = {("none", 6_815_744): 0.70, ("none", 3_407_872): 0.66, ("e2", 900_000): 0.60}
    section = make_section(
        *(task_preset("gsm8k"), values, LLAMA, QKVO),
        metric=Objective(name="exact_match", direction="maximize"),
    )
    (table,) = published_tables([section], [{}])
    rows = rows_of(table)
    assert rows["LoRA"]["measured"] == "70.00 (1)"
    assert rows["LoRA, r = 4"]["measured"] == "66.00 (1)"
    assert rows["E²LoRA"]["remarks"] == "not at this size: has 900,000"
    assert not any("Adapters on" in note for note in table.notes)


def test_size_that_misses_the_published_one_is_a_remark() -> None:
    values = {("none", 6_100_000): 0.7}
    section = make_section(
        *(task_preset("gsm8k"), values, LLAMA, ("q_proj", "v_proj")),
        metric=Objective(name="exact_match", direction="maximize"),
    )
    (table,) = published_tables([section], [{}])
    assert rows_of(table)["LoRA"]["remarks"] == "-11 % parameters; r = 8"
    assert "Adapters on q_proj, v_proj here" in " ".join(table.notes)


def test_test_rows_over_seeds_are_preferred_to_validation_rows() -> None:
    section = make_section(
        *(task_preset("gsm8k"), {("none", 6_815_744): 0.9}, LLAMA, QKVO),
        metric=Objective(name="exact_match", direction="maximize"),
        runs={0: {0: 0.8, 1: 0.8, 2: 0.8}},
    )
    tests = {number: {"exact_match": 0.60 + 0.02 * number} for number in range(3)}
    (table,) = published_tables([section], [tests])
    assert rows_of(table)["LoRA"]["measured"] == "62.00 ± 2.00 (3)"
    assert not any("validation rows" in note for note in table.notes)


def test_humaneval_needs_programs_that_were_run() -> None:
    """A search on CodeAlpaca looks at the likelihood; pass@1 comes with the test rows."""
    section = make_section(
        *(task_preset("codealpaca"), {("none", 6_815_744): 0.9}, LLAMA, QKVO),
        metric=Objective(name="nll", direction="minimize"),
        runs={0: {0: 0.8}},
    )
    (table,) = published_tables([section], [{}])
    assert rows_of(table)["LoRA"]["remarks"] == "no pass_at_1 yet: the search looks at nll"
    (table,) = published_tables([section], [{0: {"nll": 0.8, "pass_at_1": 0.41}}])
    assert rows_of(table)["LoRA"]["measured"] == "41.00 (1)"


@pytest.mark.parametrize(
    ("name", "changes", "is_it"),
    [
        ("glue/cola", {}, True),
        ("glue/cola", {"data": "/data/glue_cola", "subset": None}, True),
        ("glue/cola", {"data": "/data/glue", "subset": "cola"}, True),
        ("glue/sst2", {}, False),
        ("glue/mrpc", {"data": "/data/cola"}, False),
    ],
)
def test_task_is_known_by_its_rows(name: str, changes: dict[str, Any], is_it: bool) -> None:
    source = BENCHMARKS[0].sources["glue/cola"]
    assert is_task(task_preset(name, **changes), "glue/cola", source) == is_it


def test_model_and_task_must_both_match() -> None:
    other = make_section(task_preset("glue/cola"), {("none", 1000): 0.6}, model="roberta-large")
    assert published_tables([other], [{}]) == []
    empty = Section("FacebookAI/roberta-base", "nyu-mll/glue/cola", SCORE, ())
    assert published_tables([empty], [{}]) == []
