"""What folds agree on, by hand, and what chance alone would give."""

from __future__ import annotations

import itertools
import random

import pytest

from e2lora.stability import TypeSharing, compare_folds


def sharing(*lengths: int, r: int = 8) -> TypeSharing:
    """Intervals of these lengths."""
    group_of = tuple(k for k, length in enumerate(lengths) for _ in range(length))
    return TypeSharing(tuple(range(len(group_of))), group_of, (r,) * len(group_of))


def test_equal_plans_agree_wholly_also_without_any_cut() -> None:
    for fold in (sharing(2, 3), sharing(5)):
        found = compare_folds({"q": fold}, [{"q": fold}] * 3, 64, 8, True)
        assert (found.jaccard, found.rank_difference) == (1.0, 0.0)
        assert found.verdict.startswith("Every cut recurs between 3 folds of 64 samples")


def test_cut_of_scattered_groups_lies_wherever_neighbours_do_not_share() -> None:
    assert TypeSharing((3, 5, 9), (0, 1, 0), (1, 1, 1)).cuts == {5, 9}


def test_cuts_of_all_module_types_count_together() -> None:
    """q: {2} and {2}; v: {1, 2, 3} and {3, 4}: 2 in common of 5."""
    a = {"q": sharing(2, 3), "v": sharing(1, 1, 1, 2)}
    b = {"q": sharing(2, 3), "v": sharing(3, 1, 1)}
    assert compare_folds(a, [a, b], 8, 8, True).jaccard == pytest.approx(2 / 5)


def test_rank_difference_is_a_mean_over_layers_and_pairs() -> None:
    """Ranks 8, 8 against 4, 4 and 6, 6: differences 4, 2 and 2."""
    folds = [{"q": sharing(2, r=r)} for r in (8, 4, 6)]
    found = compare_folds(folds[0], folds, 8, 8, True)
    assert found.rank_difference == pytest.approx(8 / 3)
    assert (found.types[0].lowest_ranks, found.types[0].highest_ranks) == ((4, 4), (8, 8))


def test_chance_is_what_random_partitions_of_as_many_cuts_agree_by() -> None:
    """By drawing: 3 and 5 cuts among 11 places in one type, 1 and 2 among 4 in another."""
    rng = random.Random(0)

    def drawn(num_layers: int, num_cuts: int) -> TypeSharing:
        cuts = [0, *sorted(rng.sample(range(1, num_layers), num_cuts)), num_layers]
        return sharing(*(b - a for a, b in itertools.pairwise(cuts)))

    total = 0.0
    for _ in range(4000):
        a = {"q": drawn(12, 3), "v": drawn(5, 1)}
        b = {"q": drawn(12, 5), "v": drawn(5, 2)}
        found = compare_folds(a, [a, b], 8, 8, True)
        total += found.jaccard
    assert found.chance == pytest.approx(total / 4000, abs=0.005)


def test_verdict_says_when_cuts_recur_no_more_than_by_chance() -> None:
    found = compare_folds(
        {"q": sharing(3, 7)}, [{"q": sharing(3, 7)}, {"q": sharing(5, 5)}], 8, 8, True
    )
    assert found.verdict.startswith("Cuts recur no more than by chance between 2 folds of 8")
