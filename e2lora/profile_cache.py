"""Gradient profiles that were measured before on this machine, by what decides their numbers.

An entry that was cut short, edited or renamed is not trusted: it reads as if it weren't there.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from pydantic import ValidationError

from e2lora.assets import cache_root
from e2lora.config import Frozen
from e2lora.moments import GradientProfile
from e2lora.records import write_json


class CacheEntry(Frozen):
    """One file: the profile with the key it was stored under and a hash of both."""

    key: str
    digest: str
    profile: GradientProfile


class ProfileCache:
    """A folder of profiles; by default this user's."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_root() / "profiles"

    def load(self, key: str) -> GradientProfile | None:
        """The profile of this key; None if there is none, or none that can be trusted."""
        file = self._file(key)
        try:
            entry = CacheEntry.model_validate_json(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            return self._distrusted(file, str(error).splitlines()[0])
        if entry.key != key or entry.digest != _digest(key, entry.profile):
            return self._distrusted(file, "its content is not what was stored under this name")
        print(f"profile from the cache: {file}", file=sys.stderr)
        return entry.profile

    def store(self, key: str, profile: GradientProfile) -> None:
        """Keep a profile; where that can't be, say so: what was measured is still good."""
        entry = CacheEntry(key=key, digest=_digest(key, profile), profile=profile)
        try:
            write_json(self._file(key), entry)
        except OSError as error:
            print(
                f"warning: the profile can't be cached in {self.folder}: {error}", file=sys.stderr
            )

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    @staticmethod
    def _distrusted(file: Path, why: str) -> None:
        print(f"the cached profile {file} is damaged and is measured again: {why}", file=sys.stderr)


def _digest(key: str, profile: GradientProfile) -> str:
    return hashlib.sha256(f"{key} {profile.model_dump_json()}".encode()).hexdigest()
