"""Every topology covers every layer once; E² cuts where the method says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2lora.config import CalibrationConfig, ExplicitGroup, PlanConfig
from e2lora.moments import Moments, TypeGradients, merge
from e2lora.partition import (
    SIMILARITIES,
    TOPOLOGIES,
    Partition,
    Stack,
    cut_by_similarity,
    kl,
    rmi,
    rmi_literal,
    similarity_matrix,
)
from tests.made_up import gradients_of, moments_of

# A busy machine makes examples slow: that says nothing about the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

sigmas = st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=24)


def gradients(stds: list[float]) -> TypeGradients:
    return TypeGradients(tuple(moments_of(std) for std in stds))


def stack(num_layers: int, stds: list[float] | None = None) -> Stack:
    layers = tuple(range(num_layers))
    return Stack("h.*.q", layers, None if stds is None else gradients(stds))


OPTIONS: dict[str, dict[str, object]] = {
    "blocks": {"block_size": 2},
    "strided": {"stride": 2},
    "random": {"partition_seed": 0},
}
SCATTERED = {"strided", "explicit"}
"""Topologies whose groups need not be contiguous."""


def options(topology: str, num_layers: int) -> PlanConfig:
    if topology == "explicit":
        halves = tuple(range(0, num_layers, 2)), tuple(range(1, num_layers, 2))
        groups = tuple(ExplicitGroup(module="q", layers=half) for half in halves if half)
        return PlanConfig(topology="explicit", groups=groups)
    return PlanConfig(topology=topology, **OPTIONS.get(topology, {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@given(stds=st.lists(st.floats(1e-8, 1e3), min_size=2, max_size=24))
def test_partition_holds_each_layer_once(topology: str, stds: list[float]) -> None:
    """The contract of every entry of the registry; most are contiguous and in order, too."""
    chosen, layers = options(topology, len(stds)), stack(len(stds), stds)
    partition = TOPOLOGIES[topology](layers, chosen)
    assert all(partition)
    flat = [layer for group in partition for layer in group]
    assert sorted(flat) == list(range(len(stds)))
    assert flat == sorted(flat) or topology in SCATTERED
    assert TOPOLOGIES[topology](layers, chosen) == partition


def test_fixed_topologies_of_five_layers() -> None:
    def share(topology: str) -> Partition:
        return TOPOLOGIES[topology](stack(5), options(topology, 5))

    assert share("none") == ((0,), (1,), (2,), (3,), (4,))
    assert share("all") == ((0, 1, 2, 3, 4),)
    assert share("blocks") == ((0, 1), (2, 3), (4,))
    assert share("strided") == ((0, 2, 4), (1, 3))
    assert share("explicit") == ((0, 2, 4), (1, 3))


@pytest.mark.parametrize(
    ("topology", "option"),
    [("blocks", "block_size"), ("strided", "stride"), ("random", "num_intervals")],
)
def test_more_than_the_stack_has_is_refused(topology: str, option: str) -> None:
    wide = PlanConfig(topology=topology, **{**OPTIONS[topology], option: 6})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"{option}=6 for 5 layers of h\.\*\.q"):
        TOPOLOGIES[topology](stack(5), wide)


@pytest.mark.parametrize(
    "wrong",
    [
        {"topology": "blocks"},
        {"topology": "e2", "block_size": 2},
        {"topology": "strided"},
        {"topology": "blocks", "block_size": 2, "stride": 2},
        {"topology": "random"},
        {"topology": "e2", "partition_seed": 1},
        {"topology": "matched", "num_intervals": 3},
        {"topology": "explicit"},
        {"topology": "none", "groups": (ExplicitGroup(module="q", layers=(0,)),)},
    ],
)
def test_option_of_another_topology_or_a_missing_one_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"when `topology` is '(blocks|strided|random|explicit)'"):
        PlanConfig(**wrong)  # type: ignore[arg-type]


# ---- the controls of E² -----------------------------------------------------------------------


@given(st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=24), st.integers(0, 5))
def test_controls_have_as_many_intervals_as_e2(stds: list[float], seed: int) -> None:
    layers = stack(len(stds), stds)
    found = TOPOLOGIES["e2"](layers, PlanConfig(topology="e2"))
    matched = TOPOLOGIES["matched"](layers, PlanConfig(topology="matched"))
    drawn = TOPOLOGIES["random"](layers, PlanConfig(topology="random", partition_seed=seed))
    assert len(found) == len(matched) == len(drawn)
    sizes = [len(interval) for interval in matched]
    assert max(sizes) - min(sizes) <= 1


def test_random_partitions_are_drawn_evenly() -> None:
    """Of the 10 partitions of 6 layers into 3 intervals; χ² with 9 degrees of freedom."""
    counts: dict[Partition, int] = {}
    for seed in range(2000):
        chosen = PlanConfig(topology="random", num_intervals=3, partition_seed=seed)
        drawn = TOPOLOGIES["random"](stack(6), chosen)
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 10
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 27.9  # p = 0.001


def test_random_partition_differs_by_module_type() -> None:
    chosen = PlanConfig(topology="random", num_intervals=8, partition_seed=0)
    q, v = (
        TOPOLOGIES["random"](Stack(name, tuple(range(30))), chosen) for name in ("h.*.q", "h.*.v")
    )
    assert q != v


# ---- groups that the user writes --------------------------------------------------------------


def explicit(*layers: tuple[int, ...]) -> PlanConfig:
    groups = tuple(ExplicitGroup(module="q", layers=part) for part in layers)
    return PlanConfig(topology="explicit", groups=groups)


def test_explicit_groups_name_layers_and_not_positions() -> None:
    """A hybrid model's stack has this module in layers 1, 4 and 7 only."""
    hybrid = Stack("h.*.q", (1, 4, 7))
    assert TOPOLOGIES["explicit"](hybrid, explicit((1, 7), (4,))) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (((0, 1), (1, 2)), r"unknown or too many: \[1\].*missing: none"),
        (((0,), (2,)), r"too many: none.*missing: \[1\]"),
        (((0, 1), (2, 3)), r"too many: \[3\]"),
    ],
)
def test_explicit_groups_that_miss_or_repeat_a_layer_are_refused(
    layers: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TOPOLOGIES["explicit"](stack(3), explicit(*layers))


# ---- E² ---------------------------------------------------------------------------------------


def test_e2_cuts_five_layers_as_by_hand() -> None:
    """σ = 1, 1, 4, 4, 1. Of equal layers the similarity is 1, of others log2(1 + 1/16) = 0.0875.

    Interval at layer 0: threshold (1 + 0.0875 + 0.0875 + 1)/4 = 0.544; layer 1 joins, 2 doesn't.
    At layer 2: (0.0875 + 0.0875 + 1 + 0.0875)/4 = 0.316; layer 3 joins, 4 doesn't.
    """
    matrix = similarity_matrix("rmi", gradients([1, 1, 4, 4, 1]))
    near, far = 1.0, math.log2(17 / 16)
    expected = [
        [near, near, far, far, near],
        [near, near, far, far, near],
        [far, far, near, near, far],
        [far, far, near, near, far],
        [near, near, far, far, near],
    ]
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)
    assert cut_by_similarity(matrix) == ((0, 1), (2, 3), (4,))


def test_interval_is_judged_by_its_first_layer_not_by_its_last() -> None:
    """Layers that drift: each is near its neighbour, but layer 2 is far from layer 0."""
    similarity = np.array(
        [[1.0, 0.9, 0.2, 0.2], [0.9, 1.0, 0.9, 0.2], [0.2, 0.9, 1.0, 0.9], [0.2, 0.2, 0.9, 1.0]]
    )
    assert cut_by_similarity(similarity) == ((0, 1), (2, 3))


def test_layer_after_a_cut_never_returns_to_the_interval() -> None:
    """Layer 2 is as layer 0, but layer 1 lies between: intervals are contiguous."""
    assert cut_by_similarity(np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1.0]])) == ((0,), (1, 2))


@given(sigmas, st.integers(-30, 30))
def test_partition_ignores_the_scale_of_the_loss(stds: list[float], power: int) -> None:
    """Multiplying all gradients by 2^power is exact in floating point."""
    scaled = [std * 2.0**power for std in stds]
    before, after = (similarity_matrix("rmi", gradients(values)) for values in (stds, scaled))
    np.testing.assert_allclose(after, before, rtol=1e-9)
    assert cut_by_similarity(after) == cut_by_similarity(before)


@given(st.floats(1e-8, 1e3), st.integers(1, 40))
def test_equal_layers_are_never_split_by_rounding(std: float, num_layers: int) -> None:
    matrix = similarity_matrix("rmi", gradients([std] * num_layers))
    assert cut_by_similarity(matrix) == (tuple(range(num_layers)),)


@pytest.mark.parametrize("far", [39.0, 40.0, 60.0])
def test_rounding_of_the_mean_never_cuts(far: float) -> None:
    """All others are equally far from layer 0, so each is at the mean; but in floating point the
    mean of these three equal numbers is above each of them."""
    matrix = similarity_matrix("rmi", gradients([1.0, far, far, far]))
    assert math.fsum(matrix[0, 1:]) / 3 > matrix[0, 1]
    assert cut_by_similarity(matrix) == ((0, 1, 2, 3),)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_slack_follows_the_size_of_the_similarities(scale: float) -> None:
    """Distances carry the scale of the loss. Layer 0's mean is 2; what lies 1e-8 of it beyond the
    mean is cut off, what lies 1e-12 beyond it isn't."""
    for beyond, expected in ((1e-8, ((0,), (1, 2))), (1e-12, ((0, 1, 2),))):
        distances = np.array([[0, 2 + beyond, 2 - beyond], [2 + beyond, 0, 1], [2 - beyond, 1, 0]])
        assert cut_by_similarity(-scale * distances) == expected


@given(st.floats(1e-8, 1e3), st.floats(1e-8, 1e3))
def test_two_layers_always_share(a: float, b: float) -> None:
    assert cut_by_similarity(similarity_matrix("rmi", gradients([a, b]))) == ((0, 1),)


# ---- similarities -----------------------------------------------------------------------------


def vectors(seed: int, num_layers: int, scale: float = 1.0) -> np.ndarray:
    """Layers of 40 heavy-tailed entries, whose widths differ, with entropies below 0."""
    rng = np.random.default_rng(seed)
    widths = np.exp(rng.normal(-6, 0.5, (num_layers, 1)))
    return scale * widths * rng.standard_t(3, (num_layers, 40))


@pytest.mark.parametrize("name", SIMILARITIES)
@given(seed=st.integers(0, 10**6), num_layers=st.integers(1, 12))
def test_similarity_is_symmetric_and_highest_for_the_layer_itself(
    name: str, seed: int, num_layers: int
) -> None:
    """The contract of every entry of the registry. (Means would lift `rmi_literal` a hair above 1:
    what is joint is then wider than either.)"""
    centred = vectors(seed, num_layers)
    centred -= centred.mean(1, keepdims=True)
    matrix = similarity_matrix(name, gradients_of(centred))
    assert (matrix == matrix.T).all()
    assert (matrix <= np.diag(matrix) + 1e-12).all()


@pytest.mark.parametrize("name", SIMILARITIES)
@given(seed=st.integers(0, 10**6), power=st.integers(-8, 2))
def test_only_the_printed_rmi_depends_on_the_scale_of_the_loss(
    name: str, seed: int, power: int
) -> None:
    """Multiplying all gradients by 2^power is exact; so are the cuts, except for `rmi_literal`."""
    before = similarity_matrix(name, gradients_of(vectors(seed, 8)))
    after = similarity_matrix(name, gradients_of(vectors(seed, 8, scale=2.0**power)))
    if name == "rmi_literal":
        assert power == 0 or not np.allclose(after, before, atol=1e-9)
    else:
        unit = 2.0**power if name in ("l1", "l2") else 1.0
        np.testing.assert_allclose(after, unit * before, rtol=1e-9)
        assert cut_by_similarity(after) == cut_by_similarity(before)


def test_similarities_of_whole_gradients_are_numpys_own() -> None:
    layers = vectors(0, 5)
    given = gradients_of(layers)
    cosine = similarity_matrix("cosine", given)
    for i in range(5):
        for j in range(5):
            a, b = layers[i], layers[j]
            expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
            assert cosine[i, j] == pytest.approx(expected, abs=1e-12)
            l1, l2 = (similarity_matrix(name, given)[i, j] for name in ("l1", "l2"))
            assert l1 == pytest.approx(-np.abs(a - b).sum())
            assert l2 == pytest.approx(-np.linalg.norm(a - b))


def test_moments_do_not_tell_directions_apart_but_cosine_does() -> None:
    """What the method can't see: a gradient, its negative, and another of equal width."""
    rng = np.random.default_rng(0)
    first, other = rng.standard_normal((2, 4000))
    other *= first.std() / other.std()
    given = gradients_of(np.stack([first, -first, other]))
    np.testing.assert_allclose(similarity_matrix("rmi", given), 1.0, atol=1e-9)
    cosine = similarity_matrix("cosine", given)
    assert cosine[0, 1] == pytest.approx(-1.0)
    assert abs(cosine[0, 2]) < 0.1


def test_only_chosen_layers_are_compared() -> None:
    """A plan may adapt some layers of what was profiled: the matrices are over all of them."""
    given = gradients_of(vectors(0, 5))
    some = TypeGradients((given.moments[1], given.moments[4]), given.pairs, rows=(1, 4))
    whole = similarity_matrix("cosine", given)
    assert similarity_matrix("cosine", some)[0, 1] == whole[1, 4]


def test_similarity_of_gradients_without_pairs_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no pairs of layers.*pairwise=True"):
        similarity_matrix("cosine", gradients([1.0, 2.0]))
    with pytest.raises(ValueError, match="CalibrationConfig"):
        PlanConfig(topology="e2", similarity="l2")
    PlanConfig(topology="e2", similarity="l2", calibration=CalibrationConfig(pairwise=True))


def test_printed_rmi_is_that_of_concatenated_gradients() -> None:
    """Real concatenation, and the entropy of what comes out."""
    a, b = vectors(3, 2)

    def entropy(values: np.ndarray) -> float:
        return math.log(values.std()) + 0.5 * math.log(2 * math.pi) + 0.5

    joint = entropy(np.concatenate([a, b]))
    expected = (entropy(a) + entropy(b) - joint) / min(entropy(a), entropy(b))
    one, other = gradients_of(np.stack([a, b])).moments
    assert rmi_literal(one, other) == pytest.approx(expected, rel=1e-12)


def test_printed_rmi_refuses_entropies_that_are_not_all_negative() -> None:
    with pytest.raises(ValueError, match=r"all negative.*one of \+0\.033.*'rmi'"):
        similarity_matrix("rmi_literal", gradients([0.01, 0.25]))
    similarity_matrix("rmi_literal", gradients([0.01, 0.24]))


def test_printed_rmi_would_rank_like_layers_last_where_it_is_refused() -> None:
    """Why: with positive entropies equal layers have 1, and others more than that."""
    one, like, other = (moments_of(std) for std in (3.0, 3.0, 9.0))
    assert rmi_literal(one, like) == pytest.approx(1.0)
    assert rmi_literal(one, other) > 1.0


@given(st.lists(st.floats(0.3, 3.0), min_size=3, max_size=10))
def test_printed_rmi_cuts_like_rmi_as_the_loss_is_scaled_down(stds: list[float]) -> None:
    """Unless a similarity lies so near the threshold that the limit isn't reached yet."""
    matrix = similarity_matrix("rmi", gradients(stds))
    off = ~np.eye(len(stds), dtype=bool)
    thresholds = (matrix.sum(1) - 1.0) / (len(stds) - 1)
    near = np.abs(matrix - thresholds[:, None])[off] < 0.05
    if not near.any():
        tiny = similarity_matrix("rmi_literal", gradients([1e-100 * std for std in stds]))
        assert cut_by_similarity(tiny) == cut_by_similarity(matrix)


def test_kl_is_that_of_two_gaussians() -> None:
    """By numerical integration of both divergences."""
    a = Moments(count=9, mean=0.3, std=1.0, mean_abs=1.0)
    b = Moments(count=9, mean=-0.2, std=1.7, mean_abs=1.0)
    x = np.linspace(-20, 20, 400_001)

    def density(m: Moments) -> np.ndarray:
        return np.exp(-0.5 * ((x - m.mean) / m.std) ** 2) / (m.std * math.sqrt(2 * math.pi))

    def divergence(p: np.ndarray, q: np.ndarray) -> float:
        kept = (p > 1e-200) & (q > 1e-200)
        return float(np.sum(p[kept] * np.log(p[kept] / q[kept])) * (x[1] - x[0]))

    p, q = density(a), density(b)
    both = divergence(p, q) + divergence(q, p)
    assert kl(a, b) == pytest.approx(math.exp(-both), rel=1e-6)


@given(st.floats(1e-6, 1e3), st.floats(1.0, 1e3))
def test_rmi_is_the_published_one_without_its_scale(std: float, ratio: float) -> None:
    """1 − δ/(½ ln 2) with δ = H_max − H_joint, by merging the moments (equal counts, no means)."""
    a, b = moments_of(std), moments_of(std * ratio)
    delta = max(a.entropy, b.entropy) - merge([a, b]).entropy
    assert math.isclose(rmi(a, b), 1 - delta / (0.5 * math.log(2)), abs_tol=1e-9)


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_rmi_falls_with_the_distance_of_the_widths(a: float, b: float, c: float) -> None:
    low, middle, high = map(moments_of, sorted((a, b, c)))
    assert 0 < rmi(low, high) <= rmi(low, middle) <= 1
