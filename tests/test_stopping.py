"""Which evaluation is kept, and when there is no more use in going on."""

from __future__ import annotations

import pytest

from e2lora.config import EarlyStopping
from e2lora.records import Evaluation
from e2lora.training.stopping import best_of, is_over, require_metric

LOSS = EarlyStopping(metric="loss", patience=2)
ACCURACY = EarlyStopping(metric="accuracy", direction="maximize", patience=2, min_delta=0.05)


def evaluations(metric: str, *values: float) -> list[Evaluation]:
    return [Evaluation(step=10 * i, metrics={metric: v}) for i, v in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("stopping", "values", "best", "over"),
    [
        (LOSS, (1.0,), 10, False),
        (LOSS, (1.0, 0.5, 0.6), 20, False),
        (LOSS, (1.0, 0.5, 0.6, 0.7), 20, True),
        (LOSS, (1.0, 0.5, 0.5, 0.5), 20, True),
        (LOSS, (1.0, 2.0, 0.9, 0.8), 40, False),
        (ACCURACY, (0.5, 0.6, 0.64, 0.645), 20, True),
        (ACCURACY, (0.5, 0.6, 0.64, 0.66), 40, False),
        (None, (1.0, 0.5, 0.6, 0.7), 40, False),
    ],
)
def test_best_is_kept_and_patience_counted_from_it(
    stopping: EarlyStopping | None, values: tuple[float, ...], best: int, over: bool
) -> None:
    found = evaluations(stopping.metric if stopping else "loss", *values)
    assert best_of(found, stopping).step == best
    assert is_over(found, stopping) == over


def test_nothing_evaluated_yet_is_not_over() -> None:
    assert not is_over([], LOSS)


def test_metric_that_the_task_lacks_is_refused() -> None:
    require_metric(LOSS, {"loss": "minimize"})
    require_metric(None, {})
    with pytest.raises(ValueError, match=r"metric='loss'.*\['accuracy'\].*Correct"):
        require_metric(LOSS, {"accuracy": "maximize", "loss": None})


def test_direction_that_is_not_the_metrics_is_refused() -> None:
    require_metric(ACCURACY, {"accuracy": "maximize"})
    with pytest.raises(ValueError, match=r"is one to minimize; got.*'maximize'.*Correct"):
        require_metric(ACCURACY, {"accuracy": "minimize"})
