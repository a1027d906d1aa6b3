"""From names and places, as a command line gives them, to a running study."""

from __future__ import annotations

from pathlib import Path

from e2lora.cluster import connect, is_of_the_cluster
from e2lora.command import default_storage, find_study, require_name, run_for_user


def run_command(
    space: str, num_trials: int | None, storage: Path | None, name: str | None, isolated: bool
) -> int:
    """Run or resume a study and say how it ended: 0, or an exit code with the reason printed.

    1: trials failed. 2: the study could not start. 130: interrupted.
    """

    def run() -> int:
        study = find_study(space)
        study_name = name or space.rpartition(".")[2]
        require_name("--study", study_name)
        if num_trials is not None and num_trials < 1:
            raise ValueError(f"--trials must be at least 1; got {num_trials}.")
        connect()
        from e2lora.search.study import run_study

        outcome = run_study(
            study, space, study_name, storage or default_storage(), num_trials, isolated
        )
        if outcome.unfinished:
            print(
                "unfinished: ended trials are kept; the same command with "
                f"--study {outcome.folder.name} goes on",
                flush=True,
            )
        return outcome.exit_code

    return run_for_user(run, "the same command with the same --study goes on", _is_for_users)


def _is_for_users(error: Exception) -> bool:
    from ray.tune.error import TuneError

    return is_of_the_cluster(error) or isinstance(error, TuneError)
