"""Moments merge exactly, and a profile is read back as it was written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import ValidationError

from e2lora.moments import (
    GradientProfile,
    LayerGradient,
    Moments,
    Provenance,
    Target,
    merge,
    require_usable,
)

# A busy machine makes examples slow: that says nothing about the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

entries = st.floats(-1e3, 1e3, allow_subnormal=False)
gradients = hnp.arrays(np.float64, st.integers(1, 30), elements=entries)
positive = st.floats(1e-12, 1e12)


def moments_of(gradient: NDArray[np.float64]) -> Moments:
    """The definition, by NumPy."""
    return Moments(
        count=gradient.size,
        mean=float(gradient.mean()),
        std=float(gradient.std(ddof=0)),
        mean_abs=float(np.abs(gradient).mean()),
    )


def assert_close(a: Moments, b: Moments, scale: float) -> None:
    assert a.count == b.count
    for name in ("mean", "std", "mean_abs"):
        assert math.isclose(getattr(a, name), getattr(b, name), abs_tol=1e-10 * scale), name


@given(st.lists(gradients, min_size=1, max_size=5))
def test_joint_moments_equal_those_of_concatenated_gradients(
    parts: list[NDArray[np.float64]],
) -> None:
    joint = np.concatenate(parts)
    merged = merge(moments_of(part) for part in parts)
    assert_close(merged, moments_of(joint), scale=max(float(np.abs(joint).max()), 1e-6))


def test_merged_width_counts_the_distance_of_the_means() -> None:
    """Two constants, 0 and 6, of counts 1 and 2: mean 4, variance (16 + 2·4)/3 = 8."""
    zero = Moments(count=1, mean=0.0, std=0.0, mean_abs=0.0)
    six = Moments(count=2, mean=6.0, std=0.0, mean_abs=6.0)
    joint = merge([zero, six])
    assert (joint.count, joint.mean, joint.mean_abs) == (3, 4.0, 4.0)
    assert math.isclose(joint.std, math.sqrt(8.0))


@given(gradients)
def test_moments_from_sums_equal_numpys(gradient: NDArray[np.float64]) -> None:
    sums = (gradient.sum(), np.square(gradient).sum(), np.abs(gradient).sum())
    found = Moments.from_sums(gradient.size, *map(float, sums))
    # Subtracting squares loses half of the digits where the spread is small beside the mean.
    size = max(float(np.abs(gradient).max()), 1e-6)
    assert math.isclose(found.std, float(gradient.std()), abs_tol=1e-6 * size)
    assert math.isclose(found.mean, float(gradient.mean()), abs_tol=1e-10 * size)
    assert math.isclose(found.mean_abs, float(np.abs(gradient).mean()), abs_tol=1e-10 * size)


def test_rounding_never_makes_a_variance_negative() -> None:
    assert Moments.from_sums(3, 0.3, 0.03 - 1e-17, 0.3).std == 0.0


@given(positive)
def test_entropy_is_that_of_a_gaussian_of_the_same_width(std: float) -> None:
    from scipy.stats import norm

    moments = Moments(count=9, mean=5.0, std=std, mean_abs=5.0)
    assert math.isclose(moments.entropy, float(norm(5.0, std).entropy()), abs_tol=1e-9)


@given(positive, positive)
def test_wider_gradients_have_more_entropy(a: float, b: float) -> None:
    low, high = (Moments(count=1, mean=0, std=std, mean_abs=0) for std in sorted((a, b)))
    assert low.entropy <= high.entropy


PROVENANCE: dict[str, Any] = {
    "model": "tiny",
    "model_fingerprint": "0123456789abcdef",
    "task": "reviews",
    "num_samples": 8,
    "num_supervised": 8,
    "seed": 0,
    "dtype": "float32",
    "mean_loss": 0.69,
    "method": "blocks",
    "num_workers": 1,
    "versions": {"torch": "2"},
}


def make_profile(stds: list[float]) -> GradientProfile:
    return GradientProfile(
        provenance=Provenance(**PROVENANCE),
        layers=tuple(
            LayerGradient(
                target=Target(
                    path=f"h.{layer}.q",
                    module_type="h.*.q",
                    layer=layer,
                    in_features=4,
                    out_features=4,
                ),
                moments=Moments(count=16, mean=0.1, std=std, mean_abs=std),
            )
            for layer, std in enumerate(stds)
        ),
    )


@given(st.lists(positive, min_size=1, max_size=6))
def test_profile_is_read_back_bit_for_bit(stds: list[float]) -> None:
    profile = make_profile(stds)
    again = GradientProfile.model_validate_json(profile.model_dump_json(indent=1))
    assert again == profile
    assert again.fingerprint() == profile.fingerprint()


def test_any_changed_number_changes_the_fingerprint() -> None:
    profile = make_profile([1.0, 2.0])
    other = make_profile([1.0, math.nextafter(2.0, 3.0)])
    assert profile.fingerprint() != other.fingerprint()
    seeded = profile.provenance.model_copy(update={"seed": 1})
    assert profile.model_copy(update={"provenance": seeded}).fingerprint() != profile.fingerprint()


def test_layers_of_a_type_come_in_order_of_depth() -> None:
    """2 before 10: by number, not by name."""
    profile = make_profile([1.0] * 11)
    shuffled = profile.model_copy(update={"layers": profile.layers[::-1]})
    found = [entry.target.layer for entry in shuffled.by_module_type()["h.*.q"]]
    assert found == list(range(11))


def test_unknown_key_is_refused() -> None:
    text = make_profile([1.0]).model_dump_json().replace('"std"', '"sdt"')
    with pytest.raises(ValidationError, match="sdt"):
        GradientProfile.model_validate_json(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_width_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="std"):
        Moments(count=1, mean=0.0, std=value, mean_abs=0.0)


def test_dead_gradient_is_named_with_the_remedy() -> None:
    profile = make_profile([1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match=r"1 got none: h\.1\.q\..*target_modules"):
        require_usable((entry.target, entry.moments) for entry in profile.layers)
    require_usable((profile.layers[k].target, profile.layers[k].moments) for k in (0, 2))
