"""From the words of a command line to one trained run: what ``jobs/train.py`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from e2lora.cluster import is_of_the_cluster
from e2lora.command import pairs_of, require_name, run_for_user, storage_folder
from e2lora.records import StudyFolder
from e2lora.single import Run, train
from e2lora.single.choice import Choice, from_file, from_space, from_study

DEFAULT_SPACE = "search_spaces.quickstart"


@dataclass(frozen=True)
class Words:
    """What a command line says. Of space, trial and study at most one is given."""

    space: str | None = None
    trial: Path | None = None
    study: str | None = None
    best: bool = False
    number: int | None = None
    sets: Sequence[str] = ()
    name: str | None = None
    workers: str | None = None
    storage: Path | None = None


def train_command(words: Words) -> int:
    """Train or resume a run and say how it ended: 0, or an exit code with the reason printed.

    1: it failed. 2: it could not start. 130: interrupted.
    """
    return run_for_user(
        lambda: train(run_of(words)),
        "checkpoints are kept; the same command goes on from the newest",
        is_of_the_cluster,
    )


def run_of(words: Words) -> Run:
    """
    Raises:
        ValueError, OSError: what the words ask for doesn't exist, or contradicts itself.
    """
    storage = storage_folder(words.storage)
    choice = _choice_of(words, storage)
    min_workers = None
    if words.workers is not None:
        if any(word.startswith("training.num_workers=") for word in words.sets):
            raise ValueError(
                f"--workers says how many workers there are; got {words.workers} and "
                "training.num_workers too. Leave one out."
            )
        min_workers, most = workers_of(words.workers)
        training = choice.config.training
        require_divisible(training.global_batch_size, min_workers or most, most)
        spread = choice.config.model_copy(update={"training": training.on_workers(most)})
        choice = replace(choice, config=spread)
    name = words.name or f"train-{choice.label}-{choice.config.identity()[:6]}"
    require_name("--name", name)
    return Run(choice, name, storage, min_workers)


def _choice_of(words: Words, storage: Path) -> Choice:
    given = [
        option
        for option, value in (
            ("--space", words.space),
            ("--trial", words.trial),
            ("--from-study", words.study),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(
            f"a run is from one of --space, --trial and --from-study; got {', '.join(given)}. "
            "Leave out all but one."
        )
    if (words.best or words.number is not None) and words.study is None:
        raise ValueError(
            "--best and --trial-number choose among the trials of a study; got no --from-study. "
            "Add it, or leave them out."
        )
    if words.best and words.number is not None:
        raise ValueError(
            f"--best and --trial-number choose one trial each; got both (number {words.number}). "
            "Leave one out."
        )
    values = pairs_of("--set", words.sets)
    if words.trial is not None:
        return from_file(words.trial, values)
    if words.study is not None:
        require_name("--from-study", words.study)
        folder = StudyFolder(storage.expanduser().resolve(), words.study)
        return from_study(folder, words.number, values)
    return from_space(words.space or DEFAULT_SPACE, values)


def require_divisible(global_batch_size: int, least: int, most: int) -> None:
    """Every number of workers that a run may have must share its batches out evenly.

    Raises:
        ValueError: with the numbers that don't.
    """
    uneven = [number for number in range(least, most + 1) if global_batch_size % number]
    if uneven:
        raise ValueError(
            "every number of workers that --workers allows must divide training.global_batch_size; "
            f"{global_batch_size} rows can't be shared out evenly by "
            f"{', '.join(map(str, uneven))} worker(s). Change one of the two."
        )


def workers_of(text: str) -> tuple[int | None, int]:
    """``"4"``, or ``"2:4"`` for an elastic group; the least is None for the first form.

    >>> workers_of("4"), workers_of("2:4")
    ((None, 4), (2, 4))

    Raises:
        ValueError: another form.
    """
    few, colon, most = text.rpartition(":")
    numbers = [few, most] if colon else [most]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        numbers = ["0"]
    least, many = int(numbers[0]), int(numbers[-1])
    if not 0 < least <= many:
        raise ValueError(
            f"--workers is a number, or the least and the most as 2:4; got {text!r}. Correct it."
        )
    return (least if colon else None), many
