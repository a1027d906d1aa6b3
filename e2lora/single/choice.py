"""What a single run trains: from a space, from a recorded trial, or from a study's best one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from e2lora.command import find_study
from e2lora.config import TrialConfig
from e2lora.records import StudyFolder, TrialFolder
from e2lora.search.points import configuration_of_words
from e2lora.winner import best_trial

TOP_FIELDS = ("seed",)
"""Fields of a configuration that are named without a dot; a space may suggest them too."""
ALTERNATIVES = (("max_steps", "num_epochs"), ("warmup_steps", "warmup_ratio"))
"""Pairs of options of training of which one is given; that one takes the other's place."""


@dataclass(frozen=True)
class Choice:
    """A configuration and where it is from.

    Attributes:
        source: as it is told.
        label: the same, short and fit for a file's name.
        trial: the study's trial whose plan may be taken over.
        profiles: of that study.
    """

    config: TrialConfig
    source: str
    label: str
    trial: TrialFolder | None = None
    profiles: Path | None = None

    @property
    def changed_parts(self) -> list[str]:
        """In what the configuration differs from that of ``trial``, of what decides a plan."""
        if self.trial is None:
            return []
        old = self.trial.config()
        changed = [p for p in DECIDE_PLANS if getattr(old, p) != getattr(self.config, p)]
        same = old.training.precision == self.config.training.precision
        return changed if same else [*changed, "precision"]  # a profile is of weights in one type


DECIDE_PLANS = ("model", "task", "adapter", "plan", "seed")


def from_space(space: str, words: Mapping[str, Any]) -> Choice:
    """Suggestions (without a dot) and fields (with one) over a space's first point that agrees.

    Raises:
        ValueError: an unknown space, suggestion or field, or a value that is refused.
    """
    study = find_study(space)
    suggestions = {name: value for name, value in words.items() if "." not in name}
    fields = {name: value for name, value in words.items() if "." in name or name in TOP_FIELDS}
    config = with_fields(configuration_of_words(study, suggestions, TOP_FIELDS), fields)
    return Choice(config, space, space.rpartition(".")[2])


def from_file(file: Path, words: Mapping[str, Any]) -> Choice:
    """A recorded trial.json, with some of its fields set.

    Raises:
        ValueError, OSError: no such record, or an unknown field or value.
    """
    if not file.is_file():
        raise ValueError(
            f"--trial must be a trial.json that a study or a run has recorded; {str(file)!r} is no "
            "file. Correct the path."
        )
    config = TrialConfig.model_validate_json(file.read_text(encoding="utf-8"))
    label = file.resolve().parent.name if file.stem == "trial" else file.stem
    return Choice(with_fields(config, _only_fields(words)), str(file), label)


def from_study(folder: StudyFolder, number: int | None, words: Mapping[str, Any]) -> Choice:
    """A trial of a study, the best by its first objective if no number is given.

    Raises:
        ValueError: no such study or trial, or an unknown field or value.
    """
    if not folder.record_file.exists():
        known = sorted(file.parent.name for file in folder.path.parent.glob("*/study.json"))
        raise ValueError(
            f"--from-study names a study below {folder.path.parent}; there is no {folder.name!r}, "
            f"but {', '.join(known) or 'none at all'}. Correct the name, or give --storage."
        )
    if number is None:
        trial, why = best_trial(folder)
    else:
        trial, why = folder.trial(number), "chosen by number"
        if not trial.config_file.exists():
            raise ValueError(
                f"--trial-number must be that of a trial of {folder.name!r}; it has no {number}, "
                f"but {', '.join(str(t.number) for t in folder.trial_folders())}. Correct it."
            )
    config = with_fields(trial.config(), _only_fields(words))
    source = f"trial {trial.number} of study {folder.name} ({why})"
    label = f"{folder.name}-{trial.number:05d}"
    return Choice(config, source, label, trial, folder.profiles)


def with_fields(config: TrialConfig, fields: Mapping[str, Any]) -> TrialConfig:
    """``config`` with fields set that are named by their way from the top.

    Raises:
        ValueError: no such field, or what the configuration itself refuses.
    """
    tree = config.model_dump(mode="json")
    for name, value in fields.items():
        _require_field(config, name)
        *way, last = name.split(".")
        place = tree
        for key in way:
            place[key] = {} if place.get(key) is None else place[key]
            place = place[key]
        place[last] = value
    if "plan.r" in fields and "plan.target_parameters" not in fields:
        tree["plan"]["target_parameters"] = None  # the rank is said, and follows from nothing
    training = {name.partition(".")[2] for name in fields if name.startswith("training.")}
    for pair in ALTERNATIVES:
        given = training & set(pair)
        if len(given) == 1 and fields[f"training.{min(given)}"] is not None:
            (other,) = set(pair) - given
            del tree["training"][other]  # its default: not given
    return TrialConfig.model_validate_json(json.dumps(tree))


def _require_field(config: TrialConfig, name: str) -> None:
    """Refuse a field that doesn't exist, as far as the configuration at hand tells.

    Raises:
        ValueError: listing those that do.
    """
    place: Any = config
    way = name.split(".")
    for number, key in enumerate(way):
        if isinstance(place, BaseModel):
            fields = type(place).model_fields
            if key not in fields:
                group = ".".join(way[:number])
                raise ValueError(
                    f"{group or 'a configuration'} has no {key!r}, as {name} asks for; it has "
                    f"{', '.join(fields)}. Correct the name."
                )
            place = getattr(place, key)
        elif place is None or isinstance(place, Mapping):
            return  # the configuration says what may stand there
        else:
            raise ValueError(
                f"{'.'.join(way[:number])} is a value of its own and has no parts; got {name}. "
                "Correct the name."
            )


def _only_fields(words: Mapping[str, Any]) -> dict[str, Any]:
    for name in words:
        if "." not in name and name not in TOP_FIELDS:
            raise ValueError(
                "a recorded trial has no space to ask, so --set takes fields of its configuration, "
                f"as training.max_steps=500; got {name}. Write the whole name, or use --space."
            )
    return dict(words)
