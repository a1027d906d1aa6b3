"""Every topology covers every layer once; E² cuts where the method says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2lora.config import PlanConfig
from e2lora.moments import Moments, merge
from e2lora.partition import (
    NEEDS_PROFILE,
    SIMILARITIES,
    TOPOLOGIES,
    cut_by_similarity,
    rmi,
    similarity_matrix,
)

# A busy machine makes examples slow: that says nothing about the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

sigmas = st.lists(st.floats(1e-8, 1e3), min_size=1, max_size=24)


def gradients(stds: list[float]) -> list[Moments]:
    return [Moments(count=64, mean=0.0, std=std, mean_abs=std) for std in stds]


def options(topology: str) -> PlanConfig:
    size = 2 if topology == "blocks" else None
    return PlanConfig(topology=topology, block_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@given(stds=st.lists(st.floats(1e-8, 1e3), min_size=2, max_size=24))
def test_partition_holds_each_layer_once_and_in_order(topology: str, stds: list[float]) -> None:
    """The contract of every entry of the registry."""
    moments = gradients(stds) if topology in NEEDS_PROFILE else None
    partition = TOPOLOGIES[topology](len(stds), options(topology), moments)
    assert all(partition)
    assert [layer for interval in partition for layer in interval] == list(range(len(stds)))
    assert TOPOLOGIES[topology](len(stds), options(topology), moments) == partition


def test_fixed_topologies_of_five_layers() -> None:
    assert TOPOLOGIES["none"](5, options("none"), None) == ((0,), (1,), (2,), (3,), (4,))
    assert TOPOLOGIES["all"](5, options("all"), None) == ((0, 1, 2, 3, 4),)
    assert TOPOLOGIES["blocks"](5, options("blocks"), None) == ((0, 1), (2, 3), (4,))


def test_block_longer_than_the_stack_is_refused() -> None:
    wide = PlanConfig(topology="blocks", block_size=6)
    with pytest.raises(ValueError, match="block_size=6 for 5 layers"):
        TOPOLOGIES["blocks"](5, wide, None)


def test_block_size_without_blocks_is_refused() -> None:
    for topology, size in (("blocks", None), ("e2", 2)):
        with pytest.raises(ValueError, match="block_size"):
            PlanConfig(topology=topology, block_size=size)  # type: ignore[arg-type]


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


@given(st.floats(1e-8, 1e3), st.floats(1e-8, 1e3))
def test_two_layers_always_share(a: float, b: float) -> None:
    assert cut_by_similarity(similarity_matrix("rmi", gradients([a, b]))) == ((0, 1),)


@pytest.mark.parametrize("name", SIMILARITIES)
@given(stds=sigmas)
def test_similarity_is_symmetric_and_highest_for_the_layer_itself(
    name: str, stds: list[float]
) -> None:
    matrix = similarity_matrix(name, gradients(stds))
    assert (matrix == matrix.T).all()
    assert (matrix <= np.diag(matrix)).all()


@given(st.floats(1e-6, 1e3), st.floats(1.0, 1e3))
def test_rmi_is_the_published_one_without_its_scale(std: float, ratio: float) -> None:
    """1 − δ/(½ ln 2) with δ = H_max − H_joint, by merging the moments (equal counts, no means)."""
    a, b = gradients([std, std * ratio])
    delta = max(a.entropy, b.entropy) - merge([a, b]).entropy
    assert math.isclose(rmi(a, b), 1 - delta / (0.5 * math.log(2)), abs_tol=1e-9)


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_rmi_falls_with_the_distance_of_the_widths(a: float, b: float, c: float) -> None:
    low, middle, high = gradients(sorted((a, b, c)))
    assert 0 < rmi(low, high) <= rmi(low, middle) <= 1
