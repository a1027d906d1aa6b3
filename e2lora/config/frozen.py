"""The base of every configuration and artefact: immutable, strict about keys, named by content."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """Base of every artefact and configuration: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def fingerprint(self) -> str:
        """Sixteen hex digits that depend on every field, independent of field order."""
        return fingerprint_of(self.model_dump(mode="json"))


def fingerprint_of(value: Any) -> str:
    """Sixteen hex digits of a JSON value.

    >>> fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def in_one_paragraph(error: Exception) -> str:
    """What an error says; of a refused configuration each field, its rule and the value."""
    if not isinstance(error, ValidationError):
        return str(error)
    parts = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(key) for key in fault["loc"])
        said = fault["msg"].removeprefix("Value error, ").rstrip(".")
        value = repr(fault["input"])
        shown = value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…"
        given = "" if fault["type"] == "value_error" else f"; got {shown}"
        parts.append(f"{place + ': ' if place else ''}{said}{given}")
    return f"{error.title} refuses {'; '.join(parts)}. Correct it where it is given."


MOST_SHOWN = 80
"""Characters of a refused value: some are whole files."""
