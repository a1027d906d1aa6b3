"""Files under a URI, copied once per node into the user's cache.

FOLDER/remote/KEY/…     the files as they were; KEY names the URI, and every file's size and time

A path of a shared file system is read in place; its ``file://`` URI is copied as any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock

from e2lora.assets import cache_root
from e2lora.masking import holds_password, without_passwords

URI = re.compile(r"[a-z][a-z0-9+.-]*://")
GCS_PATIENCE = "retry_limit_seconds=20"  # of gs:// URIs, where pyarrow would try for 15 minutes
COPIES_AT_ONCE = 8
DEPTH = 3  # as in subset/train/part-0.parquet: nothing that lies deeper is read


class Listing(NamedTuple):
    """What lies under a URI: of a single file, ``root`` is its folder."""

    system: Any  # pyarrow.fs.FileSystem
    root: str
    files: dict[str, tuple[int, int | None]]  # path below root → bytes, and time of change in ns
    is_file: bool


def is_uri(name: str) -> bool:
    """
    >>> is_uri("s3://bucket/rows"), is_uri("demo:vader"), is_uri("/data/rows")
    (True, False, False)
    """
    return URI.match(name) is not None


def local_copy(uri: str, wanted: Callable[[str], bool]) -> Path:
    """What lies under a URI as a file or folder of this machine; changed files are copied anew.

    Args:
        wanted: which files of a folder, by their names.

    Raises:
        OSError, ValueError: it can't be read, with the cause.
    """
    if holds_password(uri):
        raise ValueError(
            "a URI is written into records, so it must hold no password; got one for "
            f"{urlsplit(without_passwords(uri)).hostname}. Give credentials as the store's own "
            "programs take them: environment variables, a profile, or the node's role."
        )
    try:
        listing = _listing(uri, wanted)
        if listing.files:
            place = _copied(uri, listing)
    except (OSError, ValueError, ImportError) as error:
        raise OSError(
            "data under a URI (s3://, gs://, abfs://, file://) must be readable from every node; "
            f"got {uri!r}: {type(error).__name__}: {error}. Check its spelling, the region "
            "(`?region=…`), and the node's credentials (AWS_ACCESS_KEY_ID or AWS_PROFILE, "
            "GOOGLE_APPLICATION_CREDENTIALS, …), or name a path on every node."
        ) from error
    if not listing.files:
        raise FileNotFoundError(
            f"a URI must lead to a data file, or to a folder that holds some; {uri} holds none. "
            "Correct its spelling."
        )
    return place / next(iter(listing.files)) if listing.is_file else place


def _listing(uri: str, wanted: Callable[[str], bool]) -> Listing:
    from pyarrow import fs

    if uri.startswith("gs://") and "retry_limit_seconds" not in uri:
        uri += ("&" if "?" in uri else "?") + GCS_PATIENCE
    system, path = fs.FileSystem.from_uri(uri)
    info = system.get_file_info(path)
    if info.type == fs.FileType.File:
        root, found = str(Path(path).parent), [info]
    elif info.type == fs.FileType.Directory:
        root, found = path, system.get_file_info(fs.FileSelector(path, recursive=True))
    else:
        root, found = path, []
    files = {
        Path(file.path).relative_to(root).as_posix(): (file.size, file.mtime_ns)
        for file in found
        if file.type == fs.FileType.File
    }
    is_file = info.type == fs.FileType.File
    if not is_file:
        files = {
            name: state
            for name, state in files.items()
            if wanted(Path(name).name) and len(Path(name).parts) <= DEPTH
        }
    return Listing(system, root, files, is_file)


def _copied(uri: str, listing: Listing) -> Path:
    """The folder with the copy: complete when it has its name."""
    state = json.dumps([uri, sorted(listing.files.items())])
    place = cache_root() / "remote" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            partial = Path(f"{place}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            size = sum(size for size, _ in listing.files.values()) / 1e6
            print(
                f"copying {uri} ({len(listing.files)} files, {size:.1f} MB, once per node) to "
                f"{place}",
                file=sys.stderr,
            )
            try:
                with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
                    list(pool.map(lambda name: _copy(listing, name, partial), listing.files))
                os.replace(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return place


def _copy(listing: Listing, name: str, folder: Path) -> None:
    from pyarrow import fs

    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    fs.copy_files(
        f"{listing.root}/{name}",
        str(target),
        source_filesystem=listing.system,
        destination_filesystem=fs.LocalFileSystem(),
    )
