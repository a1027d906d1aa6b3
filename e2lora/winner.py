"""The trial of a study that is best by its first objective: what is trained on, or deployed."""

from __future__ import annotations

from e2lora.config import Objective
from e2lora.records import StudyFolder, TrialFolder, TrialResult


def best_trial(folder: StudyFolder) -> tuple[TrialFolder, str]:
    """The complete trial that is best by the study's first objective, and why it is.

    Among equals the first one.

    Raises:
        ValueError: no trial is complete.
    """
    objective: Objective = folder.record().objectives[0]
    scored: list[tuple[float, TrialFolder]] = []
    for trial in folder.trial_folders():
        result: TrialResult | None = trial.result()
        if result is not None and result.state == "complete":
            scored.append((result.value(objective.name), trial))
    if not scored:
        raise ValueError(
            f"the best trial is one of those that are complete; study {folder.name!r} has none. "
            "Let it go on (jobs/search.py), or choose a trial by --trial-number."
        )
    sign = 1 if objective.direction == "maximize" else -1
    value, trial = max(scored, key=lambda pair: sign * pair[0])
    return trial, f"the best of {len(scored)}: {objective.name} {value:.6g}"
