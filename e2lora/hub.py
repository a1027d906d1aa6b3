"""What a hub has, in this node's cache: brought there once, used from there while the hub is away.

Every process of a node asks the hub anew which commit a name means now; files come once, under
the locks of ``huggingface_hub``. ``HF_HUB_OFFLINE=1`` asks nothing.
"""

from __future__ import annotations

import json
import sys
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

PATIENCE = 10.0
"""Seconds in which a hub must answer; the libraries' own requests may wait for minutes, each."""

BELIEVED = 60.0
"""Seconds for which a process holds the hub for what it has found it to be."""

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first that a model has
NEITHER = ("*/*", "*.md", ".git*", "*.py", "*.png", "*.jpg", "*.pdf")  # folders: other formats
FORMATS = (
    *("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf"),
    *("*.pt", "*.pth", "*.ckpt", "*.tflite", "*.mlmodel", "*.npz", "*.pkl"),
)

AWAY_REMEDY = (
    "Check the network and your access to the hub, bring it to every node before by `python "
    "jobs/doctor.py --stage` with the study's --space, put it below the folder that E2LORA_MIRROR "
    "names"
)


def absence() -> str | None:
    """Why the hub can't be asked; None: it answers.

    A hub that is away is known once, and not by every request of every library: those try for 23 s
    where a connection is refused, and without an end where nothing answers.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE says that no hub is asked"
    return _absence(constants.ENDPOINT, int(time.monotonic() // BELIEVED))


@lru_cache(maxsize=1)
def _absence(endpoint: str, period: int) -> str | None:
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().head(endpoint, timeout=PATIENCE)
    except Exception as error:  # of the HTTP library, which is the hub client's own choice
        return f"{endpoint} can't be reached ({first_line(error)})"
    return f"{endpoint} answers with {answer.status_code}" if _is_down(answer.status_code) else None


def _is_down(status: int) -> bool:
    return status in (500, 502, 503, 504)


def from_hub(name: str, revision: str | None, weights: bool) -> Path:
    """The folder of a hub's model in this node's cache, brought there where it isn't.

    Args:
        weights: False: all but them.

    Raises:
        OSError: neither the hub gives it nor does the cache hold it; with the remedy.
    """
    from huggingface_hub.errors import HFValidationError

    away = absence()
    cause: Exception | None = None
    if away is None:
        try:
            return _download(name, _commit(name, revision), weights)
        except Exception as error:  # of the hub's client and its HTTP library
            cause = error
            response = getattr(error, "response", None)
            refused = response is not None and not _is_down(response.status_code)
            if not refused and not isinstance(error, HFValidationError):
                away = f"fetching it fails ({first_line(error)})"
    kept = _kept(name, revision, weights)
    if kept is not None:
        _tell_once(name, kept, away or first_line(cause))
        return kept
    raise OSError(_no_model(name, revision, away, cause)) from cause


@cache  # what raises isn't kept
def _commit(name: str, revision: str | None) -> str:
    """One for all that a process reads of a model, also where the hub's changes meanwhile."""
    from huggingface_hub import HfApi

    return HfApi().resolve_revision(name, revision=revision).resolved


@cache
def _download(name: str, commit: str, weights: bool) -> Path:
    """Bring what isn't there: text files, and the weights in one form."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download

    folder = snapshot_download(name, revision=commit, ignore_patterns=[*NEITHER, *FORMATS])
    if weights:
        files = [Path(file.path) for file in get_cached_repo_tree(name, revision=commit)]
        has = [form for form in WEIGHTS if any(file.match(form) for file in files)]
        if has:
            snapshot_download(
                name, revision=commit, allow_patterns=has[:1], ignore_patterns=list(NEITHER)
            )
    return Path(folder)


def _kept(name: str, revision: str | None, weights: bool) -> Path | None:
    """The folder in the cache, whoever has filled it; None: what is needed isn't there."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        commit = HfApi().resolve_revision(name, revision=revision, local_files_only=True).resolved
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    except (RevisionResolutionError, HFValidationError):
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if not weights or _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    """Whether one of the forms of a model's weights is there, and whole."""
    indices = folder.glob("*.index.json")
    parts = [set(json.loads(index.read_text())["weight_map"].values()) for index in indices]
    parts += [{"model.safetensors"}, {"pytorch_model.bin"}]
    return any(all((folder / file).exists() for file in form) for form in parts)


@cache
def _tell_once(name: str, folder: Path, reason: str) -> None:
    print(
        f"{name} is taken from this node's cache, {folder}, as it was when it came: {reason}",
        file=sys.stderr,
    )


def _no_model(name: str, revision: str | None, away: str | None, cause: Exception | None) -> str:
    wanted = f"{name!r}" + (f" at {revision!r}" if revision else "")
    if away is None:
        return (
            f"the model must be a local folder, demo:NAME or a hub name that can be reached; got "
            f"{wanted}: {first_line(cause)} {remedy('model', name, cause)}"
        )
    return (
        f"the model must be a local folder, demo:NAME or a hub name that can be reached; got "
        f"{wanted}, which isn't whole in this node's cache, and {away}. {AWAY_REMEDY}, or name a "
        "local folder."
    )


def remedy(kind: Literal["model", "dataset"], name: str, error: Exception | None) -> str:
    """What to do where the hub has refused a model or a data set."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    # `datasets` tells of a gated set in words alone
    if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return (
            f"It is gated: its owner decides who gets it. Ask for access on {page}, and give every "
            "node that account's token: HF_TOKEN, a file that HF_TOKEN_PATH names, or `hf auth "
            "login` there."
        )
    if isinstance(error, RevisionNotFoundError):
        return "Name a branch, a tag or a commit that it has as `revision`."
    return (
        "Check the name, your access to the hub (HF_TOKEN on every node, if it is private), or "
        "name a local folder."
    )


def first_line(error: BaseException | None) -> str:
    """
    >>> first_line(OSError("no such file\\nat all"))
    'OSError: no such file'
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
