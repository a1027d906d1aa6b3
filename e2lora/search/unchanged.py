"""Whether a study goes on with the space it began with."""

from __future__ import annotations

from e2lora.config import Study, TrialConfig, in_one_paragraph
from e2lora.preflight import differences, with_absolute_paths
from e2lora.records import StudyFolder, TrialFolder
from e2lora.search.plans import configuration_of_point


class ChangedSpace(RuntimeError):
    """The space of a resumed study isn't the one that its trials came from."""


def require_same_space(study: Study, folder: StudyFolder) -> None:
    """Every trial there is must be what the space makes of its suggestions now.

    Raises:
        ChangedSpace: naming the first that isn't, and what differs.
    """
    for trial in folder.trial_folders():
        if not trial.suggestion_file.exists():
            continue
        try:
            config = configuration_of_point(study, trial.suggestion().params)
        except ValueError as error:
            if trial.result() is not None and not trial.plan_file.exists():
                continue  # refused then, as now
            raise ChangedSpace(
                "a resumed study must have the space it began with; it no longer accepts trial "
                f"{trial.number}: {in_one_paragraph(error)} Go back to that space, or use another "
                "--study name."
            ) from error
        require_same(trial, with_absolute_paths(config))


def require_same(trial: TrialFolder, config: TrialConfig) -> None:
    """
    Raises:
        ChangedSpace: naming the fields in which the recorded configuration differs.
    """
    recorded = trial.config()
    if recorded.identity() == config.identity():
        return
    if config.plan.target_parameters is not None:  # the rank follows: it is no difference
        config = config.model_copy(update={"plan": config.plan.at_rank(recorded.plan.r)})
    raise ChangedSpace(
        f"a resumed study must have the space it began with; trial {trial.number} differs in "
        f"{'; '.join(differences(recorded, config))}. Go back to that space, or use another "
        "--study name."
    )
