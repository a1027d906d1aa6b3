"""A report of a study that is made up on disk, so that what it must say is known."""

from __future__ import annotations

import base64
import csv
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from e2lora.ablation import ablation_table
from e2lora.config import ModelConfig, Objective, TextClassificationConfig, task_preset
from e2lora.gallery import lines_of, points_of, standings_of, winning_plans
from e2lora.records import StudyFolder, StudyRecord, write_json
from e2lora.report import Report, render_report
from e2lora.scored import Section
from e2lora.sections import metric_of, read_study
from e2lora.sensitivity import sensitivity_table
from e2lora.standings import budget_table, trials_table
from e2lora.tables import Table, as_markdown, as_text
from jobs.report import main
from tests.made_up_study import (
    ACCURACY,
    ALL,
    BLOCKS,
    E2,
    FULL,
    HRA,
    KL,
    LORA,
    LSS,
    MATCHED,
    RANDOM,
    SHARED_A,
    SIZE,
    MadeUpStudy,
    line_with,
    right,
)


@pytest.fixture
def study(tmp_path: Path) -> MadeUpStudy:
    return MadeUpStudy(tmp_path, quota=2, budgets=(36_864,))


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of words alone: pictures take most of a report's time."""
    monkeypatch.setattr("e2lora.report.draw_all", lambda *arguments: {})


def section_of(study: MadeUpStudy) -> Section:
    (section,) = read_study(study.folder).sections
    return section


def rows_of(table: Table | None, *keys: str) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows by some of their cells; a cell that says nothing repeats the one above it."""
    assert table is not None
    rows, first = {}, ""
    for row in table.rows:
        first = row[0] or first
        cells = dict(zip(table.header, (first, *row[1:]), strict=True))
        rows[tuple(cells[key] for key in keys)] = cells
    return rows


def csv_of(report: Report) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader(report.csv.open(encoding="utf-8"))
    return {(row["stage"], row["trial"]): row for row in rows}


# ---- which trials count ----------------------------------------------------------------------


@pytest.mark.usefixtures("unpictured")
def test_only_trials_of_full_length_are_scored(study: MadeUpStudy) -> None:
    whole = study.add(E2, outcomes=right(200), budget=36_864)
    study.add(E2, outcomes=right(390), budget=36_864, origin="sampler", state="stopped")
    failed = study.add(
        E2, outcomes=right(400), error="ValueError: the rank\nis <too> large", failure="refused"
    )
    study.add(LORA, metrics={"accuracy": 0.9}, ended=False)
    section = section_of(study)
    assert [t.number for t in section.trials] == [whole]
    assert [(t.number, t.is_effort) for t in section.unscored] == [(1, True), (failed, False)]
    report = render_report(study.folder)
    line = line_with(report.table, f"trial {failed}")
    assert line == f"not scored: trial {failed}, E²LoRA r=8: ValueError: the rank is <too> large"
    assert "stopped early" in line_with(report.table, "trial 1,")
    assert "1 complete, 1 failed (1 refused), 1 stopped early; 1 running" in report.verdict
    assert "0.9750" not in report.table + report.verdict
    assert "is &lt;too&gt; large" in report.html.read_text(encoding="utf-8")
    rows = csv_of(report)
    assert len(rows) == 3, "what has not ended has no line"
    assert [rows["search", n]["front"] for n in "012"] == ["1", "", ""]
    assert rows["search", "2"]["error"].startswith("ValueError")
    assert [rows["search", n]["failure"] for n in "012"] == ["", "", "refused"]


@pytest.mark.usefixtures("unpictured")
def test_trial_without_a_suggestion_is_of_no_quota(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(200), budget=36_864, origin=None)
    section = section_of(study)
    assert section.trials[0].origin == "sampler"
    assert section.cells == ()
    assert "All trials" in render_report(study.folder).markdown.read_text()


def test_diverged_try_is_effort_and_a_lost_one_is_not(study: MadeUpStudy) -> None:
    for topology, failure in ((LORA, "diverged"), (E2, "lost")):
        study.add(topology, outcomes=right(200), budget=36_864)
        study.add(topology, budget=36_864, lr=3e-3, failure=failure, error="no")
    rows = rows_of(budget_table(section_of(study)), "system")
    tries = {system: rows[system,]["tries"] for system in ("LoRA", "E²LoRA")}
    assert tries == {"LoRA": "2 of 2, 1 diverged", "E²LoRA": "1 of 2"}


def test_cell_whose_every_try_diverged_is_still_listed(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(200), budget=36_864)
    study.add(LORA, budget=36_864, failure="diverged", error="no")
    row = rows_of(budget_table(section_of(study)), "system")["LoRA",]
    assert (row["tries"], row["accuracy"]) == ("1 of 2, 1 diverged", "no complete try")


@pytest.mark.usefixtures("unpictured")
def test_complete_trial_without_the_metric_is_not_scored(study: MadeUpStudy) -> None:
    study.add(LORA, metrics={"loss": 0.1})
    assert "complete, but without 'accuracy'" in render_report(study.folder).table


def test_study_without_a_complete_trial_says_so(study: MadeUpStudy) -> None:
    empty = render_report(study.folder, trials_planned=12)
    assert "0 of 12 planned trials have ended" in empty.verdict
    study.add(LORA, ended=False)
    study.add(E2, error="RuntimeError: lost", failure="lost")
    report = render_report(study.folder, trials_planned=12)
    assert "1 failed (1 lost); 1 running or interrupted" in report.verdict
    assert "No trial is complete yet" in report.table
    assert "No trial is complete yet" in report.html.read_text(encoding="utf-8")
    # A profile is there before any trial: its picture is shown, the others can't be.
    assert [file.name for file in report.pictures] == ["similarity.png"]


@pytest.mark.usefixtures("unpictured")
def test_unfinished_study_is_called_interim_and_a_finished_one_not(study: MadeUpStudy) -> None:
    chosen = study.add(LORA, outcomes=right(300))
    assert "interim" in render_report(study.folder, trials_planned=2).verdict
    assert "interim" not in render_report(study.folder, trials_planned=1).verdict
    study.add_run(chosen, 0, ended=False)
    assert "interim" in render_report(study.folder, trials_planned=1).verdict


@pytest.mark.usefixtures("unpictured")
def test_answered_suggestions_are_counted_with_their_reasons(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300))
    answers = [
        {"number": 1, "reason": "the same as trial 0", "params": {"system": "LoRA"}},
        {"number": 2, "reason": "80,000 parameters exceed 73,728", "params": {}},
        {"number": 3, "reason": "90,000 parameters exceed 73,728", "params": {}},
    ]
    write_json(study.folder.path / "answered.json", answers)
    report = render_report(study.folder)
    assert "1 trial(s) have ended" in report.verdict, "an answered suggestion is no trial"
    assert "3 suggestion(s) were answered without training: … parameters exceed … (2)" in (
        report.verdict
    )
    assert "| 3 | 90,000 parameters exceed 73,728 |" in report.markdown.read_text()


def test_folder_without_a_study_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing here"):
        render_report(StudyFolder(tmp_path, "nothing here"))


def test_metric_is_the_first_to_maximize_besides_the_size() -> None:
    record = StudyRecord(
        name="s", space="s", models=(), tasks=(), objectives=(SIZE,), budgets=(), seeds=()
    )
    with pytest.raises(ValueError, match="objective besides 'adapter_parameters'"):
        metric_of(record)
    loss = Objective(name="loss", direction="minimize")
    assert metric_of(record.model_copy(update={"objectives": (SIZE, loss)})) == loss
    assert metric_of(record.model_copy(update={"objectives": (loss, SIZE, ACCURACY)})) == ACCURACY


# ---- the table by budget -----------------------------------------------------------------------


def test_best_of_the_quota_stands_for_its_cell_and_no_freer_trial_does(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(300), budget=36_864, lr=1e-3)
    study.add(E2, outcomes=right(310), budget=36_864, lr=3e-3)
    study.add(E2, outcomes=right(390), budget=36_864, lr=2e-3, origin="sampler")
    row = rows_of(budget_table(section_of(study)), "budget", "system")["36,864", "E²LoRA"]
    assert (row["accuracy"], row["learning rate"], row["tries"]) == ("0.7750", "0.003", "2 of 2")


def test_controls_are_listed_even_where_they_are_missing(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(300), budget=36_864)
    rows = rows_of(budget_table(section_of(study)), "system")
    assert rows["random(E²)",]["accuracy"] == "not in this study"
    assert rows["matched blocks",]["accuracy"] == "not in this study"
    study.add(RANDOM, outcomes=right(290), budget=36_864)
    study.add(MATCHED, outcomes=right(280), budget=36_864)
    rows = rows_of(budget_table(section_of(study)), "system")
    assert rows["random(E²)",]["accuracy"] == "0.7250"
    assert rows["matched blocks",]["accuracy"] == "0.7000"


def test_parameters_that_miss_their_budget_by_more_than_5_percent_say_so(
    study: MadeUpStudy,
) -> None:
    study.add(LORA, r=4, outcomes=right(300), budget=36_864)  # 4 x 12 x 768 = 36,864
    study.add(SHARED_A, r=6, outcomes=right(300), budget=36_864)  # 6 x (2 x 384 + 12 x 384)
    rows = rows_of(budget_table(section_of(study)), "system")
    assert rows["LoRA",]["parameters"] == "36,864"
    assert rows["ShareLoRA-A",]["parameters"] == "32,256 (-12 %)"


@pytest.mark.usefixtures("unpictured")
def test_runs_over_seeds_give_mean_deviation_and_a_t_interval(study: MadeUpStudy) -> None:
    counts = (300, 310, 290, 305, 296)
    chosen = study.add(E2, outcomes=right(320), budget=36_864)
    for seed, count in enumerate(counts):
        study.add_run(chosen, seed, right(count), test_outcomes=right(140 + 2 * seed, of=200))
    study.add_run(chosen, 5, error="lost", failure="lost")
    values = np.array(counts) / 400
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    section = section_of(study)
    assert [sum(run.test_outcomes or ()) for run in section.runs] == [140, 142, 144, 146, 148]
    row = rows_of(budget_table(section), "system")["E²LoRA",]
    assert row["over seeds: mean ± sd (n)"] == f"{values.mean():.4f} ± {values.std(ddof=1):.4f} (5)"
    assert row["95 % interval"] == f"{low:.4f}–{high:.4f}"
    assert (row["accuracy"], row["test"]) == ("0.8000", "0.7200")
    report = render_report(study.folder)
    assert "Over seeds 6 run(s) of chosen configurations have ended: 5 complete, 1 failed" in (
        report.verdict
    )
    assert "Run 5 over seeds (of trial 0, seed 5) is not complete: lost" in (
        report.markdown.read_text()
    )
    rows = csv_of(report)
    assert len(rows) == 7
    run = rows["seeds", "4"]
    assert (run["chosen"], run["seed"], run["origin"]) == ("0", "4", "seeds")
    assert (run["accuracy"], run["test_accuracy"]) == ("0.74", "0.74")
    assert rows["search", "0"]["test_accuracy"] == ""


def test_full_fine_tuning_has_neither_rank_nor_budget(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(300), budget=36_864)
    for r, n in ((4, 310), (16, 305)):
        study.add(FULL, r=r, outcomes=right(n), origin="point")
    row = rows_of(budget_table(section_of(study)), "budget", "system")["none", "FFT"]
    assert (row["r"], row["accuracy"], row["tries"]) == ("–", "0.7750", "2, no quota")
    assert row["parameters"] == "22,713,216"


@pytest.mark.usefixtures("unpictured")
def test_majority_baseline_is_shown_where_trials_report_it(study: MadeUpStudy) -> None:
    study.add(
        LORA,
        outcomes=right(300),
        budget=36_864,
        metrics={"accuracy": 0.75, "majority_baseline": 0.51},
    )
    assert "majority baseline: 0.5100" in render_report(study.folder).table
    study.add(LORA, outcomes=right(300), budget=36_864)
    assert "majority baseline" not in render_report(study.folder).table


# ---- all trials --------------------------------------------------------------------------------


def test_front_members_are_marked_among_all_trials(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300))  # the largest, and worse than E²LoRA
    study.add(E2, outcomes=right(310))
    study.add(ALL, outcomes=right(200))  # the smallest
    rows = rows_of(trials_table(section_of(study)), "system")
    marks = {system: rows[system,][""] for system in ("all-shared", "E²LoRA")}
    assert marks == {"all-shared": "*", "E²LoRA": "*"}
    table = trials_table(section_of(study))
    assert [row[0] for row in table.rows if row[1] == "LoRA"] == [""]
    assert table.strong == {0, 1}


def test_trial_has_the_wilson_interval_of_its_outcomes(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(50, of=100))
    assert "0.5000 (0.404–0.596)" in as_text(trials_table(section_of(study)))


@pytest.mark.usefixtures("unpictured")
def test_metric_that_is_no_proportion_gets_no_interval(tmp_path: Path) -> None:
    error = Objective(name="mean_error", direction="minimize")
    study = MadeUpStudy(tmp_path, objectives=(SIZE, error))
    errors = np.random.default_rng(0).uniform(1, 2, 60)
    for topology, more in ((E2, 0.0), (LORA, 0.5)):
        means = {"mean_error": float(errors.mean()) + more}
        outcomes = (errors + more).tolist()
        study.add(topology, outcomes=outcomes, outcome="mean_error", metrics=means)
    report = render_report(study.folder)
    assert "95 % interval" not in report.table
    assert line_with(report.table, "E²LoRA").startswith("*")
    assert not line_with(report.table, " LoRA").startswith("*")


@pytest.mark.usefixtures("unpictured")
def test_metric_that_is_no_mean_over_rows_gets_no_interval(tmp_path: Path) -> None:
    study = MadeUpStudy(tmp_path, objectives=(SIZE, Objective(name="mcc", direction="maximize")))
    study.add(E2, outcomes=right(390), metrics={"mcc": 0.3})
    assert "95 % interval" not in render_report(study.folder).table


def test_models_and_tasks_are_never_mixed(study: MadeUpStudy) -> None:
    other = ModelConfig(name="other-encoder")
    study.add(E2, outcomes=right(300))
    elsewhere = study.add(LORA, outcomes=right(100), model=other)
    longer = TextClassificationConfig(data="reviews", subset="long")
    study.add(LORA, outcomes=right(100), task=longer)
    study.add_run(elsewhere, 0, right(90))
    report = render_report(study.folder)
    for title in ("tiny-encoder on reviews", "other-encoder on reviews", "on reviews/long"):
        assert title in report.table
        assert title in report.verdict
    assert {"pareto.png", "pareto-2.png", "pareto-3.png"} <= {f.name for f in report.pictures}
    runs = {section.model: len(section.runs) for section in read_study(study.folder).sections[:2]}
    assert runs == {"tiny-encoder": 0, "other-encoder": 1}


# ---- ablation ----------------------------------------------------------------------------------


def test_ablation_names_what_is_changed_and_what_it_costs(study: MadeUpStudy) -> None:
    for topology, n in ((E2, 320), (LSS, 316), (HRA, 300), (KL, 321), (LORA, 290), (BLOCKS, 330)):
        study.add(topology, outcomes=right(n), budget=36_864)
    study.add(
        {
            "topology": "e2",
            "allocation": "softmax",
            "budget": "interval",
            "similarity": "rmi_literal",
        },
        outcomes=right(312),
        budget=36_864,
        origin="point",
    )
    table = ablation_table(section_of(study))
    rows = rows_of(table, "changed")
    assert {
        key[0]: row["difference"].split()[0] for key, row in rows.items() if key[0][0] != "a"
    } == {
        "equal ranks": "-0.0100",
        "no sharing": "-0.0500",
        "no sharing, equal ranks": "-0.0750",
        "similarity kl": "+0.0025",
        "similarity rmi_literal, allocation softmax, ranks by interval": "-0.0200",
    }
    assert rows["as it is",]["system"] == "E²LoRA"
    assert [row["origin"] for row in rows.values()].count("point") == 1
    # Bonett & Price (2012) of 0 won, 20 lost of 400: centre (1 − 21)/402.
    centre = -20 / 402
    half = stats.norm.ppf(0.975) * np.sqrt((22 / 402 - centre**2) / 402)
    interval = f"({centre - half:+.4f} to {centre + half:+.4f})"
    assert rows["no sharing",]["difference"] == f"-0.0500 {interval}"


def test_ablation_is_paired_by_seed_where_there_are_runs(study: MadeUpStudy) -> None:
    e2 = study.add(E2, outcomes=right(320), budget=36_864)
    lss = study.add(LSS, outcomes=right(319), budget=36_864)
    pairs = ((0, 300, 302), (1, 320, 318), (2, 280, 288))
    for seed, one, other in pairs:
        study.add_run(e2, seed, right(one))
        study.add_run(lss, seed, right(other))
    study.add_run(lss, 3, right(10))  # has no partner
    differences = np.array([(other - one) / 400 for _, one, other in pairs])
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    row = rows_of(ablation_table(section_of(study)), "changed")["equal ranks",]
    assert row["difference"] == f"{differences.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def test_study_without_variants_has_no_ablation(study: MadeUpStudy) -> None:
    study.add(E2, outcomes=right(320), budget=36_864)
    study.add(LORA, outcomes=right(320), budget=36_864)
    assert ablation_table(section_of(study)) is None


# ---- learning rates ----------------------------------------------------------------------------


def test_best_rate_at_the_edge_of_the_grid_is_pointed_at(study: MadeUpStudy) -> None:
    scores = {
        "E²LoRA": (E2, (200, 250, 330)),
        "LoRA": (LORA, (200, 330, 250)),
        "all-shared": (ALL, (330, 331, 332)),
        "blocks(2)": (BLOCKS, (330, 250, None)),
    }
    for topology, counts in scores.values():
        for lr, count in zip((1e-3, 3e-3, 1e-2), counts, strict=True):
            if count is None:
                study.add(topology, budget=36_864, lr=lr, failure="diverged", error="no")
            else:
                study.add(topology, budget=36_864, lr=lr, outcomes=right(count))
    rows = rows_of(sensitivity_table(section_of(study)), "system")
    notes = {system: rows[system,]["note"] for system in scores}
    assert notes == {
        "E²LoRA": "at the edge of the grid (highest)",
        "LoRA": "",
        "all-shared": "flat",
        "blocks(2)": "at the edge of the grid (lowest); diverged: 0.01",
    }
    assert (rows["LoRA",]["0.003"], rows["LoRA",]["range"]) == ("0.8250", "0.3250")
    assert rows["blocks(2)",]["0.01"] == "diverged"


def test_sampler_s_trials_do_not_enter_the_sensitivity(study: MadeUpStudy) -> None:
    for lr, count in ((1e-3, 300), (3e-3, 350)):
        study.add(E2, budget=36_864, lr=lr, outcomes=right(count))
    study.add(E2, budget=36_864, lr=2e-3, outcomes=right(100), origin="sampler")
    table = sensitivity_table(section_of(study))
    assert table is not None
    assert table.header == ("system", "budget", "0.001", "0.003", "range", "note")
    assert rows_of(table, "system")["E²LoRA",]["range"] == "0.1250"


def test_systems_of_one_size_each_stand_in_a_picture_the_best_first(tmp_path: Path) -> None:
    study = MadeUpStudy(tmp_path, quota=1, budgets=(18_432,))
    for topology, hits in ((E2, 300), (LORA, 320), (BLOCKS, 310)):
        study.add(topology, 2, right(hits), 18_432)
    assert "systems.png" in [file.name for file in render_report(study.folder).pictures]
    section = section_of(study)
    lines = {system: lines_of(section, system) for system in ("E²LoRA", "LoRA", "blocks(2)")}
    assert [*standings_of(section, lines)] == ["LoRA", "blocks(2)", "E²LoRA"]


# ---- pages and pictures ------------------------------------------------------------------------


def test_html_holds_every_picture_inline_and_names_no_other_file(tmp_path: Path) -> None:
    study = MadeUpStudy(tmp_path, quota=2, budgets=(18_432, 36_864))
    for r, budget in ((2, 18_432), (4, 36_864)):
        for lr in (1e-3, 3e-3):
            params = {"lr": lr, "budget": budget}
            for topology in (LORA, E2):
                study.add(topology, r, right(300), budget, lr=lr, params=params)
    report = render_report(study.folder)
    names = ["pareto", "size", "learning-rate", "plans", "similarity"]
    assert [file.name for file in report.pictures] == [f"{name}.png" for name in names]
    html = report.html.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]+)"', html)
    inline = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert inline == [file.read_bytes() for file in report.pictures]
    assert all(picture.startswith(b"\x89PNG") for picture in inline)
    assert not re.search(r'(href|src)="(?!data:|#)', html)
    assert "Importance of the suggestions is not shown: too few trials: 8 complete" in html
    markdown = report.markdown.read_text(encoding="utf-8")
    assert all(f"({file.name})" in markdown for file in report.pictures)


def test_pareto_shows_means_over_seeds_where_there_are_any(study: MadeUpStudy) -> None:
    e2 = study.add(E2, outcomes=right(300), budget=36_864)
    lora = study.add(LORA, r=4, outcomes=right(320), budget=36_864)
    beside = study.add(ALL, outcomes=right(390), budget=36_864, origin="sampler")
    points, bars = points_of(section_of(study))
    assert bars == "95 % intervals over validation items"
    assert {p.number: p.value for p in points if p.best} == {e2: 0.75, lora: 0.8}
    for seed in range(3):
        study.add_run(e2, seed, right(310 + 2 * seed))
        study.add_run(lora, seed, right(290 + 4 * seed))
    points, bars = points_of(section_of(study))
    assert bars == "95 % intervals over seeds"
    shown = {p.number: p for p in points if p.best}
    assert {n: round(p.value, 6) for n, p in shown.items()} == {e2: 0.78, lora: 0.735}
    low, high = stats.ttest_1samp([0.775, 0.78, 0.785], 0).confidence_interval(0.95)
    assert shown[e2].interval == pytest.approx((low, high))
    # E²LoRA has 37,632 parameters and LoRA 36,864: both are on the front of the means.
    assert {p.number for p in points if p.on_front} == {e2, lora}
    assert sorted((p.number, p.value) for p in points if not p.best) == [
        *((e2, 0.75), (lora, 0.8), (beside, 0.975))
    ]


def test_plans_of_the_winners_are_those_of_e2_at_each_budget(tmp_path: Path) -> None:
    study = MadeUpStudy(tmp_path, quota=2, budgets=(9_216, 18_432, 36_864, 73_728))
    winners = []
    for r, budget in ((2, 9_216), (4, 18_432), (8, 36_864), (16, 73_728)):
        study.add(E2, r=r, outcomes=right(300), budget=budget, lr=1e-3)
        winners.append(study.add(E2, r=r, outcomes=right(310), budget=budget, lr=3e-3))
        study.add(LSS, r=r, outcomes=right(390), budget=budget)
    found = winning_plans(study.folder, section_of(study))
    smallest, _, middle, largest = winners
    assert list(found) == [
        f"9,216 (trial {smallest})",
        f"36,864 (trial {middle})",
        f"73,728 (trial {largest})",
    ]
    assert [plan.options.r for plan in found.values()] == [2, 8, 16]


@pytest.mark.usefixtures("unpictured")
def test_report_has_published_scores_where_model_and_task_have_some(study: MadeUpStudy) -> None:
    roberta = ModelConfig(name="FacebookAI/roberta-base")
    study.add(LORA, outcomes=right(300), model=roberta, task=task_preset("glue/cola"))
    markdown = render_report(study.folder).markdown.read_text(encoding="utf-8")
    assert "| LoRA | 0.30M | 85.87 |" in markdown
    assert "E²LoRA, ICLR 2026, openreview.net/forum?id=IQttyo0460" in markdown


@pytest.mark.usefixtures("unpictured")
def test_command_prints_table_and_verdict_and_where_the_files_are(
    study: MadeUpStudy, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study.add(E2, outcomes=right(300), budget=36_864)
    assert main([str(study.folder.path)]) == 0
    printed = capsys.readouterr().out
    assert "Systems at each budget" in printed
    assert "1 trial(s) have ended: 1 complete" in printed
    for name in ("report.html", "report.md", "results.csv"):
        assert str(study.folder.report / name) in printed
        assert (study.folder.report / name).exists()
    assert main([str(tmp_path / "elsewhere")]) == 2
    assert "needs a study's folder" in capsys.readouterr().err


def test_picture_of_an_earlier_report_does_not_stay(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300))
    stale = study.folder.report / "pareto-7.png"
    write_json(stale, "of a study that had more tasks")
    render_report(study.folder)
    assert not stale.exists()


@pytest.mark.usefixtures("unpictured")
def test_names_cannot_become_markup(study: MadeUpStudy) -> None:
    study.add(LORA, outcomes=right(300), model=ModelConfig(name="<script>"))
    html = render_report(study.folder).html.read_text(encoding="utf-8")
    assert "&lt;script&gt; on reviews" in html
    assert "<script>" not in html
    assert r"a\|b" in as_markdown(Table("t", ("x",), (("a|b",),)))
