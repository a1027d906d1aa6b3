"""One configuration of a space from words: what isn't given is as in the study's points."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna

from e2lora.config import Study, TrialConfig
from e2lora.search.plans import configuration_of


class RefusedSuggestion(ValueError):
    """A name or a value that the space doesn't offer."""


def configuration_of_words(
    study: Study, given: Mapping[str, Any], others: Collection[str] = ()
) -> TrialConfig:
    """What the space makes of these suggestions.

    Args:
        given: suggestions by name, values as JSON or text has them. What is lacking is as in the
            first of the study's points that agrees with all that is given, else as in the first.
        others: names that the space need not suggest.

    Raises:
        ValueError: a name that the space doesn't suggest, a value outside of its choices, or
            a suggestion that neither the words nor the points have.
    """
    trial = _Chosen(given, _nearest(study.given, given))
    config = configuration_of(study, trial)
    unknown = [name for name in given if name not in {*trial.offers, *others}]
    if unknown:
        offers = "; ".join(f"{name}: {offer}" for name, offer in trial.offers.items())
        raise RefusedSuggestion(
            f"the space suggests {offers or 'nothing'}; got "
            f"{', '.join(f'{name}={given[name]}' for name in unknown)}. Correct the name, or give "
            "fields of the configuration with a dot, as training.max_steps=500."
        )
    return config


def _nearest(points: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> Mapping[str, Any]:
    def agrees(point: Mapping[str, Any]) -> bool:
        return all(_same(point[name], given[name]) for name in given if name in point)

    first = points[0] if points else {}
    return next((point for point in points if agrees(point)), first)


def _same(one: Any, other: Any) -> bool:
    """
    >>> _same(8, "8"), _same(None, "null"), _same(0.003, 3e-3), _same("e2", "all")
    (True, True, True, False)
    """
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (one, other)]
    return texts[0] == texts[1] or (type(one) is type(other) and bool(one == other))


class _Chosen(optuna.trial.FixedTrial):
    """A trial whose suggestions are given; it remembers what was on offer, and refuses the rest."""

    def __init__(self, given: Mapping[str, Any], otherwise: Mapping[str, Any]) -> None:
        super().__init__({**otherwise, **given})
        self.offers: dict[str, str] = {}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        offer = ", ".join(map(str, choices))
        value = self._of(name, offer)
        found = [choice for choice in choices if _same(choice, value)]
        if not found:
            raise _refused(name, offer, value)
        self._params[name] = found[0]
        return super().suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> int:
        self._require_number(name, int, low, high)
        return super().suggest_int(name, low, high, **options)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        self._require_number(name, (int, float), low, high)
        return super().suggest_float(name, low, high, **options)

    def _require_number(self, name: str, kind: Any, low: float, high: float) -> None:
        offer = f"{low:g} to {high:g}"
        value = self._of(name, offer)
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
            raise _refused(name, offer, value)

    def _of(self, name: str, offer: str) -> Any:
        self.offers[name] = offer
        if name not in self._params:
            raise RefusedSuggestion(
                f"each suggestion of a space must be given, or stand in the study's points; {name} "
                f"({offer}) is in neither. Give {name}=VALUE."
            )
        return self._params[name]


def _refused(name: str, offer: str, value: Any) -> RefusedSuggestion:
    return RefusedSuggestion(
        f"the space offers for {name}: {offer}; got {value}. Take one of them."
    )
