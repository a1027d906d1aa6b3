"""Verdicts of studies whose truth is known: drawn at random, and made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from e2lora.comparisons import choose, compare
from e2lora.config import Objective
from e2lora.pseudo import pseudo_outcomes
from e2lora.scored import Scored, Section, Unscored
from e2lora.statistics import holm, paired_test
from e2lora.verdict import compare_all, write_verdict
from tests.simulations import TASK, config_of, draw_outcomes, equal_study, scored, section_of

E2, LORA, ALL, MATCHED, RANDOM = "E²LoRA", "LoRA", "all-shared", "matched blocks", "random(E²)"


def told(*sections: Section, interim: bool = False) -> str:
    return write_verdict(sections, "All trials have ended.", interim)


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert len(found) == 1, (words, text)
    return found[0]


def right(*counts: int, of: int = 400) -> NDArray[np.float64]:
    """One row per seed: the first so many items right, the others wrong."""
    return np.array([[1.0] * n + [0.0] * (of - n) for n in counts])


def steady(mean: int, of: int = 400) -> NDArray[np.float64]:
    """Five seeds around so many items right."""
    return right(mean - 2, mean - 1, mean, mean + 1, mean + 2, of=of)


# ---- planted truths -----------------------------------------------------------------------------


def finds(section: Section) -> bool:
    return "significantly" in told(section)


def pooled_finds(section: Section) -> bool:
    """What a test finds that takes the runs' outcomes for so many items more."""
    p_values = []
    for c in compare(section):
        a, b = (np.concatenate([run.outcomes for run in cell.runs]) for cell in (c.a, c.b))  # type: ignore[arg-type]
        p_values.append(paired_test(a, b).p_value)
    return min(holm(p_values)) <= 0.05


def test_equal_systems_are_found_equal_in_95_of_100_studies() -> None:
    """Eight comparisons in each of 120 studies, half of them of systems whose seeds differ a lot.

    At 5 % 6 of 120 would find something, and 13 or more with a chance of 0.7 %.
    """
    rng = np.random.default_rng(0)
    studies = [
        equal_study(rng, num_items=250, seed_spread=spread)
        for spread in (0.05, 0.3)
        for _ in range(60)
    ]
    assert sum(map(finds, studies)) <= 12
    assert sum(map(pooled_finds, studies[::2])) >= 30, "the test must be able to fail"


def test_planted_gap_of_3_points_is_found() -> None:
    """Eight comparisons in each of 5 studies, each with a power of 97 %: found in 36 of 40."""
    rng = np.random.default_rng(0)
    found: list[bool] = []
    for _ in range(5):
        accuracies = (0.88, 0.85, 0.85, 0.85, 0.85)
        section = equal_study(rng, 3000, accuracies, seed_spread=0.02)
        (comparisons,) = compare_all([section])
        found += [c.is_significant and c.favours_a(section.metric) for c in comparisons]
    assert len(found) == 40
    assert sum(found) >= 36


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_items", "num_seeds", "seed_spread"),
    [(300, 5, 0.02), (1000, 5, 0.06), (1000, 5, 0.2), (300, 3, 0.2)],
)
def test_level_is_kept_whatever_seeds_and_items_vary(
    num_items: int, num_seeds: int, seed_spread: float
) -> None:
    """At 5 % 20 of 400 studies would find something, and 34 or more with a chance of 0.2 %."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        section = equal_study(
            rng, num_items, num_seeds=num_seeds, seed_spread=seed_spread, budgets=(50_000,)
        )
        (comparisons,) = compare_all([section])
        found += any(c.is_significant for c in comparisons)
    assert found <= 33


# ---- over seeds ---------------------------------------------------------------------------------


def test_systems_are_compared_over_seeds_with_mean_spread_and_interval() -> None:
    section = section_of({(E2, 1000): steady(330), (LORA, 1000): steady(260)})
    verdict = told(section)
    line = line_with(verdict, "- LoRA")
    assert "difference +0.1750" in line
    assert "5 seeds x 400 items" in line
    assert "two-level paired bootstrap" in line
    assert "E²LoRA is significantly better" in line
    # 258 … 262 of 400: sd 0.0040, and 2.776 · 0.00395/√5 to each side.
    assert "mean 0.6500, sd 0.0040 over 5 seeds (95 % interval 0.6451 to 0.6549)" in line
    assert "over seeds: significantly better than LoRA at 1,000." in verdict


def test_smaller_is_better_where_the_metric_is_to_be_minimised() -> None:
    rng = np.random.default_rng(0)
    errors = rng.uniform(1, 2, 60) + rng.normal(0, 0.05, (5, 60))
    section = section_of(
        {(E2, 1000): errors, (LORA, 1000): errors + 0.5 + rng.normal(0, 0.05, (5, 60))},
        metric=Objective(name="mse", direction="minimize"),
    )
    assert "E²LoRA is significantly better" in line_with(told(section), "- LoRA")


def test_draws_of_one_seed_are_averaged_and_few_draws_are_no_control() -> None:
    section = section_of({(E2, 1000): right(300, 310), (RANDOM, 1000): right(200, 210)})
    run = section.runs[-1]
    config = run.config.model_copy(
        update={"plan": run.config.plan.model_copy(update={"partition_seed": 7})}
    )
    again = scored(9, config, right(230)[0], 1000, origin="seeds", chosen=run.chosen)
    line = line_with(told(replace(section, runs=(*section.runs, again))), "- random(E²)")
    # Seed 0: 200, seed 1: the mean of 210 and 230.
    assert "mean 0.5250" in line
    assert "3 draw(s) of a partition: not a complete control, which takes 5" in line
    complete = told(section_of({(E2, 1000): steady(300), (RANDOM, 1000): steady(200)}))
    assert "5 draw(s) of a partition): difference" in line_with(complete, "- random(E²)")


def test_runs_of_unequal_seeds_are_not_compared_over_them() -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 1000): steady(200)})
    line = line_with(told(replace(section, runs=section.runs[:-1])), "- LoRA")
    assert "Not over seeds, since E²LoRA has runs of seeds [0, 1, 2, 3, 4], LoRA of" in line
    assert "exact McNemar" in line
    assert "this E²LoRA model is significantly better" in line


def test_one_trial_each_is_called_exploratory() -> None:
    verdict = told(section_of({(E2, 1000): right(300), (LORA, 1000): right(200)}))
    assert "exploratory, one trial each" in line_with(verdict, "Budget 1,000")
    assert "it speaks of two trained models" in verdict
    assert "`--seeds 5`" in line_with(verdict, "Exploratory, of single trained models")
    assert "To deploy, with one trial each to go by" in verdict


def test_p_values_of_both_kinds_are_adjusted_apart() -> None:
    """7 : 0 discordant items, p = 2/2⁷ = 0.0156, two such beside one comparison over seeds."""
    section = section_of(
        {
            (E2, 1000): steady(307),
            (LORA, 1000): right(298),
            (ALL, 1000): right(298),
            (MATCHED, 1000): steady(200),
        }
    )
    verdict = told(section)  # tries have the outcomes of the first seed: 305 right
    for system in ("- LoRA", "- all-shared"):
        assert "p = 0.016, adjusted p = 0.031" in line_with(verdict, system)
    assert "1 over seeds and, apart, 2 of single trials" in verdict


def test_metric_without_a_value_per_row_is_tested_by_pseudo_outcomes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    metric = Objective(name="mcc", direction="maximize")

    def tables(share_right: float) -> NDArray[np.float64]:
        said = np.where(rng.random((5, 400)) < share_right, truth, 1 - truth)
        return np.array([pseudo_outcomes("mcc", row.tolist(), truth.tolist()) for row in said])

    section = section_of({(E2, 1000): tables(0.9), (LORA, 1000): tables(0.7)}, metric=metric)
    assert "E²LoRA is significantly better." in line_with(told(section), "- LoRA")

    bare = replace(section, runs=tuple(replace(run, value=0.5) for run in section.runs))
    expected = "significantly higher in accuracy (mcc has no value per item)"
    assert expected in line_with(told(bare), "- LoRA")


# ---- test rows ----------------------------------------------------------------------------------


def on_test(section: Section, counts: dict[str, int]) -> Section:
    """Each run scored on 100 test rows, too."""
    return replace(
        section,
        runs=tuple(
            replace(
                run,
                test_value=counts[run.system] / 100,
                test_outcomes=tuple(right(counts[run.system], of=100)[0]),
            )
            for run in section.runs
        ),
    )


def test_systems_are_compared_on_test_rows_where_all_were_scored_on_them() -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 1000): steady(200)})
    verdict = told(on_test(section, {E2: 60, LORA: 90}))
    line = line_with(verdict, "- LoRA")
    assert "on test rows mean 0.9000" in line
    assert "5 seeds x 100 items" in line
    assert "E²LoRA is significantly worse" in line
    assert "free of the choice" in verdict
    assert "chosen by their scores on the validation rows that they are" not in verdict


def test_what_to_deploy_is_chosen_on_validation_rows_and_told_on_test_rows() -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 2000): steady(302)})
    line = line_with(told(on_test(section, {E2: 60, LORA: 90})), "To deploy")
    assert line.startswith("To deploy: E²LoRA at 1,000")
    assert "mean 0.7500" in line
    assert "on test rows, mean 0.6000" in line


def test_test_means_without_outcomes_are_told_beside_the_validation_rows() -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 1000): steady(200)})
    runs = tuple(replace(run, test_value=0.5) for run in section.runs)
    line = line_with(told(replace(section, runs=runs)), "- LoRA")
    assert "mean 0.5000" in line
    assert "on test rows mean 0.5000" in line
    assert "x 400 items" in line


# ---- what is not compared -----------------------------------------------------------------------


def test_cells_of_unequal_effort_are_not_compared() -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 1000): steady(200)}, quota=3)
    fewer = replace(section, trials=section.trials[:-1])
    line = line_with(told(fewer), "- LoRA: ")
    assert "of a quota of 3 tries E²LoRA has had 3, LoRA 2" in line
    assert "difference" not in told(fewer).replace("Without it a difference", "")
    diverged = Unscored(99, config_of(LORA, 1000), "nan", origin="quota", is_effort=True)
    assert "significantly better" in told(replace(fewer, unscored=(diverged,)))


def test_cell_without_a_complete_try_is_named() -> None:
    section = section_of({(E2, 1000): steady(300)}, quota=1)
    diverged = Unscored(99, config_of(LORA, 1000), "nan", origin="quota", is_effort=True)
    verdict = told(replace(section, unscored=(diverged,)))
    assert "none of the 1 tries of LoRA is complete" in line_with(verdict, "- LoRA: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"outcomes": (1.0,) * 10, "value": 1.0}, "scored on 10 and 400 items"),
        ({"outcomes": None}, "has no outcomes per item"),
        ({"outcome": "f1"}, r"outcomes are of different metrics (accuracy, f1)"),
        ({"task": TASK.model_copy(update={"split_seed": 1})}, "rows may differ (in split_seed)"),
    ],
)
def test_trials_that_cannot_be_paired_are_not(change: dict[str, Any], reason: str) -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 1000): steady(200)}, quota=1)

    def changed(trial: Scored) -> Scored:
        if trial.system == E2:
            return trial
        if "task" in change:
            return replace(trial, config=trial.config.model_copy(update=change))
        return replace(trial, **change)

    other = replace(
        section,
        trials=tuple(map(changed, section.trials)),
        runs=tuple(map(changed, section.runs)),
    )
    verdict = told(other)
    assert reason in line_with(verdict, "- LoRA: ")
    assert "adjusted p" not in verdict.partition("# How to read")[0]


def test_budgets_and_sections_are_never_mixed() -> None:
    a = section_of({(E2, 1000): steady(300), (LORA, 2000): steady(200)})
    b = section_of({(LORA, 1000): steady(200)}, task="others")
    verdict = told(a, b)
    assert "Budget 1,000 parameters: no other system was tried" in verdict
    assert verdict.count("E²LoRA was not tried; nothing is compared") == 2
    assert "adjusted p" not in verdict


def test_trial_without_a_budget_stands_on_the_front_alone() -> None:
    section = section_of({(E2, 1000): steady(300), (LORA, 1000): steady(200)})
    free = config_of(ALL, 1000)
    free = free.model_copy(
        update={"plan": free.plan.model_copy(update={"target_parameters": None})}
    )
    best = scored(50, free, right(400)[0], 9000)
    verdict = told(replace(section, trials=(*section.trials, best)))
    assert "all-shared r=8 (9,000: 1.0000)" in line_with(verdict, "Not dominated")
    assert "- all-shared" not in verdict
    only = told(replace(section, trials=(best,), runs=()))
    assert "none is compared: trials stand on the front only" in only


# ---- what is said beside it ---------------------------------------------------------------------


def test_parameters_away_from_the_budget_are_said_above_5_percent() -> None:
    sizes = {(E2, 1000): 1040, (LORA, 1000): 1090}
    verdict = told(section_of({key: steady(300) for key in sizes}, parameters=sizes))
    assert "1,090 parameters, 9% above the budget" in line_with(verdict, "- LoRA")
    assert "1,040 parameters)" in line_with(verdict, "Budget 1,000")


def test_controls_that_a_study_lacks_are_said() -> None:
    cells = {(E2, 1000): steady(300), (MATCHED, 1000): steady(300), (E2, 2000): steady(300)}
    verdict = told(section_of(cells))
    assert "(`random`) at 1,000, 2,000" in line_with(verdict, "Control lacking: random")
    assert "(`matched`) at 2,000" in line_with(verdict, "Control lacking: matched")
    cells |= {(MATCHED, 2000): steady(300)}
    cells |= {(RANDOM, budget): steady(300) for budget in (1000, 2000)}
    assert "Control lacking" not in told(section_of(cells))


def test_interim_result_is_called_so_and_notes_come_last() -> None:
    section = section_of({(E2, 1000): steady(300)})
    assert "interim" in told(section, interim=True)
    assert "interim" not in told(section)
    assert write_verdict([section], "", False, ["a note"]).endswith("\n- a note")


def test_study_without_a_complete_trial_says_so() -> None:
    empty = section_of({})
    assert "there is nothing to compare" in told(empty)
    assert "nothing to compare" in told(section_of({(E2, 1000): steady(300)}), empty)


# ---- what to deploy -----------------------------------------------------------------------------


def chosen_of(cells: dict[tuple[str, int], NDArray[np.float64]]) -> tuple[str, int]:
    choice = choose(section_of(cells))
    assert choice is not None
    return choice.cell.system, choice.cell.budget


def noisy(*accuracies: float) -> Sequence[NDArray[np.float64]]:
    return list(draw_outcomes(np.random.default_rng(0), 1000, accuracies, seed_spread=0.02))


def test_smallest_that_does_not_test_worse_than_the_best_is_to_be_deployed() -> None:
    much, little, best = noisy(0.70, 0.849, 0.85)
    cells = {(LORA, 1000): much, (E2, 2000): little, (ALL, 4000): best}
    assert chosen_of(cells) == (E2, 2000)
    line = line_with(told(section_of(cells)), "To deploy")
    assert "smallest of 3 cells that does not test worse than the one with the best mean" in line
    assert "so it may cost up to" in line


def test_best_is_to_be_deployed_where_all_smaller_ones_test_worse() -> None:
    worse, bad, best = noisy(0.70, 0.75, 0.85)
    cells = {(LORA, 1000): worse, (E2, 2000): bad, (ALL, 4000): best}
    assert chosen_of(cells) == (ALL, 4000)
    assert "the 2 smaller one(s) test worse than it" in told(section_of(cells))


def test_random_draws_and_cells_without_all_seeds_are_not_deployed() -> None:
    draws, few, full, best = noisy(0.85, 0.85, 0.85, 0.85)
    cells = {(RANDOM, 500): draws, (LORA, 1000): few[:3], (E2, 2000): full, (ALL, 4000): best}
    assert chosen_of(cells) == (E2, 2000)
    assert "1 cell(s) are left out" in line_with(told(section_of(cells)), "To deploy")
