"""What the commands in ``jobs/`` share: quiet libraries, spaces by name, errors a user can read."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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

FOR_USERS: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError)
"""Errors that tell what to do; others are our own bugs, and keep their traceback."""


def run_for_user(
    run: Callable[[], int], on_interrupt: str, also: Callable[[Exception], bool] = lambda e: False
) -> int:
    """The command's exit code: that of ``run``, or 2 with its error printed, or 130.

    Args:
        on_interrupt: what is printed after Ctrl-C.
        also: whether an error that isn't in ``FOR_USERS`` is one for users too.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return run()
    except KeyboardInterrupt:
        print(f"interrupted: {on_interrupt}", file=sys.stderr)
        return 130
    except Exception as error:
        if not (isinstance(error, FOR_USERS) or also(error)):
            raise
        print(f"error: {in_one_paragraph(error)}", file=sys.stderr, flush=True)
        return 2


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


def require_name(option: str, name: str) -> None:
    """Raises:
    ValueError: it can't name a folder and actors of Ray.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            f"{option} names a folder and Ray actors: letters, digits, '.', '_' and '-', a letter "
            f"or digit first; got {name!r}. Choose another name."
        )


@contextmanager
def held_alone(folder: Path, what: str, option: str) -> Iterator[None]:
    """One process at a time may work in a folder; the lock goes with the process that holds it.

    Args:
        what: that the folder holds, as ``"a study"``.
        option: of the command, that names it.

    Raises:
        ValueError: another process works there now.
    """
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        with lock:
            yield
    except Timeout as error:
        raise ValueError(
            f"{what} is run by one process at a time; another one runs {folder} now. Wait for it, "
            f"or give this one another {option} name."
        ) from error


def storage_folder(given: Path | None) -> Path:
    """What --storage names, else ``results`` here; for a submitted job, whose folder is a passing
    copy, in the home folder.

    Raises:
        ValueError: a URL.
    """
    if given is not None:
        if scheme := re.match(r"([a-z][a-z0-9]+):/", str(given)):
            raise ValueError(
                "--storage must be a folder that all nodes share, for files are renamed, appended "
                f"to and locked there; got a place on {scheme[1]}. Mount a shared file system "
                "(NFS, EFS, Filestore, FSx, JuiceFS …) and name its folder; MLflow's artefacts may "
                "lie in an object store."
            )
        return given
    here = Path.cwd()
    return Path.home() / "e2lora-results" if is_thrown_away(here) else here / "results"


def pairs_of(option: str, words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words; a value that is JSON is read as such, ``@FILE`` from there, others are text.

    >>> pairs_of("--plan", ["r=16", "similarity=cosine", "use_rslora=true"])
    {'r': 16, 'similarity': 'cosine', 'use_rslora': True}

    Raises:
        ValueError: another form, or a key twice.
    """
    pairs: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key or key in pairs:
            raise ValueError(
                f"options of {option} are written KEY=VALUE, each key once; got {word!r} in "
                f"{' '.join(words)!r}. Correct it."
            )
        if value.startswith("@"):
            value = Path(value[1:]).expanduser().read_text(encoding="utf-8")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError as error:
            if value.lstrip()[:1] in ("[", "{"):
                raise ValueError(
                    f"a value that begins with [ or {{ must be JSON; {key} of {option} is not: "
                    f"{error}. Quote it for the shell, or write it to a file: {key}=@FILE."
                ) from error
            pairs[key] = value
    return pairs
