"""The choices of a row, in the forms that data sets give them in, and which of them is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SEPARATOR = "/"  # between choices that stand in a prompt


class Choices(NamedTuple):
    """Texts in order, and what the answer calls them where it calls them by labels."""

    texts: Sequence[str]
    labels: Sequence[Any] | None = None

    def place_of(self, answer: Any) -> int:
        """Of the right one, from 0: by its label; without labels by its text, place or truth.

        Raises:
            ValueError: it is none of them.

        >>> Choices(["red", "blue"], ["A", "B"]).place_of("B")
        1
        >>> [Choices(["no", "yes"]).place_of(answer) for answer in ("yes", 1, True)]
        [1, 1, 1]
        """
        names = self.texts if self.labels is None else self.labels
        if answer in names and not isinstance(answer, bool):
            return list(names).index(answer)
        by_place = self.labels is None and isinstance(answer, int)
        if by_place and 0 <= answer < len(self.texts):
            return int(answer)
        raise ValueError(f"an answer must be one of its row's choices; got {answer!r} of {names}.")


def choices_in_column(value: Any) -> Choices:
    """Of a list of texts, or of lists under ``text`` and ``label`` as the hub keeps them.

    Raises:
        ValueError: neither.

    >>> choices_in_column({"text": ["red", "blue"], "label": ["A", "B"]}).labels
    ['A', 'B']
    """
    texts, labels = value, None
    if isinstance(value, Mapping) and set(value) == {"text", "label"}:
        texts, labels = value["text"], value["label"]
    listed = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not listed or (labels is not None and len(labels) != len(texts)):
        raise ValueError(
            "choices are a list of texts, or of as many texts as labels in the form "
            f"{{'text': [...], 'label': [...]}}; got {value!r}."
        )
    return Choices(texts, labels)


def choices_in_prompt(pattern: str, prompt: str) -> Choices:
    """Those between slashes in the pattern's group, where it first matches.

    Raises:
        ValueError: it doesn't match.

    >>> choices_in_prompt("Answer format: (.+)", "Is it so? Answer format: true/false").texts
    ['true', 'false']
    """
    found = re.search(pattern, prompt)
    if found is None:
        raise ValueError(f"`choices_pattern` must match every prompt; {pattern!r} doesn't.")
    return Choices([choice.strip() for choice in found[1].split(SEPARATOR)])


def require_choices(texts: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there is nothing to choose, or a choice without a text.
    """
    if len(texts) < 2 or not all(text.strip() for text in texts):
        raise ValueError(f"choices are two texts at least, and none is empty; got {list(texts)}.")
