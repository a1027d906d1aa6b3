"""Which trials a pruner ends, from curves that are written out."""

from __future__ import annotations

from typing import Any

import pytest

from e2lora.config import Pruner
from e2lora.search.pruning import is_hopeless


@pytest.mark.parametrize("name", ["asha", "median"])
def test_pruner_ends_the_bad_and_keeps_the_good_whatever_runs_beside(name: Any) -> None:
    pruner = Pruner(name=name, min_steps=2, reduction_factor=2)
    better = [[(2, 0.6 + n / 100), (4, 0.7 + n / 100)] for n in range(6)]
    running = [[(2, 0.65)]]
    for direction, sign in (("maximize", 1.0), ("minimize", -1.0)):
        signed = [[(s, sign * v) for s, v in c] for c in better]
        others = [[(s, sign * v) for s, v in c] for c in running]
        told: Any = (signed, others, pruner, direction)
        assert is_hopeless([(2, sign * 0.1)], *told)
        assert not is_hopeless([(2, sign * 0.9)], *told)
    assert not is_hopeless([(1, 0.1)], better, running, pruner, "maximize"), "before min_steps"
    assert not is_hopeless([(2, 0.1)], [], [], pruner, "maximize") or name == "asha"
