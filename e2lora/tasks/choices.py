"""The choices of a row: in the forms that data sets give them in, and as token ids.

Token ids here are those that may follow the row's prompt.
"""

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


# ---- token ids ----------------------------------------------------------------------------------


def without_needless_ends(choices: Sequence[Sequence[int]], end: int) -> list[list[int]]:
    """Choices as they are compared: with their ends where one begins another, else without.

    Args:
        choices: token ids, the last ``end`` of which are the end.

    >>> without_needless_ends([[5, 0], [6, 7, 0]], end=1)
    [[5], [6, 7]]
    >>> without_needless_ends([[6, 0], [6, 7, 0]], end=1)
    [[6, 0], [6, 7, 0]]
    """
    bare = [list(choice[: len(choice) - end]) for choice in choices]
    begins = any(a != b and b[: len(a)] == a for a in bare for b in bare)
    return [list(choice) for choice in choices] if begins else bare


def fewest_inputs(continuations: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """What must follow a prompt so that all tokens of all its continuations are predicted.

    The last token of a continuation needn't be read to predict it; what begins another one's input
    is part of that.

    Returns:
        Inputs, and for each continuation the number of the input that it lies in.

    >>> fewest_inputs([[5, 1], [6], [5, 7, 8], [6, 7]])
    ([[5, 7], [6]], [0, 0, 0, 1])
    """
    inputs: list[list[int]] = []
    taken = [0] * len(continuations)
    for i in sorted(range(len(continuations)), key=lambda i: -len(continuations[i])):
        read = continuations[i][:-1]
        number = next((k for k, ids in enumerate(inputs) if ids[: len(read)] == read), len(inputs))
        if number == len(inputs):
            inputs.append(read)
        taken[i] = number
    return inputs, taken


def num_shared(lists: Sequence[Sequence[int]]) -> int:
    """How many token ids all of them begin with.

    >>> num_shared([[5, 6], [5, 6, 7], [5, 6, 8, 9]])
    2
    """
    count = 0
    for tokens in zip(*lists, strict=False):  # as far as the shortest
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
