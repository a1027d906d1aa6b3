"""Shares of variance: against sums over the whole space, and against what was planted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from e2lora.importance import Leaf, first_order, importances

WEIGHTS = [np.array([0.5, 0.3, 0.2]), np.array([0.25, 0.75]), np.array([0.1, 0.2, 0.3, 0.4])]


def random_tree(random: np.random.Generator) -> list[Leaf]:
    """Boxes that part the product of all levels."""
    pending = [tuple(np.ones(len(w), dtype=bool) for w in WEIGHTS)]
    leaves: list[Leaf] = []
    while pending:
        masks = pending.pop()
        k = int(random.integers(len(masks)))
        inside = np.flatnonzero(masks[k])
        if len(inside) < 2 or len(leaves) + len(pending) > 7:
            leaves.append(Leaf(masks, float(random.normal())))
            continue
        left = np.zeros(len(masks[k]), dtype=bool)
        left[random.permutation(inside)[: random.integers(1, len(inside))]] = True
        pending += [(*masks[:k], masks[k] & side, *masks[k + 1 :]) for side in (left, ~left)]
    return leaves


def test_shares_of_a_tree_are_those_of_sums_over_the_whole_space() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        leaves = random_tree(random)
        points = list(itertools.product(*(range(len(w)) for w in WEIGHTS)))
        chance = {
            p: math.prod(w[level] for w, level in zip(WEIGHTS, p, strict=True)) for p in points
        }
        value = {
            p: next(
                leaf.value
                for leaf in leaves
                if all(mask[level] for mask, level in zip(leaf.masks, p, strict=True))
            )
            for p in points
        }
        mean = sum(chance[p] * value[p] for p in points)
        variance = sum(chance[p] * (value[p] - mean) ** 2 for p in points)
        found = first_order(leaves, WEIGHTS)
        if variance < 1e-12:
            assert found is None
            continue
        assert found is not None
        expected = []
        for k, w in enumerate(WEIGHTS):
            marginal = [
                sum(chance[p] * value[p] for p in points if p[k] == level) / w[level]
                for level in range(len(w))
            ]
            expected.append(sum(w * (np.asarray(marginal) - mean) ** 2) / variance)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def drawn(n: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    trials = []
    for _ in range(n):
        system = str(random.choice(["LoRA", "blocks", "E²LoRA"]))
        trial = {
            "system": system,
            "budget": int(random.choice([1000, 2000])),
            "learning_rate": float(np.exp(random.uniform(np.log(1e-4), np.log(1e-2)))),
        }
        trials.append(
            trial | ({"block_size": int(random.choice([2, 3]))} if system == "blocks" else {})
        )
    return trials


SYSTEM_EFFECT = {"LoRA": 0.0, "blocks": 1.0, "E²LoRA": 2.0}  # variance 2/3


def test_planted_shares_are_found_whatever_the_sampler_preferred() -> None:
    """Effects: system 2/3, budget 1/4 of variance; nothing else. Most trials are E²'s."""
    trials = drawn(400)
    few = [t for t in trials if t["system"] != "E²LoRA"][:24]
    biased = few + [t for t in trials if t["system"] == "E²LoRA"]
    values = [SYSTEM_EFFECT[t["system"]] + (t["budget"] == 2000) for t in biased]
    found = importances(biased, values)
    shares = {share.name: share.alone for share in found.shares}
    total = 2 / 3 + 1 / 4
    assert shares["system"] == pytest.approx(2 / 3 / total, abs=0.06)
    assert shares["budget"] == pytest.approx(1 / 4 / total, abs=0.06)
    assert shares["learning_rate"] < 0.02
    assert found.shares[0].name == "system"
    assert found.r2 > 0.95
    assert found.together < 0.05


def test_effect_of_two_together_is_no_share_of_either() -> None:
    trials = drawn(300, seed=1)
    high = [t["learning_rate"] > 1e-3 for t in trials]
    values = [float((t["budget"] == 2000) == h) for t, h in zip(trials, high, strict=True)]
    found = importances(trials, values)
    assert all(share.alone < 0.1 for share in found.shares)
    assert found.together > 0.75


def test_conditional_suggestion_is_judged_among_the_trials_that_have_it() -> None:
    trials = drawn(300, seed=2)
    values = [
        SYSTEM_EFFECT[t["system"]] + (3.0 * (t["block_size"] == 3) if "block_size" in t else 0.0)
        for t in trials
    ]
    shares = {share.name: share for share in importances(trials, values).shares}
    own = shares["block_size"]
    assert own.is_conditional
    assert own.n == sum("block_size" in t for t in trials)
    assert own.alone > 0.9
    assert not shares["system"].is_conditional


def test_noise_decides_nothing() -> None:
    refused = 0
    for seed in range(10):
        values = np.random.default_rng(100 + seed).normal(size=60)
        refused += "don't tell the score" in importances(drawn(60, seed), values.tolist()).refusal
    assert refused >= 9


def test_too_few_trials_or_nothing_to_tell_is_said() -> None:
    few = importances(drawn(19), list(range(19)))
    assert few.refusal == "too few trials: 19 complete, and it takes 20"
    assert few.shares == ()
    assert "same score" in importances(drawn(30), [0.5] * 30).refusal
    same = [{"system": "LoRA"}] * 30
    assert "more than one value" in importances(same, [float(k) for k in range(30)]).refusal
