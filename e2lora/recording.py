"""What the broker accepted of a trial → its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from e2lora.broker import Update
from e2lora.records import Evaluation, TrialFolder, TrialResult, write_json, write_text


def record(folder: TrialFolder, number: int, update: Update, adapter_parameters: int = 0) -> None:
    """Bring a trial's folder up to what the broker accepted; ``result.json`` comes last.

    Args:
        adapter_parameters: as the plan counts them, of a trial that doesn't end by itself.
    """
    evaluations = [Evaluation(**evaluation) for evaluation in update.evaluations]
    if evaluations:
        lines = [evaluation.model_dump_json() + "\n" for evaluation in evaluations]
        write_text(folder.metrics_file, "".join(lines))
        write_json(folder.outcomes_file, update.outcomes)
        write_json(folder.steps_file, _finite(update.history))
    if update.ended:
        result = update.result or {}
        last = evaluations[-1].metrics if update.stopped and evaluations else {}
        write_json(
            folder.result_file,
            TrialResult(
                number=number,
                state=state_of(update),
                failure=update.failure,
                metrics=result.get("metrics", last),
                test_metrics=result.get("test_metrics", {}),
                adapter_parameters=result.get("adapter_parameters", adapter_parameters),
                head_parameters=result.get("head_parameters", 0),
                seconds=result.get("seconds", update.held_seconds),
                attempts=update.attempts,
                error=update.error,
                gradient_accumulation_steps=result.get("gradient_accumulation_steps"),
            ),
        )


def state_of(update: Update) -> Literal["complete", "stopped", "failed"]:
    """Of a job that has ended."""
    if update.stopped:
        return "stopped"
    return "failed" if update.error is not None else "complete"


def _finite(history: Mapping[str, Sequence[float]]) -> dict[str, list[float | None]]:
    """JSON knows no other numbers: a step that fp16 skipped has no gradient's norm."""
    return {
        name: [value if math.isfinite(value) else None for value in values]
        for name, values in history.items()
    }
