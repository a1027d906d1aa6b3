"""A report of a study that is made up here, on disk, so that what it must say is known."""

from __future__ import annotations

import base64
import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2lora.adapters import count_adapter_parameters
from e2lora.config import (
    AdapterConfig,
    AnyTaskConfig,
    ModelConfig,
    Objective,
    PlanConfig,
    SftConfig,
    TextClassificationConfig,
    TrainConfig,
    TrialConfig,
)
from e2lora.moments import GradientProfile, LayerGradient, Moments, Provenance, Target
from e2lora.plan import build_plan
from e2lora.records import StudyFolder, StudyRecord, TrialResult, write_json
from e2lora.report import metric_of, render_report

MODEL, TASK = ModelConfig(name="tiny-encoder"), TextClassificationConfig(data="reviews")
ACCURACY = Objective(name="accuracy", direction="maximize")
SIZE = Objective(name="adapter_parameters", direction="minimize")
TARGETS = tuple(
    Target(
        path=f"encoder.layer.{layer}.attention.self.{name}",
        module_type=f"encoder.layer.*.attention.self.{name}",
        layer=layer,
        in_features=384,
        out_features=384,
    )
    for layer in range(6)
    for name in ("query", "value")
)
SIGMAS = {"query": (1, 1.1, 2.4, 2.2, 5, 1.2), "value": (9, 8, 7.5, 3, 2.8, 2.5)}
LORA: dict[str, Any] = {"topology": "none"}
SHARED_A: dict[str, Any] = {"topology": "none", "a_scope": "type"}
ALL: dict[str, Any] = {"topology": "all"}
BLOCKS: dict[str, Any] = {"topology": "blocks", "block_size": 2}
E2: dict[str, Any] = {"topology": "e2"}


def make_profile() -> GradientProfile:
    provenance = Provenance(
        model=MODEL.name,
        model_fingerprint="0" * 16,
        task=TASK.data,
        num_samples=256,
        num_supervised=256,
        seed=0,
        dtype="float32",
        mean_loss=0.7,
        method="blocks",
        num_workers=1,
        versions={},
    )
    layers = tuple(
        LayerGradient(
            target=target,
            moments=Moments(
                count=384 * 384,
                mean=0.0,
                std=SIGMAS[target.path.rpartition(".")[2]][target.layer] * 1e-4,
                mean_abs=1e-4,
            ),
        )
        for target in TARGETS
    )
    return GradientProfile(provenance=provenance, layers=layers)


class MadeUpStudy:
    """Writes a study's folder trial by trial."""

    def __init__(self, storage: Path, objectives: Sequence[Objective] = (ACCURACY, SIZE)) -> None:
        self.folder = StudyFolder(storage, "made-up")
        self.profile = make_profile()
        self.num_trials = 0
        record = StudyRecord(
            name="made-up",
            space="quickstart",
            models=(MODEL,),
            tasks=(TASK,),
            objectives=tuple(objectives),
            budgets=(4, 8),
            seeds=(0,),
        )
        write_json(self.folder.record_file, record)
        write_json(self.folder.profiles / "profile.json", self.profile)

    def add(
        self,
        topology: dict[str, Any],
        r: int = 8,
        outcomes: Sequence[float] | None = None,
        outcome: str = "accuracy",
        metrics: dict[str, float] | None = None,
        error: str | None = None,
        ended: bool = True,
        lr: float = 1e-3,
        model: ModelConfig = MODEL,
        task: AnyTaskConfig = TASK,
    ) -> int:
        """A trial with these outcomes; its accuracy is their mean unless ``metrics`` are given."""
        number, self.num_trials = self.num_trials, self.num_trials + 1
        options = {k: v for k, v in topology.items() if k not in ("a_scope", "family")}
        family = topology.get("family", "lora")
        adapter = AdapterConfig(
            family=family,
            target_modules=() if family == "full" else ("query", "value"),
            a_scope=topology.get("a_scope", "interval"),
        )
        config = TrialConfig(
            model=model,
            task=task,
            adapter=adapter,
            plan=PlanConfig(r=r, **options),
            training=TrainConfig(max_steps=100, learning_rate=lr),
        )
        trial = self.folder.trial(number)
        write_json(trial.config_file, config)
        plan = build_plan(TARGETS, config.plan, self.profile)
        write_json(trial.plan_file, plan)
        if outcomes is not None:
            write_json(trial.outcomes_file, {outcome: [float(x) for x in outcomes]})
            metrics = metrics or {"accuracy": float(np.mean(outcomes))}
        result = TrialResult(
            number=number,
            state="failed" if error else "complete",
            metrics=metrics or {},
            adapter_parameters=count_adapter_parameters(plan, adapter) or 22_713_216,
            head_parameters=770,
            seconds=80.0 + number,
            attempts=1,
            error=error,
        )
        if ended:
            write_json(trial.result_file, result)
        return number


@pytest.fixture
def study(tmp_path: Path) -> MadeUpStudy:
    return MadeUpStudy(tmp_path)


def right(n: int, of: int = 400) -> list[float]:
    """The first ``n`` items right, the others wrong."""
    return [1.0] * n + [0.0] * (of - n)


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, (words, text)
    return found[0]


def test_equal_outcomes_are_no_significant_difference(study: MadeUpStudy) -> None:
    for topology in (LORA, ALL, E2):
        study.add(topology, outcomes=right(300))
    verdict = render_report(study.folder).verdict
    for other in ("- LoRA", "- all-shared"):
        line = line_with(verdict, other)
        assert "no significant difference" in line
        assert "difference +0.0000" in line
    assert "significantly" not in verdict


def test_planted_gap_is_found_with_its_direction_and_only_it(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(320))
    study.add(LORA, outcomes=right(318))
    study.add(ALL, outcomes=right(260))
    study.add(BLOCKS, outcomes=right(380))
    verdict = render_report(study.folder).verdict
    assert "E²LoRA is significantly better" in line_with(verdict, "- all-shared")
    assert "difference +0.1500" in line_with(verdict, "- all-shared")
    assert "E²LoRA is significantly worse" in line_with(verdict, "- blocks(2)")
    # 2 discordant items, both for E²LoRA: McNemar's p is 0.5, and the largest of three stays so.
    assert "p = 0.500, adjusted p = 0.500" in line_with(verdict, "- LoRA")
    assert "no significant difference" in line_with(verdict, "- LoRA")


def test_p_values_are_adjusted_over_all_base_ranks(study: MadeUpStudy) -> None:
    """7 : 0 discordant items: p = 2/2⁷ = 0.0156, alone significant, among four tests not."""
    for r in (4, 8):
        study.add(E2, r=r, outcomes=right(307))
        study.add(LORA, r=r, outcomes=right(300))
        study.add(ALL, r=r, outcomes=right(300))
    verdict = render_report(study.folder).verdict
    assert verdict.count("p = 0.016, adjusted p = 0.062: no significant difference") == 4


def test_only_equal_base_ranks_are_compared(study: MadeUpStudy) -> None:
    study.add(E2, r=8, outcomes=right(300))
    study.add(LORA, r=4, outcomes=right(200))
    verdict = render_report(study.folder).verdict
    assert "Base rank 4: E²LoRA has no complete trial" in verdict
    assert "Base rank 8: no other system has a complete trial" in verdict
    assert "adjusted p" not in verdict


def test_best_trial_of_each_system_enters_and_the_numbers_of_trials_are_named(
    study: MadeUpStudy,
) -> None:
    study.add(E2, outcomes=right(300))
    study.add(LORA, outcomes=right(200), lr=1e-4)
    study.add(LORA, outcomes=right(310), lr=3e-4)
    verdict = render_report(study.folder).verdict
    line = line_with(verdict, "- LoRA")
    assert "best of 2; 73,728 parameters; 0.7750" in line
    assert "difference -0.0250" in line
    assert "Complete trials per system: E²LoRA 1, LoRA 2." in verdict
    assert "With one seed" in verdict
    assert "different numbers of adapter parameters" in verdict


def test_outcomes_of_different_rows_are_not_paired(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(300))
    study.add(LORA, outcomes=right(100, of=200))
    study.add(ALL, outcomes=right(200), task=TASK.model_copy(update={"split_seed": 1}))
    study.add(BLOCKS, metrics={"accuracy": 0.5})
    verdict = render_report(study.folder).verdict
    assert "not compared, since the two were scored on 400 and 200 items" in verdict
    assert "rows may differ (in split_seed)" in line_with(verdict, "- all-shared")
    assert "trial 3 has no outcomes" in line_with(verdict, "- blocks(2)")
    assert "significant difference" not in verdict


def test_texts_may_be_cut_differently_but_not_the_answers_that_are_scored(tmp_path: Path) -> None:
    nll = Objective(name="nll", direction="minimize")
    study, means = MadeUpStudy(tmp_path, objectives=(nll, SIZE)), [1.25] * 40
    cut_text = TASK.model_copy(update={"max_length": 64})
    answers = SftConfig(data=TASK.data)
    cut_answers = answers.model_copy(update={"max_length": 64})
    tasks = {4: (TASK, cut_text), 8: (answers, cut_answers), 16: (answers, TASK)}
    for r, (one, other) in tasks.items():
        study.add(E2, r=r, outcomes=means, metrics={"nll": 1.25}, task=one)
        study.add(LORA, r=r, outcomes=means, metrics={"nll": 1.25}, task=other)
    verdict = render_report(study.folder).verdict
    compared, cut, unlike = (line for line in verdict.splitlines() if line.startswith("- LoRA"))
    assert "no significant difference" in compared
    assert "rows may differ (in max_length)" in cut
    assert "rows may differ (in kind)" in unlike


def test_failed_trial_is_listed_with_its_error_and_never_scored(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(200))
    failed = study.add(LORA, outcomes=right(400), error="ValueError: the rank\nis <too> large")
    report = render_report(study.folder)
    line = line_with(report.table, "not scored")
    assert f"trial {failed}, LoRA r=8: ValueError: the rank is <too> large" in line
    assert "1 complete, 1 failed" in report.verdict
    assert "1.0000" not in report.table + report.verdict
    assert "is &lt;too&gt; large" in report.html.read_text(encoding="utf-8")
    rows = {row["trial"]: row for row in csv.DictReader(report.csv.open(encoding="utf-8"))}
    assert (rows["0"]["front"], rows["1"]["front"]) == ("1", "")
    assert rows["1"]["error"].startswith("ValueError")


def test_complete_trial_without_the_metric_is_not_scored(study: MadeUpStudy) -> None:
    study.add(LORA, metrics={"loss": 0.1})
    assert "complete, but without 'accuracy'" in render_report(study.folder).table


def test_study_without_a_complete_trial_says_so(study: MadeUpStudy) -> None:
    empty = render_report(study.folder, trials_planned=12)
    assert "0 of 12 planned trials have ended" in empty.verdict
    assert "nothing to compare" in empty.verdict
    study.add(LORA, ended=False)
    study.add(E2, error="RuntimeError: lost")
    report = render_report(study.folder, trials_planned=12)
    assert "1 failed; 1 running or interrupted" in report.verdict
    assert "No trial is complete yet" in report.table
    assert "No trial is complete yet" in report.html.read_text(encoding="utf-8")
    # A profile is there before any trial: its picture is shown, the others can't be.
    assert [file.name for file in report.pictures] == ["similarity.png"]


def test_unfinished_study_is_called_interim_and_a_finished_one_not(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300))
    assert "interim" in render_report(study.folder, trials_planned=2).verdict
    assert "interim" not in render_report(study.folder, trials_planned=1).verdict


def test_html_holds_every_picture_inline_and_names_no_other_file(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300))
    study.add(E2, outcomes=right(310))
    report = render_report(study.folder)
    assert [file.name for file in report.pictures] == ["pareto.png", "plans.png", "similarity.png"]
    html = report.html.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]+)"', html)
    inline = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert inline == [file.read_bytes() for file in report.pictures]
    assert all(picture.startswith(b"\x89PNG") for picture in inline)
    assert not re.search(r'(href|src)="(?!data:)', html)


def test_names_cannot_become_markup(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300), model=ModelConfig(name="<script>"))
    html = render_report(study.folder).html.read_text(encoding="utf-8")
    assert "&lt;script&gt; on reviews" in html
    assert "<script>" not in html


def test_front_members_are_marked_in_the_table(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300))  # the largest, and worse than E²LoRA
    study.add(E2, outcomes=right(310))
    study.add(ALL, outcomes=right(200))  # the smallest
    lines = render_report(study.folder).table.splitlines()
    systems = [line for line in lines if "1e-03" in line or "0.001" in line]
    assert [line.split()[:2] for line in systems] == [
        ["*", "all-shared"],
        ["*", "E²LoRA"],
        ["LoRA", "8"],
    ]


def test_table_has_wilson_intervals_of_the_outcomes(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(50, of=100))
    assert "0.5000 (0.404–0.596)" in render_report(study.folder).table


def test_metric_that_is_no_proportion_gets_no_interval_and_a_permutation_test(
    tmp_path: Path,
) -> None:
    error = Objective(name="mean_error", direction="minimize")
    study = MadeUpStudy(tmp_path, objectives=(SIZE, error))
    errors = np.random.default_rng(0).uniform(1, 2, 60)
    means = {"mean_error": float(errors.mean())}
    study.add(E2, outcomes=errors.tolist(), outcome="mean_error", metrics=means)
    more = {"mean_error": float(errors.mean()) + 0.5}
    study.add(LORA, outcomes=(errors + 0.5).tolist(), outcome="mean_error", metrics=more)
    report = render_report(study.folder)
    assert "95 % interval" not in report.table
    line = line_with(report.verdict, "- LoRA")
    assert "permutation" in line
    assert "E²LoRA is significantly better" in line  # its errors are smaller
    assert line_with(report.table, "E²LoRA").startswith("*")
    assert not line_with(report.table, " LoRA").startswith("*")


def test_metric_that_is_no_mean_over_rows_is_not_what_the_test_speaks_of(tmp_path: Path) -> None:
    study = MadeUpStudy(tmp_path, objectives=(SIZE, Objective(name="mcc", direction="maximize")))
    study.add(E2, outcomes=right(390), metrics={"mcc": 0.3})
    study.add(LORA, outcomes=right(200), metrics={"mcc": 0.4})
    report = render_report(study.folder)
    line = line_with(report.verdict, "- LoRA")
    assert "significantly higher in accuracy (mcc has no value per item)" in line
    assert "95 % interval" not in report.table


def test_models_and_tasks_are_never_mixed(study: MadeUpStudy) -> None:
    other = ModelConfig(name="other-encoder")
    study.add(E2, outcomes=right(300))
    study.add(LORA, outcomes=right(100), model=other)
    study.add(
        LORA, outcomes=right(100), task=TextClassificationConfig(data="reviews", subset="long")
    )
    report = render_report(study.folder)
    for title in ("tiny-encoder on reviews", "other-encoder on reviews", "on reviews/long"):
        assert title in report.table
        assert title in report.verdict
    assert "adjusted p" not in report.verdict
    assert {"pareto.png", "pareto-2.png", "pareto-3.png"} <= {f.name for f in report.pictures}


def test_majority_baseline_is_shown_where_trials_report_it(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300), metrics={"accuracy": 0.75, "majority_baseline": 0.51})
    assert "majority baseline: 0.5100" in render_report(study.folder).table
    study.add(LORA, outcomes=right(300))
    assert "majority baseline" not in render_report(study.folder).table


def test_metric_is_the_first_to_maximize_besides_the_size() -> None:
    record = StudyRecord(
        name="s", space="s", models=(), tasks=(), objectives=(SIZE,), budgets=(), seeds=()
    )
    with pytest.raises(ValueError, match="objective besides 'adapter_parameters'"):
        metric_of(record)
    loss = Objective(name="loss", direction="minimize")
    assert metric_of(record.model_copy(update={"objectives": (SIZE, loss)})) == loss
    assert metric_of(record.model_copy(update={"objectives": (loss, SIZE, ACCURACY)})) == ACCURACY


def test_folder_without_a_study_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing here"):
        render_report(StudyFolder(tmp_path, "nothing here"))


def test_full_fine_tuning_has_no_rank_and_stands_beside_e2lora_at_each(study: MadeUpStudy) -> None:
    for r in (4, 8):
        study.add({"topology": "e2"}, r=r, outcomes=right(300))
    for r, n in ((4, 310), (16, 305)):
        study.add({"family": "full"}, r=r, outcomes=right(n))
    report = render_report(study.folder)
    rows = [line for line in report.table.splitlines() if " FFT " in line]
    assert len(rows) == 2
    assert all(line.split("FFT")[1].split()[0] == "–" for line in rows)
    compared = [line for line in report.verdict.splitlines() if line.startswith("- FFT")]
    assert len(compared) == 2, "with E²LoRA at 4 and at 8"
    assert all("best of 2; 22,713,216 parameters; 0.7750" in line for line in compared)
    assert "Base rank 16" not in report.verdict
