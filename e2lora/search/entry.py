"""From names and places, as a command line gives them, to a running study."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import re
import sys
from pathlib import Path

from e2lora.config import Study, in_one_paragraph
from e2lora.records import is_thrown_away

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def run_command(
    space: str, num_trials: int | None, storage: Path | None, name: str | None, isolated: bool
) -> int:
    """Run or resume a study and say how it ended: 0, or an exit code with the reason printed.

    1: trials failed. 2: the study could not start. 130: interrupted.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        study = find_study(space)
        name = name or space.rpartition(".")[2]
        _require_usable(name, num_trials)
        _connect()
        from e2lora.search.study import run_study

        outcome = run_study(
            study,
            space,
            name,
            storage or default_storage(),
            num_trials,
            isolated,
        )
    except Exception as error:
        if not _is_for_users(error):
            raise
        print(f"error: {in_one_paragraph(error)}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command with the same --study goes on", file=sys.stderr)
        return 130
    if outcome.unfinished:
        print(
            "unfinished: ended trials are kept; the same command with "
            f"--study {outcome.folder.name} goes on",
            flush=True,
        )
    return outcome.exit_code


def _is_for_users(error: Exception) -> bool:
    """Errors that tell what to do, and what Ray says of a cluster that broke; not our own bugs."""
    from ray.exceptions import RayError
    from ray.tune.error import TuneError

    return isinstance(error, ValueError | OSError | RuntimeError | RayError | TuneError)


def find_study(space: str) -> Study:
    """Import a space and take its ``study``.

    Raises:
        ValueError: no such module, or no study in it; the message lists the shipped ones.
    """
    try:
        module = importlib.import_module(space)
    except ModuleNotFoundError as error:
        if error.name is None or not space.startswith(error.name):
            raise
        raise ValueError(
            f"--space must be a module that can be imported; {space!r} is none. Shipped: "
            f"{', '.join(_shipped())}. For your own, run from the folder that holds it."
        ) from error
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise ValueError(
            f"a space must define `study`, a Study; {space!r} has {type(study).__name__}. See "
            "search_spaces/quickstart.py."
        )
    return study


def _shipped() -> list[str]:
    import search_spaces

    names = [module.name for module in pkgutil.iter_modules(search_spaces.__path__)]
    return [f"search_spaces.{name}" for name in sorted(names)]


def default_storage() -> Path:
    """``results`` here; for a submitted job, whose folder is a passing copy, in the home folder."""
    here = Path.cwd()
    return Path.home() / "e2lora-results" if is_thrown_away(here) else here / "results"


def _require_usable(name: str, num_trials: int | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            "--study names a folder and Ray actors: letters, digits, '.', '_' and '-', a letter or "
            f"digit first; got {name!r}."
        )
    if num_trials is not None and num_trials < 1:
        raise ValueError(f"--trials must be at least 1; got {num_trials}.")


def _connect() -> None:
    """To the cluster of RAY_ADDRESS, which a submitted job has; else a Ray of this process's own.

    Left to itself Ray would look for the last one that ran here, and wait for it if it was killed.
    """
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
