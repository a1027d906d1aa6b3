"""From names and places, as a command line gives them, to a running study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from e2lora.cluster import connect, is_of_the_cluster
from e2lora.command import find_study, require_name, run_for_user, storage_folder


@dataclass(frozen=True)
class Words:
    """What a command line says of a study, and of how it is run."""

    space: str
    study: str | None = None
    storage: Path | None = None
    trials: int | None = None
    seeds: int = 0
    sampler: str | None = None
    dry_run: bool = False
    max_hours: float | None = None
    isolated: bool = False
    retry_failed: bool = False
    ledger: str | None = None
    register: str | None = None
    may_grow: bool = False


def search_command(words: Words) -> int:
    """Run or resume a study and say how it ended: 0, or an exit code with the reason printed.

    1: trials failed. 2: the study could not start. 130: interrupted, or its hours were over.
    """
    return run_for_user(
        lambda: _search(words), "the same command with the same --study goes on", _is_for_users
    )


def _search(words: Words) -> int:
    study = find_study(words.space)
    if words.sampler is not None:
        study = replace(study, sampler=words.sampler)
    name = words.study or words.space.rpartition(".")[2]
    require_name("--study", name)
    for option, least, value in (
        ("--trials", 1, words.trials),
        ("--seeds", 2, words.seeds or None),
        ("--max-hours", 0, words.max_hours),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}; got {value}. Correct it.")
    connect()
    from e2lora.search.cost import dry_run
    from e2lora.search.study import Options, run_study

    storage = storage_folder(words.storage)
    options = Options(
        num_trials=words.trials,
        num_seeds=words.seeds,
        isolated=words.isolated,
        retry_failed=words.retry_failed,
        max_hours=words.max_hours,
        ledger=words.ledger,
        register=words.register,
        may_grow=words.may_grow,
    )
    if words.dry_run:
        print(dry_run(study, storage, words.trials or study.num_trials, words.seeds))
        return 0
    outcome = run_study(study, words.space, name, storage, options)
    if outcome.unfinished:
        print(
            f"unfinished: ended trials are kept; the same command with --study {name} goes on",
            flush=True,
        )
    return outcome.exit_code


def _is_for_users(error: Exception) -> bool:
    from ray.tune.error import TuneError

    return is_of_the_cluster(error) or isinstance(error, TuneError)
